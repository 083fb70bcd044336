// Which scale and codes a group of an entry's dimensions gets. All in float32, from the 16-bit numbers
// that come; both backends give the same bits.
//
//   int8   zero = lowest x;  scale = (highest x - zero) / 255, rounded up to 16 bits
//          code = (x - zero) / scale to the nearest integer, halves to the even one
//   fp8    scale = largest |x| / 448, rounded up to 16 bits
//          code = x / scale to the nearest float8_e4m3fn, halves to the even one
//   int4   as int8 with 15 in the place of 255
//   int2   with 3, and groups of 32 dimensions
//
// In pages of int4 and int2 only values have groups of their dimensions. A key's dimension has one scale and
// zero for the 32 entries of a page, chosen when they are all there. Their spread may be more than
// float32 has: so both sides of its divisions are taken half, which changes no bit else.
//
// Of keys in int4 the last dimensions may have codes of 2 bits, 3 in the place of 15, and the first ones
// may be stored as they are (KeyDims); of a key that is not finite these are stored as 0.
//
// With scale 0 (a group of equal numbers, or of zeros) all codes are 0. A group that holds NaN or
// infinities, or whose range is more than float32 has, gets scale NaN, codes 0 and zero 0: it reads as
// NaN, and only it. An int4 or int2 entry whose key holds NaN or infinities is treated so in all groups of its
// value, gets codes 0 in its key, and takes no part in its page's scales; where no entry of a page
// does, their scales and zeros are 0.
//
// The functions are static: what one instruction set was compiled for must not serve another (cpu/simd.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace adakv {

constexpr uint16_t kNaN16 = 0x7fff;  // NaN as float16 and as bfloat16
constexpr float kLargestInt8 = 255;  // code
constexpr float kLargestInt4 = 15;   // code
constexpr float kLargestInt2 = 3;    // code
constexpr float kLargestFp8 = 448;   // number of float8_e4m3fn

namespace detail {

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

}  // namespace detail

/// The least bfloat16 that is not below x, as bits; 0 <= x, far below the largest.
static inline uint16_t round_up_bfloat16(float x) {
  return static_cast<uint16_t>((detail::bits_of(fabsf(x)) + 0xffff) >> 16);
}

/// The least float16 that is not below x, as bits; 0 <= x, far below the largest.
static inline uint16_t round_up_float16(float x) {
  const uint32_t bits = detail::bits_of(fabsf(x));                          // x may be -0
  if (bits < 0x38800000) return static_cast<uint16_t>(ceilf(x * 0x1p24f));  // subnormal
  return static_cast<uint16_t>((bits - 0x38000000 + 0x1fff) >> 13);
}

}  // namespace adakv
