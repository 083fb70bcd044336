// The pages of a row as attend_span reads them, one class for each format.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace adakv::ADAKV_ISA {

constexpr int kBlockSlots = 32;
constexpr int kSlotGroup = 8;  // page sizes are multiples of it

/// The pages of a row as if they were one array. What attend_span has to know of a format:
///   Query            a query is kept in the order in which load_pair(const Query*) has it
///   key, value       an entry's codes in memory, of a key kKeyDims dimensions in each Key
///   ahead, behind_values  what is fetched while the keys of a group are read, entries as wide as
///                    values, and while its values are read, as wide as keys
///   fill             what scales a block has: of keys [slot, width], of values [width, slot]
///   kStretch         dimensions that have the same numbers
///   numbers, number  scale and zero from dimension d on, and what codes stand for
template <typename Element>
struct RowPages {
  using Key = Element;
  static constexpr int kDims = std::is_same_v<Element, Int4Codes> ? 2 : 1;  // of an element
  static constexpr int kKeyDims = kDims;                                    // of a Key

  const Element *keys, *values;
  int64_t page_stride;
  const int32_t* page_ids;
  int log_page_size;
  int head_dim, value_dim;
  int key_pitch, value_pitch;  // from entry to entry, in elements

  explicit RowPages(const AttendSpan& span)
      : keys(static_cast<const Element*>(span.keys)),
        values(static_cast<const Element*>(span.values)),
        page_stride(span.page_stride),
        page_ids(span.page_ids),
        log_page_size(__builtin_ctz(span.page_size)),
        head_dim(span.head_dim),
        value_dim(span.value_dim),
        key_pitch(span.head_dim / kDims),
        value_pitch(span.value_dim / kDims) {}

  int in_page(int slot) const { return slot & ((1 << log_page_size) - 1); }
  const Element* key(int slot) const {
    return keys + page_ids[slot >> log_page_size] * page_stride + in_page(slot) * key_pitch;
  }
  const Element* value(int slot) const {
    return values + page_ids[slot >> log_page_size] * page_stride + in_page(slot) * value_pitch;
  }
  const Element* ahead(int slot) const { return value(slot); }
  const Element* behind_values(int slot) const { return key(slot + kBlockSlots); }
};

/// Widens the biases of the slots [begin, end), at most a block of them; returns `out`, or null if
/// there are none.
inline const float* fill_biases(const AttendSpan& span, int begin, int end, float* out) {
  if (span.biases == nullptr) return nullptr;
  const int log_page_size = __builtin_ctz(span.page_size);
  Float16 together[kBlockSlots] = {};
  for (int i = 0; i < kBlockSlots; i += kSlotGroup) {
    const int slot = begin + i;
    if (slot >= end) break;
    const Float16* from = static_cast<const Float16*>(span.biases) +
                          span.page_ids[slot >> log_page_size] * span.bias_stride +
                          (slot & (span.page_size - 1));
    __builtin_memcpy(together + i, from, kSlotGroup * sizeof(Float16));
  }
  for (int i = 0; i < kBlockSlots; i += kPair) {
    const F32Pair pair = load_in_order(together + i);
    store(out + i, pair.first);
    store(out + i + kLanes, pair.second);
  }
  return out;
}

template <typename Element>
struct PlainPages : RowPages<Element> {
  using Code = Element;
  using Input = Element;
  using Query = Element;
  static constexpr int width = 0, kStretch = kMaxHeadDim;
  static constexpr int kLine = kPair;  // dimensions that are fetched at once
  static constexpr bool kHasScales = false, kHasZero = false, kIsInt4 = false;
  struct Scales {
    const float* keys = nullptr;
    const float* values = nullptr;
  };
  struct Numbers {};

  using RowPages<Element>::RowPages;

  void fill(Scales&, int, int, int) const {}
  static Numbers numbers(const float*, int) { return {}; }
  static F32Pair number(F32Pair pair, Numbers) { return pair; }
};

/// Pages of codes: x = scale * code + zero, or scale * code; kGroup dimensions of a value share them.
template <typename Element, typename Scale, int kGroup = kScaleGroup>
struct CodePages : RowPages<Element> {
  using Code = Element;
  using Input = Scale;
  using Query = float;
  static constexpr int kNumbers = std::is_same_v<Code, Float8> ? 1 : 2;
  static constexpr float kUnit = kNumbers == 2 ? 1.f : 0x1p8f;  // of load_pair(const Code*)
  static constexpr int kMaxWidth = kNumbers * kMaxHeadDim / kGroup;
  struct Scales {
    alignas(64) float keys[kBlockSlots * kMaxWidth];
    alignas(64) float values[kBlockSlots * kMaxWidth];
  };

