// attend_span's blocks on Intel's matrix unit (AMX), for bfloat16 and for codes beside it:
//
//   logits [32, queries] = keys [32, D] . queries [D, 16 at a time]
//   out [8 queries, D]   = weights [16, 32] . values [32, D]
//
// The unit multiplies bfloat16 and sums in float32. Keys, values and codes are numbers of bfloat16.
// A query is one as well, but two for int4, where it is multiplied by scales first. A weight becomes
// the sum of two, and has two rows of a tile: what is left out is 2^-17 of it.
//
// What the vectors would have made of infinities, the halves of weights turn into NaN. A block whose
// result isn't finite is therefore left to the vectors.
#pragma once

#include "cpu/simd_amx.h"
#include "cpu/simd_attend.h"

namespace adakv::ADAKV_ISA {

/// Transposes 4 x 4 numbers in each quarter of the vectors.
inline void transpose_quarters(U32 (&v)[4]) {
  const __m512i a = _mm512_unpacklo_epi32((__m512i)v[0], (__m512i)v[1]);
  const __m512i b = _mm512_unpackhi_epi32((__m512i)v[0], (__m512i)v[1]);
  const __m512i c = _mm512_unpacklo_epi32((__m512i)v[2], (__m512i)v[3]);
  const __m512i d = _mm512_unpackhi_epi32((__m512i)v[2], (__m512i)v[3]);
  v[0] = (U32)_mm512_unpacklo_epi64(a, c);
  v[1] = (U32)_mm512_unpackhi_epi64(a, c);
  v[2] = (U32)_mm512_unpacklo_epi64(b, d);
  v[3] = (U32)_mm512_unpackhi_epi64(b, d);
}

/// v[j][i] to out[i * stride + j], for four vectors.
inline void store_columns(uint32_t* out, int stride, U32 (&v)[4]) {
  transpose_quarters(v);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i x = (__m512i)v[i];
    _mm_storeu_si128((__m128i*)(out + i * stride), _mm512_castsi512_si128(x));
    _mm_storeu_si128((__m128i*)(out + (i + 4) * stride), _mm512_extracti32x4_epi32(x, 1));
    _mm_storeu_si128((__m128i*)(out + (i + 8) * stride), _mm512_extracti32x4_epi32(x, 2));
    _mm_storeu_si128((__m128i*)(out + (i + 12) * stride), _mm512_extracti32x4_epi32(x, 3));
  }
}

/// in[i * stride + j] to v[j][i], for four vectors.
inline void load_columns(const float* in, int stride, U32 (&v)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512i x = _mm512_castsi128_si512(load_as<__m128i>(in + i * stride));
    x = _mm512_inserti32x4(x, load_as<__m128i>(in + (i + 4) * stride), 1);
    x = _mm512_inserti32x4(x, load_as<__m128i>(in + (i + 8) * stride), 2);
    x = _mm512_inserti32x4(x, load_as<__m128i>(in + (i + 12) * stride), 3);
    v[i] = (U32)x;
  }
  transpose_quarters(v);
}

/// Pairs of bfloat16 from the upper halves of two vectors, the low ones first.
inline U32 upper_halves(U32 low, U32 high) {
  return low >> 16 | (high & 0xffff0000u);
}

// Two codes or elements in a lane, in the order of load_pair. pair_of_key: (first, second) of one
// entry. pairs_of_values: (first of a, first of b) and (second of a, second of b).

struct U32Pair {
  U32 first, second;
};

template <typename Code>
inline U32 pair_of_key(const Code* key) {
  const F32Pair x = load_pair(key);
  return upper_halves((U32)x.first, (U32)x.second);
}

template <typename Code>
inline U32Pair pairs_of_values(const Code* a, const Code* b) {
  const F32Pair x = load_pair(a), y = load_pair(b);
  return {upper_halves((U32)x.first, (U32)y.first), upper_halves((U32)x.second, (U32)y.second)};
}

inline U32Pair pairs_of_values(const BFloat16* a, const BFloat16* b) {
  const U32 x = load_as<U32>(a), y = load_as<U32>(b);
  return {(x & 0xffff) | y << 16, upper_halves(x, y)};
}

/// The numbers 0 .. 15 that the lowest four of each 16 bits say, in bfloat16.
inline U32 numbers_of_int4(U32 codes) {
  static constexpr uint16_t kHalf[16] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                                         0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130,
                                         0x4140, 0x4150, 0x4160, 0x4170};
  const __m512i table = _mm512_broadcast_i64x4(load_as<__m256i>(kHalf));  // bit 4 does not matter
  return (U32)_mm512_permutexvar_epi16((__m512i)codes, table);
}

