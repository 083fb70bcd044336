// quantise: codes and scales of one entry, group by group, as ops/quantise.h says.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "ops/quantise.h"

namespace adakv::ADAKV_ISA {

inline uint16_t round_up(float x, const Float16*) {
  return round_up_float16(x);
}
inline uint16_t round_up(float x, const BFloat16*) {
  return round_up_bfloat16(x);
}

inline float widened(uint16_t bits, const Float16* type) {
  Float16 numbers[kPair] = {{bits}};
  (void)type;
  return load_pair(numbers).first[0];
}
inline float widened(uint16_t bits, const BFloat16*) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  __builtin_memcpy(&x, &wide, sizeof x);
  return x;
}

/// 0 .. 255, halves to the even one: adding so much rounds to an integer, which stands in the low bits.
inline U32 code_of(F32 x, const Int8Code*) {
  return (U32)(x + 0x1.8p23f) & 0xff;
}

/// |x| up to 448.
inline U32 code_of(F32 x, const Float8*) {
  const U32 sign = (U32)x >> 24 & 0x80, magnitude = (U32)x & 0x7fffffff;
  const U32 normal = (magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  const U32 steps = (U32)(abs(x) + 0x1.8p14f) & 0xff;  // of 2^-9, below 2^-6
  const U32 is_small = (U32)(magnitude < 0x3c800000);
  return sign | (is_small & steps) | (~is_small & normal);
}

template <int kStep, int... kLane>
inline F32 swapped(F32 v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}

/// The largest lane, without a way through memory.
template <int kStep = kLanes / 2>
inline float largest(F32 v) {
  v = max(v, swapped<kStep>(v, LaneNumbers{}));
  if constexpr (kStep > 1) return largest<kStep / 2>(v);
  return v[0];
}

/// The sum of all lanes.
template <int kStep = kLanes / 2>
inline float total(F32 v) {
  v += swapped<kStep>(v, LaneNumbers{});
  if constexpr (kStep > 1) return total<kStep / 2>(v);
  return v[0];
}

/// The smallest and largest of a group, or a NaN in `check`.
struct Extremes {
  F32 lowest, highest, check;

  void add(F32 x) {
    lowest = x < lowest ? x : lowest;
    highest = x > highest ? x : highest;
    check += x * 0.0f;
  }
};

template <typename Code, typename Element>
void quantise(const void* entry, int head_dim, uint8_t* codes, uint16_t* scales) {
  constexpr bool kHasZero = std::is_same_v<Code, Int8Code>;
  constexpr const Element* kType = nullptr;
  const Element* data = static_cast<const Element*>(entry);
  for (int begin = 0; begin < head_dim; begin += kScaleGroup) {
    const int count = head_dim - begin < kScaleGroup ? head_dim - begin : kScaleGroup;
    alignas(64) float group[kScaleGroup];
    Extremes of = {broadcast(kInfinity), broadcast(-kInfinity), F32{}};
    for (int d = 0; d < count; d += kPair) {
      Element part[kPair];
      const bool is_whole = count - d >= kPair;
      if (!is_whole) {  // filled up with the last element, which changes nothing
        for (int i = 0; i < kPair; ++i) part[i] = data[begin + (d + i < count ? d + i : count - 1)];
      }
      const F32Pair pair = load_in_order(is_whole ? data + begin + d : part);
      store(group + d, pair.first);
      store(group + d + kLanes, pair.second);
      of.add(pair.first);
      of.add(pair.second);
    }
    const float lowest = -largest(-of.lowest), highest = largest(of.highest);
    const float zero = kHasZero ? lowest : 0.f;
    const float spread = kHasZero ? highest - lowest : highest > -lowest ? highest : -lowest;
    const float check = total(of.check) + spread * 0.f;
    const bool is_finite = check == check;
    const uint16_t scale_bits =
        is_finite ? round_up(spread / (kHasZero ? kLargestInt8 : kLargestFp8), kType) : kNaN16;
    const float scale = is_finite ? widened(scale_bits, kType) : 0.f;
    *scales++ = scale_bits;
    if constexpr (kHasZero) {
      // One of the elements, so rounding changes nothing.
      const uint16_t sign = zero < 0 ? 0x8000 : 0;
      *scales++ = is_finite ? sign | round_up(zero < 0 ? -zero : zero, kType) : 0;
    }
    if (!(scale > 0)) {
      __builtin_memset(codes + begin, 0, count);
      continue;
    }
    for (int d = 0; d < count; d += kLanes) {
      const F32 x = (load(group + d) - zero) / scale;
      const U32 lanes = code_of(x, static_cast<const Code*>(nullptr));
      if constexpr (kLanes > 8) {  // dimensions are a multiple of 8
        if (count - d < kLanes) {
          uint8_t bytes[kLanes];
          store_bytes(bytes, lanes);
          __builtin_memcpy(codes + begin + d, bytes, 8);
          break;
        }
      }
      store_bytes(codes + begin + d, lanes);
    }
  }
}

}  // namespace adakv::ADAKV_ISA
