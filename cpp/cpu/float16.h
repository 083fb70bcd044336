// The two 16-bit formats, one number at a time, for results; kernels widen whole vectors
// (simd.h). And what quantised pages hold.
//
// The functions are static: what one instruction set was compiled for must not serve another (simd.h).
#pragma once

#include <cstdint>
#include <cstring>

namespace adakv {

/// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

/// IEEE binary16.
struct Float16 {
  uint16_t bits;
};

/// A code of int8 pages, 0 .. 255.
struct Int8Code {
  uint8_t bits;
};

/// Two codes of int4 pages, 0 .. 15: that of the dimension before in the low half.
struct Int4Codes {
  uint8_t bits;
};

/// float8_e4m3fn.
struct Float8 {
  uint8_t bits;
};

namespace detail {

static inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace detail

/// Rounds to nearest, ties to even; NaN stays NaN.
static inline void from_float(float x, float& out) {
  out = x;
}

static inline void from_float(float x, BFloat16& out) {
  const uint32_t bits = detail::float_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = static_cast<uint16_t>(x == x ? rounded : bits >> 16 | 0x40);
}

static inline void from_float(float x, Float16& out) {
  const uint32_t bits = detail::float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and more round to infinity
    half = 0x7c00;
  } else if (magnitude <
             0x38800000) {  // subnormal: adding 0.5 makes the FPU round at the last bit of a half
    half = detail::float_bits(detail::bits_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

static inline float to_float(float x) {
  return x;
}

static inline float to_float(BFloat16 x) {
  return detail::bits_float(static_cast<uint32_t>(x.bits) << 16);
}

static inline float to_float(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fff;
  float size = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal
  if (magnitude >= 0x400) {
    const uint32_t exponents = magnitude >= 0x7c00 ? 0x70000000 : 0x38000000;  // of infinity, NaN
    size = detail::bits_float((magnitude << 13) + exponents);
  }
  return (x.bits & 0x8000) != 0 ? -size : size;
}

}  // namespace adakv