inline U32 pair_of_key(const Int4Codes* key) {
  const U32 codes = widen_bytes(key);
  return numbers_of_int4(codes | codes << 12);
}

inline U32Pair pairs_of_values(const Int4Codes* a, const Int4Codes* b) {
  const U32 codes = widen_bytes(a) | widen_bytes(b) << 16;
  return {numbers_of_int4(codes), numbers_of_int4(codes >> 4)};
}

template <typename Pages, int kHeadDim>
class TiledBlocks {
  using Code = typename Pages::Code;
  using Scales = typename Pages::Scales;
  static constexpr int kTile = AmxProduct::kTile, kDepth = AmxProduct::kDepth;
  static constexpr bool kIsPlain = !Pages::kHasScales;
  static constexpr bool kScalesKeys = Pages::kHasScales && !Pages::kIsInt4;
  static constexpr int kParts = Pages::kIsInt4 ? 2 : 1;  // of a query
  static constexpr int kColumnQueries = kTile / kParts;  // that a tile of columns has
  static constexpr int kRowQueries = kTile / 2;          // that a tile of weights has
  static constexpr int kStretch = kIsPlain ? kHeadDim : Pages::kStretch;
  static constexpr int kKeyStretch = kScalesKeys ? Pages::kStretch : kHeadDim;
  static constexpr int kStretches = kHeadDim / kKeyStretch;
  static constexpr int kPitch = kHeadDim / Pages::kDims;  // from entry to entry, in codes
  static constexpr int kPairs = kHeadDim / 2;
  static constexpr int kPanels = Pages::kIsInt4 ? 1 : kMaxSpanQueries / kColumnQueries;
  static constexpr int kBlocks = 4;         // so many that what a step waits for counts little
  static constexpr int kFewestQueries = 8;  // fewer leave tiles too empty
  static constexpr int kLeastWork = 5120;   // queries x slots: less does not pay for getting ready

 public:
  static constexpr int kSlots = kBlocks * kBlockSlots;

  static bool suits(const AttendSpan& span) {
    const int num_slots = span.end_slot - span.begin_slot;
    return span.head_dim == kHeadDim && span.value_dim == kHeadDim &&
           span.num_queries >= kFewestQueries && num_slots >= kSlots &&
           span.num_queries * int64_t{num_slots} >= kLeastWork &&
           (!kIsPlain || span.page_size % kTile == 0);
  }

  /// queries: [num_queries, head_dim] in Query's order
  TiledBlocks(const AttendSpan& span, const Pages& row, const float* queries)
      : span_(span), row_(row), queries_(queries) {
    for (int i = 0; i < kBlocks; ++i) {
      __builtin_memset(values_[i], 0, sizeof(uint32_t) * kTile * kHeadDim);
    }
    __builtin_memset(weights_, 0, sizeof weights_);
    if constexpr (!kIsPlain) __builtin_memset(keys_, 0, sizeof(uint32_t) * kTile * kHeadDim);
    if constexpr (!Pages::kIsInt4) {
      for (int first = 0; first < span.num_queries; first += kColumnQueries) {
        pack(queries_ + first * kHeadDim, columns_from(first), panel(first));
      }
    }
    if constexpr (kScalesKeys) sum_queries();
  }

  /// A block of slots for all queries; false: it is not done, and nothing has changed.
  bool attend(int begin, int block_end, float* acc) {
    const int num_queries = span_.num_queries;
    const int last_visible =
        span_.first_visible + (span_.first_query + num_queries - 1) / span_.group;
    const int end = block_end < last_visible ? block_end : last_visible;
    if (end <= begin) return true;
    const int count = end - begin;
    const int num_blocks = (count + kBlockSlots - 1) / kBlockSlots;
    alignas(64) float logits[kMaxSpanQueries][kSlots];
    float max[kMaxSpanQueries], total[kMaxSpanQueries], correction[kMaxSpanQueries];
    alignas(64) float memory[kSlots];
    const float* biases = span_.biases == nullptr ? nullptr : memory;
    for (int i = 0; i < num_blocks; ++i) {
      const int from = begin + i * kBlockSlots;
      row_.fill(scales_[i], from, from + in_block(i, count), span_.end_slot);
      fill_biases(span_, from, from + in_block(i, count), memory + i * kBlockSlots);
    }
    for (int first = 0; first < num_queries; first += kColumnQueries) {
      for (int i = 0; i < num_blocks; ++i) {
        multiply_keys(begin + i * kBlockSlots, i, in_block(i, count), first);
      }
      if (first == 0) convert_values(begin, count);
      for (int i = 0; i < num_blocks; ++i) {
        store_logits(i, in_block(i, count), first, &logits[0][i * kBlockSlots]);
      }
    }
    for (int r = 0; r < num_queries; ++r) {
      if (span_.logits) {
        float* to = span_.logits + r * span_.logits_stride + (begin - span_.begin_slot);
        copy_slots(to, logits[r], count);
      }
      const int limit = span_.first_visible + (span_.first_query + r) / span_.group;
      max[r] = span_.max[r];
      total[r] = span_.sum[r];
      correction[r] = softmax_block<kSlots>(span_, logits[r], biases,
                                            (limit < end ? limit : end) - begin, max[r], total[r]);
    }
    if (!multiply_values(count, &logits[0][0])) return false;
    for (int r = 0; r < num_queries; ++r) {
      span_.max[r] = max[r];
      span_.sum[r] = total[r];
      for (int d = 0; d < kHeadDim; d += kLanes) {
        float* out = acc + r * kHeadDim + d;
        store(out, load(out) * correction[r] + load(fresh_ + r * kHeadDim + d));
      }
    }
    return true;
  }

