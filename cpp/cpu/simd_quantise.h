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

/// A number that is an element, as bits.
template <typename Element>
inline uint16_t bits_of_element(float x, const Element* type) {
  const uint16_t sign = x < 0 ? 0x8000 : 0;  // zeros have none
  return sign | round_up(x < 0 ? -x : x, type);
}

/// 0 .. 255, halves to the even one: adding so much rounds to an integer, which stands in the low bits.
inline U32 code_of(F32 x, const Int8Code*) {
  return (U32)(x + 0x1.8p23f) & 0xff;
}

/// 0 .. 15.
inline U32 code_of(F32 x, const Int4Codes*) {
  return (U32)(x + 0x1.8p23f) & 0xf;
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

/// Where all lanes are written, though there is room for `count` bytes.
inline void store_bytes(uint8_t* out, U32 lanes, int count) {
  if (count >= kLanes) return store_bytes(out, lanes);
  uint8_t bytes[kLanes];
  store_bytes(bytes, lanes);
  __builtin_memcpy(out, bytes, count);
}

template <typename Code, typename Element>
void quantise(const void* entry, int head_dim, uint8_t* codes, uint16_t* scales) {
  constexpr bool kIsInt4 = std::is_same_v<Code, Int4Codes>;
  constexpr bool kHasZero = !std::is_same_v<Code, Float8>;
  constexpr float kLargest = kIsInt4 ? kLargestInt4 : kHasZero ? kLargestInt8 : kLargestFp8;
  constexpr const Element* kType = nullptr;
  const Element* data = static_cast<const Element*>(entry);
  for (int begin = 0; begin < head_dim; begin += kScaleGroup) {
    const int count = head_dim - begin < kScaleGroup ? head_dim - begin : kScaleGroup;
    alignas(64) float group[kScaleGroup];  // of int4 pair by pair, the even and the odd ones
    Extremes of = {broadcast(kInfinity), broadcast(-kInfinity), F32{}};
    for (int d = 0; d < count; d += kPair) {
      Element part[kPair];
      const bool is_whole = count - d >= kPair;
      if (!is_whole) {  // filled up with the last element, which changes nothing
        for (int i = 0; i < kPair; ++i) part[i] = data[begin + (d + i < count ? d + i : count - 1)];
      }
      const Element* elements = is_whole ? data + begin + d : part;
      F32Pair pair;
      if constexpr (kIsInt4) {
        pair = load_pair(reinterpret_cast<const EvenOdd<Element>*>(elements));
      } else {
        pair = load_in_order(elements);
      }
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
    const uint16_t scale_bits = is_finite ? round_up(spread / kLargest, kType) : kNaN16;
    const float scale = is_finite ? widened(scale_bits, kType) : 0.f;
    *scales++ = scale_bits;
    if constexpr (kHasZero) *scales++ = is_finite ? bits_of_element(zero, kType) : 0;
    uint8_t* out = codes + (kIsInt4 ? begin / 2 : begin);
    if (!(scale > 0)) {
      __builtin_memset(out, 0, kIsInt4 ? count / 2 : count);
      continue;
    }
    const auto code = [&](int d) {
      return code_of((load(group + d) - zero) / scale, static_cast<const Code*>(nullptr));
    };
    if constexpr (kIsInt4) {
      for (int d = 0; d < count; d += kPair) {
        store_bytes(out + d / 2, code(d) | code(d + kLanes) << 4, (count - d) / 2);
      }
    } else {
      for (int d = 0; d < count; d += kLanes) store_bytes(out + d, code(d), count - d);
    }
  }
}

/// Whether an entry holds neither NaN nor infinities.
template <typename Element>
inline bool is_finite(const Element* entry, int head_dim) {
  F32 check = {};
  for (int d = 0; d < head_dim; d += kPair) {
    const F32Pair x =
        head_dim - d >= kPair ? load_pair(entry + d) : load_pair(entry + d, head_dim - d);
    check += x.first * 0.0f + x.second * 0.0f;
  }
  const float all = total(check);
  return all == all;
}

/// kPair dimensions of the keys of a page, or the last `count`: their scales, and the codes of those
/// keys that are `finite`, of which there are some.
template <typename Element>
inline void quantise_channels(const void* const* keys,
                              uint32_t finite,
                              int d,
                              int count,
                              int head_dim,
                              uint8_t* codes,
                              uint16_t* scales) {
  constexpr const Element* kType = nullptr;
  const auto element = [&](int i) {
    const auto* data = static_cast<const EvenOdd<Element>*>(keys[i]) + d;
    return count < kPair ? load_pair(data, count) : load_pair(data);
  };
  Extremes even = {broadcast(kInfinity), broadcast(-kInfinity), F32{}}, odd = even;
  for (int i = 0; i < kInt4PageSize; ++i) {
    if (!(finite >> i & 1)) continue;
    const F32Pair x = element(i);
    even.add(x.first);
    odd.add(x.second);
  }
  float half_scales[kPair], half_zeros[kPair];
  const auto number = [&](const Extremes& of, int first) {
    const F32 steps = (of.highest * 0.5f - of.lowest * 0.5f) / (kLargestInt4 * 0.5f);
    for (int i = 0; i < kLanes; ++i) {
      const int at = 2 * i + first;
      const uint16_t scale = round_up(steps[i], kType);
      half_scales[first * kLanes + i] = widened(scale, kType) * 0.5f;
      half_zeros[first * kLanes + i] = of.lowest[i] * 0.5f;
      if (at >= count) continue;
      scales[d + at] = scale;
      scales[head_dim + d + at] = bits_of_element(of.lowest[i], kType);
    }
  };
  number(even, 0);
  number(odd, 1);
  const auto code = [&](F32 x, int first) {
    const F32 scale = load(half_scales + first * kLanes), zero = load(half_zeros + first * kLanes);
    const F32 steps = choose(scale > 0.0f, (x * 0.5f - zero) / scale, F32{});
    return code_of(steps, static_cast<const Int4Codes*>(nullptr));
  };
  for (int i = 0; i < kInt4PageSize; ++i) {
    uint8_t* out = codes + (i * head_dim + d) / 2;
    const F32Pair x = element(i);
    const U32 both = finite >> i & 1 ? code(x.first, 0) | code(x.second, 1) << 4 : U32{};
    store_bytes(out, both, count / 2);
  }
}

template <typename Element>
void quantise_page(const void* const* entries,
                   int head_dim,
                   uint8_t* codes,
                   uint16_t* key_scales,
                   uint16_t* value_scales) {
  uint32_t finite = 0;
  for (int i = 0; i < kInt4PageSize; ++i) {
    finite |= uint32_t{is_finite(static_cast<const Element*>(entries[i]), head_dim)} << i;
  }
  const int key_bytes = kInt4PageSize * head_dim / 2;
  if (finite == 0) {
    __builtin_memset(codes, 0, key_bytes);
    __builtin_memset(key_scales, 0, 2 * head_dim * sizeof(uint16_t));
  } else {
    for (int d = 0; d < head_dim; d += kPair) {
      const int count = head_dim - d < kPair ? head_dim - d : kPair;
      quantise_channels<Element>(entries, finite, d, count, head_dim, codes, key_scales);
    }
  }
  const int width = (head_dim + kScaleGroup - 1) / kScaleGroup * 2;
  for (int i = 0; i < kInt4PageSize; ++i) {
    uint8_t* out = codes + key_bytes + i * head_dim / 2;
    uint16_t* scales = value_scales + i * width;
    if (finite >> i & 1) {
      quantise<Int4Codes, Element>(entries[kInt4PageSize + i], head_dim, out, scales);
      continue;
    }
    __builtin_memset(out, 0, head_dim / 2);
    for (int j = 0; j < width; j += 2) scales[j] = kNaN16, scales[j + 1] = 0;
  }
}

}  // namespace adakv::ADAKV_ISA
