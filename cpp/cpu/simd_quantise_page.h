// quantise_page: codes and scales of a page of int4 or int2, as ops/quantise.h says. Lanes are dimensions where
// the keys' scales are found, entries where the values' are: few steps wait for one another.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/simd_quantise.h"
#include "ops/quantise.h"

namespace adakv::ADAKV_ISA {

/// The least 16-bit numbers that are not below x, as bits; x as round_up_bfloat16 and
/// round_up_float16 take it.
inline U32 round_up(F32 x, const BFloat16*) {
  return ((U32)abs(x) + 0xffff) >> 16;
}
inline U32 round_up(F32 x, const Float16*) {
  const U32 bits = (U32)abs(x);
  const F32 steps = abs(x) * 0x1p24f;  // of subnormal numbers
  const F32 nearest = (steps + 0x1p23f) - 0x1p23f;
  const F32 up = choose(nearest < steps, nearest + 1.0f, nearest);
  const U32 small = (U32)(up + 0x1p23f) & 0x7fffff;
  const U32 is_small = (U32)(bits < 0x38800000);
  return (is_small & small) | (~is_small & ((bits - 0x38000000 + 0x1fff) >> 13));
}

/// What such bits stand for.
inline F32 widened(U32 bits, const BFloat16*) {
  return (F32)(bits << 16);
}
inline F32 widened(U32 bits, const Float16*) {
  return choose((I32)(bits < 0x400), to_float(bits) * 0x1p-24f, (F32)((bits << 13) + 0x38000000));
}

/// Numbers that are elements, as bits; zeros have no sign.
template <typename Element>
inline U32 bits_of_elements(F32 x, const Element* type) {
  return round_up(x, type) | ((U32)(x < 0.0f) & 0x8000);
}

template <int kStep, int... kLane>
inline F32 fold_max(F32 a, F32 b, std::integer_sequence<int, kLane...>) {
  return max(__builtin_shufflevector(a, b, (kLane & kStep ? kLane - kStep + kLanes : kLane)...),
             __builtin_shufflevector(a, b, (kLane & kStep ? kLane + kLanes : kLane + kStep)...));
}

/// Lane i of the result is the largest lane of v[i]; overwrites v.
template <int kStep = kLanes / 2>
inline F32 max_each(F32 (&v)[kLanes]) {
  for (int i = 0; i < kStep; ++i) v[i] = fold_max<kStep>(v[i], v[i + kStep], LaneNumbers{});
  if constexpr (kStep > 1) return max_each<kStep / 2>(v);
  return v[0];
}

/// Where all lanes are written, though there is room for `count` bytes.
inline void store_bytes(uint8_t* out, U32 lanes, int count) {
  if (count >= kLanes) return store_bytes(out, lanes);
  uint8_t bytes[kLanes];
  store_bytes(bytes, lanes);
  __builtin_memcpy(out, bytes, count);
}

/// A page's entries, P keys and then P values, and where their codes go.
template <typename Element>
struct PageEntries {
  using Pairs = EvenOdd<Element>;

  const void* const* entries;
  const void* const* next;  // of the page that comes after, or null
  int head_dim;

  const Pairs* at(int i) const { return static_cast<const Pairs*>(entries[i]); }

  /// Dimensions from d on, and where they are not a whole pair, zeros behind the last one; or of any
  /// order in a pair.
  template <bool kWhole>
  static F32Pair pair(const Pairs* entry, int d, int count) {
    return kWhole ? load_pair(entry + d) : load_pair(entry + d, count);
  }
  static F32Pair any_order(const Pairs* entry, int d) {
    return load_pair(reinterpret_cast<const Element*>(entry) + d);
  }