 private:
  /// Queries from `first` on that share a tile of columns.
  int columns_from(int first) const {
    const int left = span_.num_queries - first;
    return left < kColumnQueries ? left : kColumnQueries;
  }
  uint32_t* panel(int first) { return panel_ + first / kColumnQueries % kPanels * kPairs * kTile; }
  static int in_block(int i, int count) {
    const int left = count - i * kBlockSlots;
    return left < kBlockSlots ? left : kBlockSlots;
  }

  /// Numbers [count, head_dim] as columns [head_dim / 2, 16]: the first parts of all, then the second.
  void pack(const float* numbers, int count, uint32_t* out) const {
    for (int first = 0; first < count; first += 4) {
      for (int d = 0; d < kHeadDim; d += kPair) {
        U32 parts[kParts][4] = {};
        for (int i = 0; i < 4 && first + i < count; ++i) {
          const float* from = numbers + (first + i) * kHeadDim + d;
          F32 x = load(from), y = load(from + kLanes);
          for (int part = 0; part < kParts; ++part) {
            parts[part][i] = upper_halves((U32)x, (U32)y);
            x -= (F32)((U32)x & 0xffff0000u);
            y -= (F32)((U32)y & 0xffff0000u);
          }
        }
        for (int part = 0; part < kParts; ++part) {
          store_columns(out + d / 2 * kTile + part * kColumnQueries + first, kTile, parts[part]);
        }
      }
    }
  }

  /// What zeros of codes are multiplied by.
  void sum_queries() {
    for (int first = 0; first < kHeadDim; first += kKeyStretch) {
      for (int r = 0; r < span_.num_queries; ++r) {
        F32 sums = {};
        for (int d = first; d < first + kKeyStretch; d += kLanes)
          sums += load(queries_ + r * kHeadDim + d);
        query_sums_[first / kKeyStretch][r] = sum(sums);
      }
    }
  }

  /// Queries times the scales of a page, and what its zeros add to their logits.
  void scale_columns(int block, int first_query) {
    alignas(64) float scaled[kColumnQueries * kHeadDim];
    const int count = columns_from(first_query);
    for (int r = 0; r < count; ++r) {
      scale_queries<1>(queries_ + (first_query + r) * kHeadDim, kHeadDim, scales_[block].keys,
                       scaled + r * kHeadDim, constants_[block] + r);
    }
    pack(scaled, count, panel_);
  }

  void convert_keys(int begin, int count) {
    for (int i = 0; i < count; ++i) {
      const Code* key = row_.key(begin + i);
#pragma GCC unroll 8
      for (int d = 0; d < kHeadDim; d += kPair) {
        const U32 pair = pair_of_key(key + d / Pages::kDims);
        __builtin_memcpy(keys_ + (i * kHeadDim + d) / 2, &pair, sizeof pair);
      }
    }
  }

