// Codes as operands of matrix products, in attend's fast kernel.
//
// A register of ldmatrix has four codes. They become two operands of two f16 elements each: `first`
// and `second`. Along the head dim any order will do, as long as queries have it, too.
//
// A code in the low bits of an f16 is that many times the least number that f16 has, which products take
// exactly: codes of values, and those of four bits, need no more than a mask. Four bits from bit 4 on
// are 16 times as much; in bf16, too, where they reach the exponent, because the least normal numbers
// are as far apart as the subnormal ones. Sums are multiplied by these units at the end.
//
// Keys of int8 get an exponent instead, which makes them 1024 + code. What that adds to a logit is
// taken back together with the zero; units would cost every logit one more product.
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
  static constexpr float kKeyOffset = 1024;                         // operands less codes
  static constexpr float kLowUnit = 0x1p24f, kHighUnit = kLowUnit;  // codes by operands of values

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
    return {codes & 0x00ff00ff, __byte_perm(codes, 0, 0x4341)};
  }
};

template <>
struct CodeReader<Fp8> {
  static constexpr float kKeyOffset = 0, kLowUnit = 1, kHighUnit = 1;

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

template <>
struct CodeReader<Int4> {
  static constexpr float kLowUnit = 0x1p24f, kHighUnit = kLowUnit / 16;

  /// Of two entries' four codes each: codes 2 * half of both, then codes 2 * half + 1.
  static __device__ Operands values(uint32_t codes, int half) {
    const uint32_t pair = half == 0 ? codes : codes >> 8;
    return {pair & 0x000f000f, pair & 0x00f000f0};
  }

  /// Codes 0 and 4, 1 and 5, 2 and 6, 3 and 7.
  static __device__ void keys(uint32_t codes, uint32_t (&operands)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t pairs = i == 0 ? codes : codes >> 8;
      operands[i] = pairs & 0x000f000f;
      operands[i + 1] = pairs & 0x00f000f0;
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
