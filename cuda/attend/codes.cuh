// Codes as operands of matrix products, in attend's fast kernel.
//
// A register of ldmatrix has four codes. They become two operands of two elements each: `first` and
// `second`. Along the head dim any order will do, as long as queries have it, too.
//
//   keys     f16 operands. int8: 1024 + code, so that a byte only gets an exponent; the product is
//            put right behind the sum. fp8: the code itself
//   values   bf16 operands, because a probability times a scale may be out of the range of f16.
//            int8: the code. fp8: code * 2^-120, so that bits only move; kValueUnit puts it right
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
  static constexpr float kKeyOffset = 1024;  // of a key's operand
  static constexpr float kValueUnit = 1;     // probabilities take it along

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
  static __device__ Operands values(uint32_t codes) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 2^23 + code, less 2^23
      x[i] = __uint_as_float(__byte_perm(codes, 0x4b000000, 0x7440 | i)) - 8388608.f;
    }
    return {pack<__nv_bfloat16>(x[0], x[2]), pack<__nv_bfloat16>(x[1], x[3])};
  }
};

template <>
struct CodeReader<Fp8> {
  static constexpr float kKeyOffset = 0;
  static constexpr float kValueUnit = 1.152921504606846976e18f;  // 2^60, twice

  /// Codes 0 and 1, then codes 2 and 3.
  static __device__ Operands keys(uint32_t codes) {
    const uint16_t low = codes, high = codes >> 16;
    const __half2_raw first = __nv_cvt_fp8x2_to_halfraw2(low, __NV_E4M3);
    const __half2_raw second = __nv_cvt_fp8x2_to_halfraw2(high, __NV_E4M3);
    return {reinterpret_cast<const uint32_t&>(first), reinterpret_cast<const uint32_t&>(second)};
  }

  static __device__ void order_query(uint32_t low, uint32_t high, uint32_t (&operand)[2]) {
    operand[0] = low;
    operand[1] = high;
  }

  /// Codes 0 and 2, then codes 1 and 3.
  static __device__ Operands values(uint32_t codes) {
    return {(codes << 8 & 0x80008000) | (codes << 4 & 0x07f007f0),
            (codes & 0x80008000) | (codes >> 4 & 0x07f007f0)};
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
  const auto as_float = [](uint16_t bits) {
    return to_float(reinterpret_cast<const Element&>(bits));
  };
  if constexpr (Format::kScales == 2) {
    uint32_t pair;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(address) : "memory");
    return {as_float(pair), as_float(pair >> 16)};
  } else {
    uint16_t scale;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(scale) : "r"(address) : "memory");
    return {as_float(scale), 0.f};
  }
}

}  // namespace adakv
