// Codes as operands of matrix products, in attend's fast kernel.
//
// A register of ldmatrix has four codes. They become two operands of two f16 elements each: `first`
// and `second`. Along the head dim any order will do, as long as queries have it, too.
//
// In int8 a byte only gets an exponent, which makes it 1024 + code: with keys that is put right
// behind the sum. Values lose 1152 at once and are code - 128, so that their products are small.
#pragma once

#include <cstdint>

#include "common/codes.cuh"
#include "common/dtype.cuh"

namespace adakv {

struct Operands {
  uint32_t first, second;
};

template <typename Format>
struct CodeReader;

template <>
struct CodeReader<Int8> {
  static constexpr float kKeyOffset = 1024, kValueOffset = -128;  // operands less codes
  static constexpr float kHighUnit = 1;                           // of second operands of values

  /// Codes 0 and 2, then codes 1 and 3.
  static __device__ Operands keys(uint32_t codes) {
    return {__byte_perm(codes, 0x64646464, 0x5250), __byte_perm(codes, 0x64646464, 0x5351)};
  }

  /// Elements 0 to 3 of a query in the order of keys().
  static __device__ void order_query(uint32_t low, uint32_t high, uint32_t (&operand)[2]) {
    operand[0] = __byte_perm(low, high, 0x5410);
    operand[1] = __byte_perm(low, high, 0x7632);
  }

  /// Codes 0 and 2, then codes 1 and 3.
  static __device__ Operands values(uint32_t codes, int) {
    const Operands pairs = keys(codes);
    return {less_1152(pairs.first), less_1152(pairs.second)};
  }

 private:
  static __device__ uint32_t less_1152(uint32_t pair) {
    uint32_t result;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(0x64806480));
    return result;
  }
};

template <>
struct CodeReader<Fp8> {
  static constexpr float kKeyOffset = 0, kValueOffset = 0, kHighUnit = 1;

  /// Codes 0 and 1, then codes 2 and 3.
  static __device__ Operands keys(uint32_t codes) { return {pair(codes), pair(codes >> 16)}; }

  static __device__ void order_query(uint32_t low, uint32_t high, uint32_t (&operand)[2]) {
    operand[0] = low;
    operand[1] = high;
  }

  /// Codes 0 and 2, then codes 1 and 3.
  static __device__ Operands values(uint32_t codes, int) {
    return keys(__byte_perm(codes, 0, 0x3120));
  }

 private:
  static __device__ uint32_t pair(uint32_t codes) {
    const __half2_raw pair =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

/// (x & kMask) | bits, in one instruction, which ptxas doesn't find by itself.
template <uint32_t kMask>
__device__ inline uint32_t mask_and_set(uint32_t x, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "n"(kMask), "r"(bits));
  return result;
}

template <>
struct CodeReader<Int4> {
  static constexpr float kValueOffset = -8;  // operands less codes, with the lines below
  // What values() adds to codes - 8 and to 16 (codes - 8), the other way round: -1032 and -1152.
  static constexpr uint32_t kLessLow = 0xe408e408, kLessHigh = 0xe480e480;
  static constexpr float kHighUnit = 1.f / 16;

  /// Of two entries' four codes each: 1024 + codes 2 * half of both; 1024 + 16 times codes
  /// 2 * half + 1.
  static __device__ Operands values(uint32_t codes, int half) {
    const uint32_t pair = half == 0 ? codes : codes >> 8;
    return {mask_and_set<0x000f000f>(pair, 0x64006400), mask_and_set<0x00f000f0>(pair, 0x64006400)};
  }

  /// A pair of what keys() adds to codes, the other way round.
  template <typename Element>
  static constexpr uint32_t kLessKeyOffset =
      std::is_same_v<Element, __half> ? 0xe400e400 : 0xc300c300;

  /// Codes 0 and 4, 1 and 5, 2 and 6, 3 and 7, and to each 1024 (float16) or 128 (bfloat16).
  template <typename Element>
  static __device__ void keys(uint32_t codes, uint32_t (&operands)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      constexpr uint32_t kOffset = kLessKeyOffset<Element> & 0x7fff7fff;
      operands[i] = mask_and_set<0x000f000f>(codes >> 4 * i, kOffset);
    }
  }
};

/// Two elements as f16.
template <typename Element>
__device__ inline uint32_t to_half2(uint32_t pair);
template <>
__device__ inline uint32_t to_half2<__half>(uint32_t pair) {
  return pair;
}
template <>
__device__ inline uint32_t to_half2<__nv_bfloat16>(uint32_t pair) {
  return pack<__half>(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}

/// A group's scale and zero in shared memory.
struct Scale {
  float scale, zero;
};

template <typename Format, typename Element>
__device__ inline Scale load_scale(uint32_t address) {
  if constexpr (Format::kScales == 2) {
    uint32_t pair;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(address) : "memory");
    return {bits_to_float<Element>(pair), bits_to_float<Element>(pair >> 16)};
  } else {
    uint16_t scale;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(scale) : "r"(address) : "memory");
    return {bits_to_float<Element>(scale), 0.f};
  }
}

}  // namespace adakv
