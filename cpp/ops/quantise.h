// Which scale and codes a group of an entry's dimensions gets. All in float32, from the 16-bit numbers
// that come; both backends use these functions or give the same bits.
//
//   int8   zero = lowest x;  scale = (highest x - zero) / 255, rounded up to 16 bits
//          code = (x - zero) / scale to the nearest integer, halves to the even one
//   fp8    scale = largest |x| / 448, rounded up to 16 bits
//          code = x / scale to the nearest float8_e4m3fn, halves to the even one
//
// With scale 0 (a group of equal numbers, or of zeros) all codes are 0. A group that holds NaN or
// infinities, or whose range is more than float32 has, gets scale NaN and codes 0, and int8 zero 0: it
// reads as NaN, and only it.
//
// The functions are static: what one instruction set was compiled for must not serve another (cpu/simd.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ops/host_device.h"

namespace adakv {

constexpr uint16_t kNaN16 = 0x7fff;  // NaN as float16 and as bfloat16
constexpr float kLargestInt8 = 255;  // code
constexpr float kLargestFp8 = 448;   // number of float8_e4m3fn

namespace detail {

ADAKV_HOST_DEVICE static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

}  // namespace detail

/// The least bfloat16 that is not below x, as bits; 0 <= x, far below the largest.
ADAKV_HOST_DEVICE static inline uint16_t round_up_bfloat16(float x) {
  return static_cast<uint16_t>((detail::bits_of(fabsf(x)) + 0xffff) >> 16);
}

/// The least float16 that is not below x, as bits; 0 <= x, far below the largest.
ADAKV_HOST_DEVICE static inline uint16_t round_up_float16(float x) {
  const uint32_t bits = detail::bits_of(fabsf(x));                          // x may be -0
  if (bits < 0x38800000) return static_cast<uint16_t>(ceilf(x * 0x1p24f));  // subnormal
  return static_cast<uint16_t>((bits - 0x38000000 + 0x1fff) >> 13);
}

/// The code of x; not for scale 0 or NaN.
ADAKV_HOST_DEVICE static inline uint8_t int8_code(float x, float scale, float zero) {
  const float code = rintf((x - zero) / scale);
  return static_cast<uint8_t>(code < 0 ? 0 : code > kLargestInt8 ? kLargestInt8 : code);
}

/// x to the nearest float8_e4m3fn, halves to the even one; |x| beyond 448 to 448.
ADAKV_HOST_DEVICE static inline uint8_t float8_of(float x) {
  const uint32_t bits = detail::bits_of(x), sign = bits >> 24 & 0x80;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x43e00000) return static_cast<uint8_t>(sign | 0x7e);
  if (magnitude < 0x3c800000) {  // below 2^-6: steps of 2^-9
    const float steps = rintf(fabsf(x) * 0x1p9f);
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(steps));
  }
  const uint32_t rounded = magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1);
  return static_cast<uint8_t>(sign | rounded >> 20);
}

}  // namespace adakv