  /// Values as tiles [head_dim / 16, 16, 16] of pairs of slots; fetches the entries of later blocks.
  void convert_values(int begin, int count) {
    constexpr int kRowBytes = kPitch * static_cast<int>(sizeof(Code));
    for (int group = 0; group < count; group += kSlotGroup) {
      const Code* values = row_.value(begin + group);
      const int ahead = begin + group + kSlots;
      const int next = ahead < span_.end_slot ? ahead : begin + group;
      const auto* next_keys = reinterpret_cast<const char*>(row_.key(next));
      const auto* next_values = reinterpret_cast<const char*>(row_.value(next));
      uint32_t* tiles = values_[group / kBlockSlots] + group % kBlockSlots / 2 * kTile;
      for (int i = 0; i < kSlotGroup && group + i < count; i += 2) {
        for (int line = i * kRowBytes; line < (i + 2) * kRowBytes; line += 64) {
          __builtin_prefetch(next_keys + line, 0, kLocality);
          __builtin_prefetch(next_values + line, 0, kLocality);
        }
        const Code* a = values + i * kPitch;
        const bool is_single = group + i + 1 == count;
        const Code* b = is_single ? a : a + kPitch;
#pragma GCC unroll 8
        for (int d = 0; d < kHeadDim; d += kPair) {
          U32Pair pairs = pairs_of_values(a + d / Pages::kDims, b + d / Pages::kDims);
          if (is_single) pairs = {pairs.first & 0xffff, pairs.second & 0xffff};
          uint32_t* out = tiles + (d + i / 2) * kTile;
          __builtin_memcpy(out, &pairs.first, sizeof pairs.first);
          __builtin_memcpy(out + kTile * kTile, &pairs.second, sizeof pairs.second);
        }
      }
    }
  }

  /// product_ [stretch, 32, 16] of a block and a tile of columns
  void multiply_keys(int begin, int block, int count, int first_query) {
    if constexpr (Pages::kIsInt4) scale_columns(block, first_query);
    if constexpr (!kIsPlain) convert_keys(begin, count);
    const uint32_t* columns = panel(first_query);
    const bool has_two = count > kTile;
    const char* tiles[2];
    for (int i = 0; i < 1 + has_two; ++i) {
      tiles[i] = kIsPlain ? reinterpret_cast<const char*>(row_.key(begin + i * kTile))
                          : reinterpret_cast<const char*>(keys_ + i * kTile * kHeadDim / 2);
    }
    AmxProduct::finish_stores();
    for (int from = 0; from < kHeadDim; from += kKeyStretch) {
      _tile_zero(0);
      _tile_zero(1);
#pragma GCC unroll 8
      for (int d = from; d < from + kKeyStretch; d += kDepth) {
        _tile_loadd(5, columns + d / 2 * kTile, kTile * 4);
        _tile_loadd(6, tiles[0] + d * 2, kHeadDim * 2);
        _tile_dpbf16ps(0, 6, 5);
        if (has_two) {
          _tile_loadd(7, tiles[1] + d * 2, kHeadDim * 2);
          _tile_dpbf16ps(1, 7, 5);
        }
      }
      float* out = product_[block][from / kKeyStretch];
      _tile_stored(0, out, kTile * 4);
      _tile_stored(1, out + kTile * kTile, kTile * 4);
    }
    AmxProduct::finish_stores();
  }

  /// logits [queries, kSlots] of a block and a tile of columns
  void store_logits(int block, int count, int first_query, float* logits) {
    if constexpr (kScalesKeys) scale_products(block, count, first_query);
    const float* product = product_[block][0];
    const int num_queries = columns_from(first_query);
    for (int slot = 0; slot < count; slot += kTile) {
      for (int r = 0; r < num_queries; r += 4) {
        U32 sums[4];
        load_columns(product + slot * kTile + r, kTile, sums);
        if constexpr (kParts == 2) {
          U32 seconds[4];
          load_columns(product + slot * kTile + kColumnQueries + r, kTile, seconds);
          for (int i = 0; i < 4; ++i) {
            sums[i] = (U32)((F32)sums[i] + (F32)seconds[i] + constants_[block][r + i]);
          }
        }
        for (int i = 0; i < 4 && r + i < num_queries; ++i) {
          store(logits + (first_query + r + i) * kSlots + slot, (F32)sums[i]);
        }
      }
    }
  }

  /// Products [stretch, slot, query] with codes become those with keys [slot, query].
  void scale_products(int block, int count, int first_query) {
    for (int i = 0; i < count; ++i) {
      F32 total = {};
      for (int g = 0; g < kStretches; ++g) {
        const float* numbers = scales_[block].keys + i * row_.width + g * Pages::kNumbers;
        total += load(product_[block][g] + i * kTile) * numbers[0];
        if constexpr (Pages::kHasZero) total += load(query_sums_[g] + first_query) * numbers[1];
      }
      store(product_[block][0] + i * kTile, total);
    }
  }