  /// Fetches entry i of the next page.
  void fetch(int i) const {
    if (next == nullptr) return;
    const char* data = static_cast<const char*>(next[i]);
    for (int j = 0; j < head_dim * 2; j += 64) __builtin_prefetch(data + j);
  }
};

/// Whether all of an entry's elements are finite: whose exponent has a bit that is 0.
template <typename Element>
inline bool is_finite(const Element* entry, int head_dim) {
  using Halves = uint16_t __attribute__((vector_size(kPair * 2)));
  constexpr uint16_t kExponent = std::is_same_v<Element, BFloat16> ? 0x7f80 : 0x7c00;
  Halves bad = {};
  int d = 0;
  for (; d + kPair <= head_dim; d += kPair) {
    bad |= (Halves)((load_as<Halves>(entry + d) & kExponent) == kExponent);
  }
  bool is_bad = false;
  for (; d < head_dim; ++d) is_bad |= (entry[d].bits & kExponent) == kExponent;
  uint64_t parts[kPair / 4];
  __builtin_memcpy(parts, &bad, sizeof parts);
  for (const uint64_t part : parts) is_bad |= part != 0;
  return !is_bad;
}

/// A bit for each key that is finite.
template <typename Element>
inline uint32_t finite_keys(const PageEntries<Element>& page) {
  uint32_t finite = 0;
  for (int i = 0; i < kTailedPageSize; ++i) {
    page.fetch(i);
    const auto* key = static_cast<const Element*>(page.entries[i]);
    finite |= uint32_t{is_finite(key, page.head_dim)} << i;
  }
  return finite;
}

/// The codes of numbers from `zero` on, of pairs of dimensions in a byte each. Not for scales of 0.
inline U32 codes_of(F32Pair x, F32Pair zero, F32Pair scale) {
  // Adding so much rounds to an integer, halves to the even one, which stands in the low bits.
  const U32 low = (U32)((x.first - zero.first) / scale.first + 0x1.8p23f);
  const U32 high = (U32)((x.second - zero.second) / scale.second + 0x1.8p23f);
  return (low | high << 4) & 0xff;
}

/// kPair dimensions of the keys, or the last `count` if these are no whole pair: scales, and the codes
/// of the keys that are `finite`, of which there are some. The largest code is `most` of a dimension.
template <bool kAllFinite, bool kWhole, typename Element, typename Most>
inline void quantise_channels(const PageEntries<Element>& page,
                              uint32_t finite,
                              int d,
                              int count,
                              const Most& most,
                              uint8_t* codes,
                              uint16_t* scales) {
  constexpr const Element* kType = nullptr;
  const int head_dim = page.head_dim;
  const void* const* keys = page.entries;
  const auto element = [&](int i) {
    return page.template pair<kWhole>(static_cast<const EvenOdd<Element>*>(keys[i]), d, count);
  };
  F32Pair low = {broadcast(kInfinity), broadcast(kInfinity)}, high = {-low.first, -low.first};
  for (int i = 0; i < kTailedPageSize; ++i) {
    if (!kAllFinite && !(finite >> i & 1)) continue;
    const F32Pair x = element(i);
    low = {x.first < low.first ? x.first : low.first,
           x.second < low.second ? x.second : low.second};
    high = {max(x.first, high.first), max(x.second, high.second)};
  }
  const auto scale_of = [&](F32 lowest, F32 highest, F32 largest) {
    return round_up((highest * 0.5f - lowest * 0.5f) / (largest * 0.5f), kType);
  };
  const F32Pair largest = most(d);
  const U32 even = scale_of(low.first, high.first, largest.first);
  const U32 odd = scale_of(low.second, high.second, largest.second);
  const U32 both_scales = even | odd << 16;
  const U32 both_zeros = bits_of_elements(low.first, kType) | bits_of_elements(low.second, kType)
                                                                  << 16;
  const int bytes = (kWhole ? kPair : count) * static_cast<int>(sizeof(uint16_t));
  __builtin_memcpy(scales + d, &both_scales, bytes);
  __builtin_memcpy(scales + head_dim + d, &both_zeros, bytes);
  const auto half = [](U32 scale) {  // where all keys are the same, codes are 0
    return choose((I32)(scale == 0), broadcast(kInfinity), widened(scale, kType) * 0.5f);
  };
  const F32Pair half_scale = {half(even), half(odd)};
  const F32Pair half_zero = {low.first * 0.5f, low.second * 0.5f};
  for (int i = 0; i < kTailedPageSize; ++i) {
    const F32Pair x = element(i);
    const F32Pair half_x = {x.first * 0.5f, x.second * 0.5f};
    const bool is_there = kAllFinite || finite >> i & 1;
    const U32 both = is_there ? codes_of(half_x, half_zero, half_scale) : U32{};
    store_bytes(codes + (i * head_dim + d) / 2, both, kWhole ? kLanes : count / 2);
  }
}

template <bool kAllFinite, typename Element, typename Most>
inline void quantise_keys(const PageEntries<Element>& page,
                          uint32_t finite,
                          const Most& most,
                          uint8_t* codes,
                          uint16_t* scales) {
  int d = 0;
  for (; d + kPair <= page.head_dim; d += kPair) {
    quantise_channels<kAllFinite, true>(page, finite, d, kPair, most, codes, scales);
  }
  if (d < page.head_dim) {
    quantise_channels<kAllFinite, false>(page, finite, d, page.head_dim - d, most, codes, scales);
  }
}

/// All keys of a page, codes [P, D / 2] and scales [2, D].
template <typename Element, typename Most>
inline void quantise_keys(const PageEntries<Element>& page,
                          uint32_t finite,
                          const Most& most,
                          uint8_t* codes,
                          uint16_t* scales) {
  if (finite == ~uint32_t{0}) {
    quantise_keys<true>(page, finite, most, codes, scales);
  } else if (finite != 0) {
    quantise_keys<false>(page, finite, most, codes, scales);
  } else {
    __builtin_memset(codes, 0, kTailedPageSize * page.head_dim / 2);
    __builtin_memset(scales, 0, 2 * page.head_dim * sizeof(uint16_t));
  }
}

/// Codes of 4 bits of which none is above 3, as codes of 2 bits, `count` bytes of them.
inline void halve_codes(const uint8_t* from, int count, uint8_t* to) {
  for (int j = 0; j < count; ++j) {
    const int low = from[2 * j], high = from[2 * j + 1];
    to[j] = static_cast<uint8_t>((low & 3) | low >> 4 << 2 | (high & 3) << 4 | high >> 4 << 6);
  }
}

/// The same of keys whose dimensions have 16, 4 and 2 bits: quantised as if all had codes of 4, of which
/// the last ones are 3 at most, and then put together.
template <typename Element>
inline void quantise_mixed_keys(const PageEntries<Element>& page,
                                uint32_t finite,
                                KeyDims dims,
                                uint8_t* codes,
                                uint16_t* scales) {
  uint8_t of_page[kTailedPageSize * kMaxHeadDim / 2];
  uint16_t of_dims[2 * kMaxHeadDim];
  const int head_dim = page.head_dim, in_4_end = head_dim - dims.in_2;
  const auto most = [&](int d) {
    const auto of = [&](I32 lanes) {
      return choose(lanes < in_4_end, broadcast(kLargestInt4), broadcast(kLargestInt2));
    };
    return F32Pair{of(lane_numbers() * 2 + d), of(lane_numbers() * 2 + d + 1)};
  };
  quantise_keys(page, finite, most, of_page, of_dims);
  const int width = static_cast<int>(dims.bytes(head_dim)), in_4 = in_4_end - dims.in_16;
  for (int i = 0; i < kTailedPageSize; ++i) {
    uint8_t* to = codes + i * width;
    const uint8_t* from = of_page + (i * head_dim + dims.in_16) / 2;
    if (finite >> i & 1) {
      __builtin_memcpy(to, page.entries[i], 2 * dims.in_16);
    } else {
      __builtin_memset(to, 0, 2 * dims.in_16);
    }
    to += 2 * dims.in_16;
    __builtin_memcpy(to, from, in_4 / 2);
    halve_codes(from + in_4 / 2, dims.in_2 / 4, to + in_4 / 2);
  }
  const int with_codes = head_dim - dims.in_16;
  for (int half = 0; half < 2; ++half) {
    __builtin_memcpy(scales + half * with_codes, of_dims + half * head_dim + dims.in_16,
                     with_codes * sizeof(uint16_t));
  }
}

/// Codes, in 4 bits each, and scales of a group of dimensions from `begin` on, a whole one or what is
/// left, of kLanes values from `first` on, of the page's keys those that are `finite`.
template <PageFormat kFormat, bool kWhole, typename Element>
inline void quantise_group(const PageEntries<Element>& page,
                           uint32_t finite,
                           int first,
                           int begin,
                           uint8_t* codes,
                           uint16_t* scales,
                           int width) {
  constexpr const Element* kType = nullptr;
  constexpr int kGroup = facts_of(kFormat).group;
  constexpr float kLargest = kFormat == PageFormat::kInt2 ? kLargestInt2 : kLargestInt4;
  const int head_dim = page.head_dim, count = kWhole ? kGroup : head_dim - begin;
  F32 lows[kLanes], highs[kLanes], checks[kLanes];  // lows: negated
  for (int i = 0; i < kLanes; ++i) {
    const auto* value = page.at(kTailedPageSize + first + i) + begin;
    if (begin == 0) page.fetch(kTailedPageSize + first + i);
    Extremes of = {broadcast(kInfinity), broadcast(-kInfinity), F32{}};
    for (int d = 0; d < count; d += kPair) {
      typename PageEntries<Element>::Pairs part[kPair];
      const bool is_whole = kWhole || count - d >= kPair;
      if (!is_whole) {  // filled up with the last element, which changes nothing
        for (int j = 0; j < kPair; ++j) part[j] = value[d + j < count ? d + j : count - 1];
      }
      const F32Pair x = page.any_order(is_whole ? value + d : part, 0);
      of.add(x.first);
      of.add(x.second);
    }
    lows[i] = -of.lowest;
    highs[i] = of.highest;
    checks[i] = of.check;
  }
  const F32 zero = -max_each(lows), spread = max_each(highs) - zero;
  const F32 check = sum_each(checks) + spread * 0.0f;
  const I32 is_finite = check == check;
  const U32 scale = round_up(spread / kLargest, kType);
  const U32 zero_bits = (U32)is_finite & bits_of_elements(zero, kType);
  uint32_t numbers[kLanes], has_codes[kLanes];
  float scale_of[kLanes], zero_of[kLanes];
  const U32 both = ((U32)is_finite & scale) | (~(U32)is_finite & kNaN16) | zero_bits << 16;
  const U32 needs_codes = (U32)is_finite & (U32)(scale != 0);
  __builtin_memcpy(numbers, &both, sizeof numbers);
  __builtin_memcpy(has_codes, &needs_codes, sizeof has_codes);
  store(scale_of, widened(scale, kType));
  store(zero_of, zero);
  for (int i = 0; i < kLanes; ++i) {
    const int at = first + i;
    const bool counts = finite >> at & 1;
    const uint32_t number = counts ? numbers[i] : kNaN16;
    __builtin_memcpy(scales + at * width + begin / kGroup * 2, &number, sizeof number);
    uint8_t* out = codes + (at * head_dim + begin) / 2;
    if (!counts || has_codes[i] == 0) {
      __builtin_memset(out, 0, count / 2);
      continue;
    }
    const auto* value = page.at(kTailedPageSize + at) + begin;
    const F32 zeros = broadcast(zero_of[i]), scales_of = broadcast(scale_of[i]);
    const auto store_codes = [&](int d, F32Pair x) {
      store_bytes(out + d / 2, codes_of(x, {zeros, zeros}, {scales_of, scales_of}),
                  kWhole ? kLanes : (count - d) / 2);
    };
    int d = 0;
    for (; d + kPair <= count; d += kPair)
      store_codes(d, page.template pair<true>(value, d, kPair));
    if (!kWhole && d < count) store_codes(d, page.template pair<false>(value, d, count - d));
  }
}

/// All values of a page, codes [P, D / 2] and scales [P, 2 Z].
template <PageFormat kFormat, typename Element>
inline void quantise_values(const PageEntries<Element>& page,
                            uint32_t finite,
                            uint8_t* codes,
                            uint16_t* scales) {
  constexpr int kGroup = facts_of(kFormat).group;
  const int head_dim = page.head_dim, width = (head_dim + kGroup - 1) / kGroup * 2;
  for (int first = 0; first < kTailedPageSize; first += kLanes) {
    int begin = 0;
    for (; begin + kGroup <= head_dim; begin += kGroup) {
      quantise_group<kFormat, true>(page, finite, first, begin, codes, scales, width);
    }
    if (begin < head_dim) {
      quantise_group<kFormat, false>(page, finite, first, begin, codes, scales, width);
    }
  }
}

template <typename Element>
void quantise_page(const void* const* entries,
                   const void* const* next,
                   int head_dim,
                   PageFormat format,
                   KeyDims key_dims,
                   const PageCodes& to) {
  const PageEntries<Element> page = {entries, next, head_dim};
  const uint32_t finite = finite_keys(page);
  if (key_dims.are_mixed()) {
    quantise_mixed_keys(page, finite, key_dims, to.keys, to.key_scales);
  } else {
    const auto most = [](int) { return F32Pair{broadcast(kLargestInt4), broadcast(kLargestInt4)}; };
    quantise_keys(page, finite, most, to.keys, to.key_scales);
  }
  if (format == PageFormat::kInt2) {
    uint8_t codes[kTailedPageSize * kMaxHeadDim / 2];
    quantise_values<PageFormat::kInt2>(page, finite, codes, to.value_scales);
    halve_codes(codes, kTailedPageSize * head_dim / 4, to.values);
  } else {
    quantise_values<PageFormat::kInt4>(page, finite, to.values, to.value_scales);
  }
}

}  // namespace adakv::ADAKV_ISA