  static constexpr int kStretch = kGroup;
  static constexpr int kLine = 64;
  static constexpr bool kHasScales = true, kHasZero = kNumbers == 2, kIsInt4 = false;
  struct Numbers {
    F32 scale, zero;
  };

  const AttendSpan& span;
  int width, value_width;  // numbers of a key and of a value

  explicit CodePages(const AttendSpan& span)
      : RowPages<Element>(span),
        span(span),
        width((span.head_dim + kGroup - 1) / kGroup * kNumbers),
        value_width((span.value_dim + kGroup - 1) / kGroup * kNumbers) {}

  /// Widens the numbers of the slots [begin, end), and of those that fill up a group of slots;
  /// fetches the numbers of the block behind, up to `last`.
  void fill(Scales& scales, int begin, int end, int last) const {
    alignas(64) float values[kBlockSlots * kMaxWidth];
    fill(scales.keys, 0, begin, end, last);
    fill(values, 1, begin, end, last);
    for (int i = 0; i < end - begin; ++i) {
      for (int j = 0; j < value_width; ++j) {
        scales.values[j * kBlockSlots + i] = values[i * value_width + j];
      }
    }
  }

  void fill(float* out, int which, int begin, int end, int last) const {
    Scale together[kBlockSlots * kMaxWidth] = {};
    const int group_numbers = kSlotGroup * width_of(which);
    for (int slot = begin; slot < end; slot += kSlotGroup) {
      const Scale* from = in_memory(which, slot);
      Scale* to = together + (slot - begin) * width_of(which);
      for (int i = 0; i < group_numbers; i += kSlotGroup) {
        __builtin_memcpy(to + i, from + i, kSlotGroup * sizeof(Scale));
      }
      if (slot + kBlockSlots >= last) continue;
      const char* next = reinterpret_cast<const char*>(in_memory(which, slot + kBlockSlots));
      for (int i = 0; i < group_numbers * 2; i += 64) __builtin_prefetch(next + i);
    }
    for (int i = 0; i < (end - begin + kSlotGroup - 1) / kSlotGroup * group_numbers; i += kPair) {
      const F32Pair pair = load_in_order(together + i);
      store(out + i, pair.first * kUnit);
      store(out + i + kLanes, pair.second * kUnit);
    }
  }

  int width_of(int which) const { return which == 0 ? width : value_width; }

  const Scale* in_memory(int which, int slot) const {
    const int32_t page = this->page_ids[slot >> this->log_page_size];
    return static_cast<const Scale*>(span.scales[which]) + page * span.scale_stride[which] +
           this->in_page(slot) * width_of(which);
  }

  static Numbers numbers(const float* scales, int d) {
    const float* group = scales + d / kGroup * kNumbers;
    return {broadcast(group[0]), broadcast(group[kNumbers - 1])};
  }

  static F32Pair number(F32Pair codes, Numbers of) {
    if constexpr (kNumbers == 1) return {codes.first * of.scale, codes.second * of.scale};
    return {codes.first * of.scale + of.zero, codes.second * of.scale + of.zero};
  }
};

/// Pages of int4, which are blocks: the scales of a page's keys become factors of the queries, the
/// zeros a part of all their logits. The slots from span.tail_begin on lie in a tail. A page has few
/// bytes, so that what is fetched is always a whole page ahead.
template <typename Scale, int kGroup = kScaleGroup>
struct Int4Pages : CodePages<Int4Codes, Scale, kGroup> {
  using Base = CodePages<Int4Codes, Scale, kGroup>;
  using Input = EvenOdd<Scale>;
  using Query = Input;
  using Tail = PlainPages<Input>;
  static constexpr bool kIsInt4 = true;
  struct Scales {
    alignas(64) float keys[2 * kMaxHeadDim];  // scales, then zeros, in the order of queries
    alignas(64) float values[kBlockSlots * Base::kMaxWidth];
  };
  struct Numbers {};

  using Base::Base;

  void fill(Scales& scales, int begin, int, int last) const {
    fetch_scales(begin + kBlockSlots, last);
    fill_values(scales.values, begin);
    fill_keys(scales.keys, key_scales(begin));
  }