  /// weights [queries, kSlots] times the values into fresh_; whether all of it is finite.
  bool multiply_values(int count, const float* weights) {
    U32 largest = {};
    const int num_blocks = (count + kBlockSlots - 1) / kBlockSlots;
    for (int from = 0; from < kHeadDim; from += kStretch) {
      for (int first = 0; first < span_.num_queries; first += kRowQueries) {
        const int left = span_.num_queries - first;
        const int rows = left < kRowQueries ? left : kRowQueries;
        float zeros[kRowQueries] = {};
        for (int i = 0; i < num_blocks; ++i) {
          for (int r = 0; r < rows; ++r) {
            const float* of_query = weights + (first + r) * kSlots + i * kBlockSlots;
            zeros[r] += set_weights(i, from, in_block(i, count), of_query, r);
          }
        }
        AmxProduct::finish_stores();
        for (int d = from; d < from + kStretch; d += 4 * kTile) {
          multiply_tiles(num_blocks, d, rows, zeros, fresh_ + first * kHeadDim + d, largest);
        }
      }
    }
    return _mm512_cmpge_epu32_mask((__m512i)largest, _mm512_set1_epi32(0x7f800000)) == 0;
  }

  /// The two rows of a query's weights, multiplied by the scales of values; returns what is added to
  /// all dimensions.
  float set_weights(int block, int from, int count, const float* weights, int r) {
    alignas(64) float scaled[kBlockSlots];
    float zero = 0;
    if constexpr (!kIsPlain) {
      const int group = from / kScaleGroup;
      const float* numbers = scales_[block].values + group * Pages::kNumbers * kBlockSlots;
      scale_weights<1, Pages>(numbers, count, weights, scaled, &zero);
      weights = scaled;
    }
    const F32 x = load(weights), y = load(weights + kLanes);
    const F32 high_x = (F32)((U32)x & 0xffff0000u), high_y = (F32)((U32)y & 0xffff0000u);
    const __m512bh high = _mm512_cvtne2ps_pbh((__m512)high_y, (__m512)high_x);
    const __m512bh low = _mm512_cvtne2ps_pbh((__m512)(y - high_y), (__m512)(x - high_x));
    __builtin_memcpy(weights_[block] + r * kTile, &high, sizeof high);
    __builtin_memcpy(weights_[block] + (kRowQueries + r) * kTile, &low, sizeof low);
    return zero;
  }

  /// Four tiles of values from dimension d on times the weights.
  void multiply_tiles(
      int num_blocks, int d, int rows, const float* zeros, float* out, U32& largest) {
    alignas(64) float result[kTile * 4 * kTile];
    constexpr int kWidth = 4 * kTile;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int block = 0; block < num_blocks; ++block) {
      const uint32_t* values = values_[block] + d * kTile;
      _tile_loadd(4, weights_[block], kTile * 4);
      _tile_loadd(5, values, kTile * 4);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, values + kTile * kTile, kTile * 4);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, values + 2 * kTile * kTile, kTile * 4);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, values + 3 * kTile * kTile, kTile * 4);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, result, kWidth * 4);
    _tile_stored(1, result + kTile, kWidth * 4);
    _tile_stored(2, result + 2 * kTile, kWidth * 4);
    _tile_stored(3, result + 3 * kTile, kWidth * 4);
    AmxProduct::finish_stores();
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; i += kLanes) {
        const F32 sum = load(result + r * kWidth + i) +
                        load(result + (kRowQueries + r) * kWidth + i) + zeros[r];
        store(out + r * kHeadDim + i, sum);
        largest = (U32)_mm512_max_epu32((__m512i)largest, (__m512i)((U32)sum & 0x7fffffffu));
      }
    }
  }

  static constexpr int kLocality = 2;  // of prefetches: the second cache

  const AmxProduct::Session session_;
  const AttendSpan& span_;
  const Pages& row_;
  const float* queries_;
  alignas(64) uint32_t panel_[kPanels * kPairs * kTile];                      // [D / 2, 16] each
  alignas(64) uint32_t keys_[kIsPlain ? 1 : kBlockSlots * kPairs];            // [32, D / 2]
  alignas(64) uint32_t values_[kBlocks][kTile * kHeadDim];                    // [D / 16, 16, 16]
  alignas(64) uint32_t weights_[kBlocks][kTile * kTile];                      // [16, 32 / 2]
  alignas(64) float product_[kBlocks][kStretches][kBlockSlots * kTile] = {};  // [32, 16] each
  alignas(64) float fresh_[kMaxSpanQueries * kHeadDim];                       // [queries, D]
  alignas(64) float query_sums_[kStretches][kMaxSpanQueries] = {};
  float constants_[kBlocks][kTile] = {};
  Scales scales_[kBlocks];
};

}  // namespace adakv::ADAKV_ISA