  /// The numbers of a page's keys, [2, D].
  void fill_keys(float* out, const Input* numbers) const {
    const int head_dim = this->head_dim;
    for (int d = 0; d < head_dim; d += kPair) {
      for (int i = 0; i < 2; ++i) {
        const Input* from = numbers + i * head_dim + d;
        const F32Pair pair =
            head_dim - d >= kPair ? load_pair(from) : load_pair(from, head_dim - d);
        store(out + i * kMaxHeadDim + d, pair.first);
        store(out + i * kMaxHeadDim + d + kLanes, pair.second);
      }
    }
  }

  /// The numbers of a page's values, [P, groups, scale and zero], as [groups, scale and zero, P].
  void fill_values(float* out, int begin) const {
    alignas(64) float both[2][kBlockSlots * kMaxHeadDim / kGroup];  // scales, zeros
    const int groups = this->width / 2;
    const auto* from = reinterpret_cast<const Input*>(this->in_memory(1, begin));
    for (int i = 0; i < kBlockSlots * groups; i += kLanes) {
      const F32Pair pair = load_pair(from + 2 * i);
      store(both[0] + i, pair.first);
      store(both[1] + i, pair.second);
    }
    for (int which = 0; which < 2; ++which) {
      float* to = out + which * kBlockSlots;
      if (groups == 1) spread<1>(to, both[which]);
      if (groups == 2) spread<2>(to, both[which]);
      if (groups == 3) spread<3>(to, both[which]);
      if (groups == 4) spread<4>(to, both[which]);
      for (int j = 0; groups > 4 && j < groups; ++j) {
        for (int i = 0; i < kBlockSlots; ++i) {
          to[j * 2 * kBlockSlots + i] = both[which][i * groups + j];
        }
      }
    }
  }

  /// [P, kGroups] as [kGroups, P], two rows apart.
  template <int kGroups>
  static void spread(float* out, const float* in) {
    for (int j = 0; j < kGroups; ++j) {
      for (int i = 0; i < kBlockSlots; ++i) out[j * 2 * kBlockSlots + i] = in[i * kGroups + j];
    }
  }

  void fetch_scales(int begin, int last) const {
    if (begin >= last) return;
    const auto fetch = [](const void* data, int bytes) {
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i);
    };
    fetch(key_scales(begin), 4 * this->head_dim);
    fetch(this->in_memory(1, begin), 2 * kBlockSlots * this->width);
  }

  const Input* key_scales(int slot) const {
    return static_cast<const Input*>(this->span.scales[0]) +
           this->page_ids[slot >> this->log_page_size] * this->span.scale_stride[0];
  }

  static Numbers numbers(const float*, int) { return {}; }
  static F32Pair number(F32Pair codes, Numbers) { return codes; }

  const Int4Codes* ahead(int slot) const {
    return this->key(slot + kBlockSlots < this->span.end_slot ? slot + kBlockSlots : slot);
  }
  const Int4Codes* behind_values(int slot) const { return this->value(slot + kBlockSlots); }
};

/// What each byte of codes stands for: numbers of 16 bits, that of its lowest kBits first.
template <typename Scale, int kBits>
struct CodeTable {
  uint16_t numbers[256][8 / kBits] = {};

  constexpr CodeTable() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int i = 0; i < 8 / kBits; ++i) {
        numbers[byte][i] = bits_of(byte >> i * kBits & ((1 << kBits) - 1));
      }
    }
  }

  static constexpr uint16_t bits_of(int code) {
    constexpr int kFraction = std::is_same_v<Scale, BFloat16> ? 7 : 10;
    constexpr int kBias = std::is_same_v<Scale, BFloat16> ? 127 : 15;
    if (code == 0) return 0;
    int exponent = 0;
    while (code >> (exponent + 1) != 0) ++exponent;
    const int fraction = (code << kFraction >> exponent) - (1 << kFraction);
    return static_cast<uint16_t>((exponent + kBias) << kFraction | fraction);
  }
};

/// Pages of int4 whose keys have dimensions in 16, in 4 and in 2 bits. Those of a page are widened once
/// for all queries, to numbers of which the first ones have scale 1 and zero 0.
template <typename Scale, int kGroup = kScaleGroup>
struct MixedPages : Int4Pages<Scale, kGroup> {
  using Base = Int4Pages<Scale, kGroup>;
  using Input = typename Base::Input;
  using Scales = typename Base::Scales;
  using Key = Input;
  static constexpr int kKeyDims = 1;

  alignas(64) mutable Input widened[kBlockSlots * kMaxHeadDim];  // keys of the page that was filled

  explicit MixedPages(const AttendSpan& span) : Base(span) { this->key_pitch = span.head_dim; }

  void fill(Scales& scales, int begin, int, int last) const {
    const int head_dim = this->head_dim, width = static_cast<int>(dims().bytes(head_dim));
    this->fetch_scales(begin + kBlockSlots, last);
    this->fill_values(scales.values, begin);
    Input numbers[2 * kMaxHeadDim];
    const int coded = head_dim - dims().in_16;
    for (int i = 0; i < 2; ++i) {
      const uint16_t number = i == 0 ? Table<4>::bits_of(1) : 0;
      for (int d = 0; d < dims().in_16; ++d) numbers[i * head_dim + d] = {number};
      __builtin_memcpy(numbers + i * head_dim + dims().in_16, this->key_scales(begin) + i * coded,
                       coded * sizeof(Input));
    }
    this->fill_keys(scales.keys, numbers);
    const uint8_t* codes = page(begin);
    for (int i = 0; i < kBlockSlots; ++i) widen(codes + i * width, widened + i * head_dim);
    if (begin + kBlockSlots >= last) return;
    for (int i = 0; i < kBlockSlots * width; i += 64) {
      __builtin_prefetch(page(begin + kBlockSlots) + i);
    }
  }

  const Input* key(int slot) const { return widened + this->in_page(slot) * this->head_dim; }
  const Int4Codes* ahead(int slot) const { return this->value(slot); }

 private:
  template <int kBits>
  using Table = CodeTable<Scale, kBits>;

  KeyDims dims() const { return this->span.key_dims; }

  const uint8_t* page(int slot) const {
    return reinterpret_cast<const uint8_t*>(this->keys) +
           this->page_ids[slot >> this->log_page_size] * this->page_stride;
  }

  void widen(const uint8_t* from, Input* to) const {
    __builtin_memcpy(to, from, dims().in_16 * sizeof(Input));
    from += 2 * dims().in_16;
    to += dims().in_16;
    widen<4>(this->head_dim - dims().in_16 - dims().in_2, from, to);
    widen<2>(dims().in_2, from, to);
  }

  /// So many codes, and goes on behind them.
  template <int kBits>
  static void widen(int count, const uint8_t*& from, Input*& to) {
    static constexpr Table<kBits> kTable;
    constexpr int kCodes = 8 / kBits;
    for (int d = 0; d < count; d += kCodes, to += kCodes) {
      __builtin_memcpy(to, kTable.numbers[*from++], kCodes * sizeof(Input));
    }
  }
};

/// Pages of int2: keys as those of mixed pages that have all dimensions in 2 bits, and values whose
/// codes become those of int4, a page at a time.
template <typename Scale>
struct Int2Pages : MixedPages<Scale, facts_of(PageFormat::kInt2).group> {
  using Base = MixedPages<Scale, facts_of(PageFormat::kInt2).group>;
  using Scales = typename Base::Scales;

  alignas(64) mutable Int4Codes codes[kBlockSlots * kMaxHeadDim / 2];  // values of the page

  using Base::Base;

  void fill(Scales& scales, int begin, int end, int last) const {
    Base::fill(scales, begin, end, last);
    const int bytes = kBlockSlots * this->value_dim / 4;
    const uint8_t* from = page_values(begin);
    for (int i = 0; i < bytes; ++i) {
      const unsigned four = from[i], two = (four | four << 4) & 0x0f0f;  // in each of two bytes
      const auto one = static_cast<uint16_t>((two | two << 2) & 0x3333);
      __builtin_memcpy(codes + 2 * i, &one, sizeof one);
    }
    if (begin + kBlockSlots >= last) return;
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(page_values(begin + kBlockSlots) + i);
  }

  const Int4Codes* value(int slot) const { return codes + this->in_page(slot) * this->value_pitch; }
  const Int4Codes* ahead(int slot) const { return value(slot); }
  const Int4Codes* behind_values(int slot) const { return value(slot); }

 private:
  const uint8_t* page_values(int slot) const {
    return reinterpret_cast<const uint8_t*>(this->values) +
           this->page_ids[slot >> this->log_page_size] * this->page_stride;
  }
};

}  // namespace adakv::ADAKV_ISA
