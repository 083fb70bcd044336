// attend_span: a few queries of one row over its pages, by online softmax.
//
//   for each block of 32 slots:  logits = q . k;  p = exp(logits - max)
//                                acc = acc * exp(old max - max) + sum of p * v
//
// Up to four queries go through a block together, so that each key and value is widened once for
// all of them. Decoding is bound by memory, so while the keys of a block are read its values are
// asked for, and while those are read the next block's keys: one cache line for each vector used,
// to spread the requests evenly.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/simd_pages.h"

namespace adakv::ADAKV_ISA {

constexpr int kQueriesAtOnce = 4;
constexpr int kSlotsAtOnce =
    kNumRegisters == 32 ? 4 : 2;  // 4 x kSlotsAtOnce sums stay in registers

/// queries [kRows, stride] times the scales of a page's keys, and their products with the zeros.
template <int kRows>
inline void scale_queries(
    const float* queries, int stride, const float* scales, float* scaled, float* constants) {
  for (int r = 0; r < kRows; ++r) {
    F32 sums = {};
    for (int d = 0; d < stride; d += kLanes) {
      const F32 q = load(queries + r * stride + d);
      store(scaled + r * stride + d, q * load(scales + d));
      sums += q * load(scales + kMaxHeadDim + d);
    }
    constants[r] = sum(sums);
  }
}

/// Keys that dot_keys takes in one go: so many that their sums with kRows queries stay in registers,
/// and at most a group of slots, which lies in one page.
template <int kRows>
constexpr int kKeysAtOnce = kRows == 1                            ? kSlotGroup
                            : kRows == 2 && kSlotsAtOnce * 2 <= 8 ? kSlotsAtOnce * 2
                                                                  : kSlotsAtOnce;

/// The products of kRows queries with kSlotsAtOnce keys, of which `scales` has the numbers, lane by
/// lane, kKeysAtOnce apart from query to query; fetches as many entries from `ahead` on, of so many
/// dimensions. One loop without a function around its body, so that the sums stay in registers.
template <int kRows, bool kFetch, typename Pages>
inline void multiply_keys(const float* queries,
                          int stride,
                          const typename Pages::Key* keys,
                          int head_dim,
                          const typename Pages::Code* ahead,
                          int ahead_dims,
                          const float* scales,
                          int width,
                          F32* lanes) {
  // Few sums wait for their own last addition: then both halves of a pair have one.
  constexpr int kHalves = kRows * kSlotsAtOnce <= 4 ? 2 : 1;
  F32 sums[kRows * kSlotsAtOnce * kHalves];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kSlotsAtOnce * kHalves; ++i) sums[i] = F32{};
  for (int d = 0; d < head_dim; d += kPair) {
    F32Pair k[kSlotsAtOnce];
#pragma GCC unroll 4
    for (int i = 0; i < kSlotsAtOnce; ++i) {
      const auto* codes = keys + (i * head_dim + d) / Pages::kKeyDims;
      const F32Pair loaded =
          head_dim - d >= kPair ? load_pair(codes) : load_pair(codes, head_dim - d);
      k[i] = Pages::number(loaded, Pages::numbers(scales + i * width, d));
      if (kFetch && d % Pages::kLine == 0 && d < ahead_dims) {
        __builtin_prefetch(ahead + (i * ahead_dims + d) / Pages::kDims);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F32Pair q = load_pair(queries + r * stride + d);
#pragma GCC unroll 4
      for (int i = 0; i < kSlotsAtOnce; ++i) {
        F32* sum = sums + (r * kSlotsAtOnce + i) * kHalves;
        sum[0] += q.first * k[i].first;
        sum[kHalves - 1] += q.second * k[i].second;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kSlotsAtOnce; ++i) {
      const F32* sum = sums + (r * kSlotsAtOnce + i) * kHalves;
      lanes[r * kKeysAtOnce<kRows> + i] = kHalves == 2 ? sum[0] + sum[1] : sum[0];
    }
  }
}

/// logits[r][i] = query r . key i, for kKeysAtOnce keys in a row, of which `scales` has the numbers;
/// fetches their values.
template <int kRows, bool kFetch, typename Pages>
inline void dot_keys(const float* queries,
                     int stride,
                     const Pages& row,
                     int slot,
                     const float* scales,
                     float* logits) {
  constexpr int kKeys = kKeysAtOnce<kRows>;
  constexpr int kVectors = (kRows * kKeys + kLanes - 1) / kLanes;
  F32 lanes[kVectors * kLanes];
  for (int i = kRows * kKeys; i < kVectors * kLanes; ++i) lanes[i] = F32{};
  const auto* keys = row.key(slot);
  for (int i = 0; i < kKeys; i += kSlotsAtOnce) {
    multiply_keys<kRows, kFetch, Pages>(queries, stride, keys + i * row.key_pitch, row.head_dim,
                                        row.ahead(slot) + i * row.value_pitch, row.value_dim,
                                        scales + i * row.width, row.width, lanes + i);
  }
  float totals[kVectors * kLanes];
  for (int i = 0; i < kVectors; ++i) {
    store(totals + i * kLanes, sum_each(reinterpret_cast<F32(&)[kLanes]>(lanes[i * kLanes])));
  }
  for (int r = 0; r < kRows; ++r) {
    __builtin_memcpy(logits + r * kBlockSlots, totals + r * kKeys, kKeys * sizeof(float));
  }
}

/// What a block's weights become for codes of a group whose slots have these numbers: weights *
/// scale in `scaled`, and in `zeros` what all of its dimensions get, the sum of weights * zero.
template <int kRows, typename Pages>
inline void scale_weights(
    const float* numbers, int count, const float* weights, float* scaled, float* zeros) {
  for (int r = 0; r < kRows; ++r) {
    F32 sums = {};
    for (int i = 0; i < kBlockSlots; i += kLanes) {
      const F32 p = load(weights + r * kBlockSlots + i);
      const I32 is_there = (lane_numbers() + i < count) & (p != F32{});  // not 0 * NaN
      store(scaled + r * kBlockSlots + i, p * choose(is_there, load(numbers + i), F32{}));
      if constexpr (Pages::kHasZero) {
        sums += p * choose(is_there, load(numbers + kBlockSlots + i), F32{});
      }
    }
    zeros[r] = Pages::kHasZero ? sum(sums) : 0.f;
  }
}

/// acc[r] = acc[r] * correction[r] + sum over the slots of weights[r] * value, whose numbers are
/// `scales` [width, slot]; fetches the keys of the block behind, up to `last`.
template <int kRows, bool kFetch, typename Pages>
inline void add_values(const Pages& row,
                       int begin,
                       int end,
                       int last,
                       const float* scales,
                       const float* weights,
                       const float* correction,
                       float* acc,
                       int stride) {
  using Code = typename Pages::Code;
  const int value_dim = row.value_dim;
  alignas(64) float scaled[Pages::kHasScales ? kRows * kBlockSlots : 1];
  float zeros[kRows] = {};
  const auto step = [&](int d, auto num_pairs, auto load_values) __attribute__((always_inline)) {
    constexpr int kPairs = decltype(num_pairs)::value;
    // Of a line of codes each step asks for those of other slots.
    constexpr int kWidth = kPairs * kPair;
    constexpr int kSteps = Pages::kLine / kWidth > 1 ? Pages::kLine / kWidth : 1;
    const int in_line = d % Pages::kLine, first_slot = in_line / kWidth;
    F32Pair sums[kRows * kPairs];  // of this block: long chains of additions would cost accuracy
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kPairs; ++i) {
      sums[i] = {broadcast(zeros[i / kPairs]), broadcast(zeros[i / kPairs])};
    }
    for (int group = begin; group < end; group += kSlotGroup) {
      const Code* values = row.value(group) + d / Pages::kDims;
      const Code* next = group + kBlockSlots < last
                             ? row.behind_values(group) + (d - in_line) / Pages::kDims
                             : values;
      const int count = end - group < kSlotGroup ? end - group : kSlotGroup;
      const float* p = (Pages::kHasScales ? scaled : weights) + (group - begin);
      for (int i = 0; i < count; ++i) {
        F32Pair v[kPairs];
#pragma GCC unroll 4
        for (int j = 0; j < kPairs; ++j) {
          v[j] = load_values(values + i * row.value_pitch + j * kPair / Pages::kDims);
        }
        if (kFetch && i % kSteps == first_slot) {
#pragma GCC unroll 4
          for (int j = 0; j < kWidth; j += Pages::kLine) {
            __builtin_prefetch(next + i * row.key_pitch + j / Pages::kDims);
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int j = 0; j < kPairs; ++j) {
            sums[r * kPairs + j].first += p[r * kBlockSlots + i] * v[j].first;
            sums[r * kPairs + j].second += p[r * kBlockSlots + i] * v[j].second;
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kPairs; ++j) {
        float* out = acc + r * stride + d + j * kPair;
        const F32Pair before = load_pair(out), sum = sums[r * kPairs + j];
        store(out, before.first * correction[r] + sum.first);
        store(out + kLanes, before.second * correction[r] + sum.second);
      }
    }
  };
  for (int first = 0; first < value_dim; first += Pages::kStretch) {
    const int next = first + Pages::kStretch < value_dim ? first + Pages::kStretch : value_dim;
    if constexpr (Pages::kHasScales) {
      const float* numbers = scales + first / Pages::kStretch * Pages::kNumbers * kBlockSlots;
      scale_weights<kRows, Pages>(numbers, end - begin, weights, scaled, zeros);
    }
    int d = first;
    const auto whole = [](const Code* data) { return load_pair(data); };
    constexpr int kPairs = kNumRegisters == 32 ? (kRows == 1 ? 4 : 2) : 1;
    for (; d + kPairs * kPair <= next; d += kPairs * kPair) {
      step(d, std::integral_constant<int, kPairs>{}, whole);
    }
    if constexpr (kPairs > 1) {
      for (; d + kPair <= next; d += kPair) step(d, std::integral_constant<int, 1>{}, whole);
    }
    if (d < next) {
      step(d, std::integral_constant<int, 1>{},
           [count = next - d](const Code* data) { return load_pair(data, count); });
    }
  }
  if constexpr (!kFetch) return;
  for (int d = value_dim; d < row.head_dim; d += Pages::kLine) {  // what wider keys have more
    for (int slot = begin + kBlockSlots; slot < end + kBlockSlots && slot < last; ++slot) {
      __builtin_prefetch(row.key(slot) + d / Pages::kDims);
    }
  }
}

/// Turns a block's logits of one query into weights, and takes the new maximum and sum. Returns
/// the factor for what was summed up before. Slots from `visible` on hold anything; they get weight
/// 0.
template <int kSlots, bool kHasBiases>
inline float softmax_block(float* logits,
                           const float* biases,
                           int visible,
                           float scale,
                           float softcap,
                           float& max_logit,
                           float& total) {
  F32 largest = broadcast(-kInfinity);
  for (int i = 0; i < kSlots; i += kLanes) {
    F32 z = load(logits + i) * scale;
    if (softcap > 0) z = softcap * tanh(z / softcap);
    if constexpr (kHasBiases) z += load(biases + i);
    z = choose(lane_numbers() + i < visible, z, broadcast(-kInfinity));
    store(logits + i, z);
    largest = max(z, largest);
  }
  const float block_max = max_lane(largest);
  const float new_max = block_max > max_logit ? block_max : max_logit;
  const float base =
      new_max == -kInfinity ? 0.f : new_max;  // nothing seen yet: -inf - -inf would be NaN
  F32 sums = {};
  for (int i = 0; i < kSlots; i += kLanes) {
    const F32 p = exp(load(logits + i) - base);
    store(logits + i, p);
    sums += p;
  }
  const float correction = exp(broadcast(max_logit - base))[0];
  total = total * correction + sum(sums);
  max_logit = new_max;
  return correction;
}

/// The same of a query of a span, with the biases of the block's slots unless these are null.
template <int kSlots>
inline float softmax_block(const AttendSpan& span,
                           float* logits,
                           const float* biases,
                           int visible,
                           float& max_logit,
                           float& total) {
  return biases != nullptr ? softmax_block<kSlots, true>(logits, biases, visible, span.scale,
                                                         span.softcap, max_logit, total)
                           : softmax_block<kSlots, false>(logits, nullptr, visible, span.scale,
                                                          span.softcap, max_logit, total);
}

/// Copies what a block has of `count` slots, mostly all of them.
inline void copy_slots(float* to, const float* from, int count) {
  if (count == kBlockSlots) {
    __builtin_memcpy(to, from, kBlockSlots * sizeof(float));
  } else {
    __builtin_memcpy(to, from, count * sizeof(float));
  }
}

/// One block of slots for kRows queries; see attend_span.
template <int kRows, bool kFetch, typename Pages>
inline void attend_block(const AttendSpan& span,
                         const Pages& row,
                         const typename Pages::Scales& scales,
                         const float* biases,
                         int begin,
                         int end,
                         int first_row,
                         const float* queries,
                         float* acc,
                         int stride) {
  alignas(64) float logits[kRows][kBlockSlots];
  float correction[kRows];
  const float* factors = queries + first_row * stride;
  alignas(64) float scaled[Pages::kIsInt4 ? kRows * kMaxHeadDim : 1];
  float constants[kRows];
  if constexpr (Pages::kIsInt4) {
    scale_queries<kRows>(factors, stride, scales.keys, scaled, constants);
    factors = scaled;
  }
  for (int slot = begin; slot < end; slot += kKeysAtOnce<kRows>) {
    dot_keys<kRows, kFetch>(factors, stride, row, slot, scales.keys + (slot - begin) * row.width,
                            &logits[0][slot - begin]);
  }
  if constexpr (Pages::kIsInt4) {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kBlockSlots; i += kLanes) {
        store(logits[r] + i, load(logits[r] + i) + constants[r]);
      }
    }
  }
  if (span.logits) {
    for (int r = 0; r < kRows; ++r) {
      float* to = span.logits + (first_row + r) * span.logits_stride + (begin - span.begin_slot);
      copy_slots(to, logits[r], end - begin);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const int s = (span.first_query + first_row + r) / span.group;
    const int limit = span.first_visible + s < end ? span.first_visible + s : end;
    correction[r] = softmax_block<kBlockSlots>(span, logits[r], biases, limit - begin,
                                               span.max[first_row + r], span.sum[first_row + r]);
  }
  add_values<kRows, kFetch>(row, begin, end, span.end_slot, scales.values, &logits[0][0],
                            correction, acc + first_row * stride, stride);
}

/// One block of slots for all queries.
template <typename Pages>
inline void attend_queries(const AttendSpan& span,
                           const Pages& row,
                           const typename Pages::Scales& scales,
                           int begin,
                           int block_end,
                           const float* queries,
                           float* acc,
                           int stride) {
  alignas(64) float memory[kBlockSlots];
  const float* biases = fill_biases(span, begin, block_end, memory);
  for (int first = 0; first < span.num_queries; first += kQueriesAtOnce) {
    const int rows =
        span.num_queries - first < kQueriesAtOnce ? span.num_queries - first : kQueriesAtOnce;
    const int last_visible =
        span.first_visible + (span.first_query + first + rows - 1) / span.group;
    const int end = block_end < last_visible ? block_end : last_visible;
    if (end <= begin) continue;
    const auto run = [&](auto num_rows, auto fetches) {
      constexpr bool kFetch = decltype(fetches)::value;
      attend_block<decltype(num_rows)::value, kFetch>(span, row, scales, biases, begin, end, first,
                                                      queries, acc, stride);
    };
    // Few queries behind others fetch again what is there, which costs less than one more loop.
    if (rows == 4 && first > 0) run(std::integral_constant<int, 4>{}, std::false_type{});
    if (rows == 4 && first == 0) run(std::integral_constant<int, 4>{}, std::true_type{});
    if (rows == 3) run(std::integral_constant<int, 3>{}, std::true_type{});
    if (rows == 2) run(std::integral_constant<int, 2>{}, std::true_type{});
    if (rows == 1) run(std::integral_constant<int, 1>{}, std::true_type{});
  }
}

/// The block in a tail, as the one page of a row of its own.
template <typename Tail>
inline void attend_tail(const AttendSpan& span, const float* queries, float* acc, int stride) {
  const int32_t page_id = 0;
  AttendSpan of_tail = span;
  of_tail.keys = span.tail;
  of_tail.values =
      static_cast<const uint16_t*>(span.tail) + int64_t{kTailedPageSize} * span.head_dim;
  of_tail.page_stride = 0;
  of_tail.page_ids = &page_id;
  of_tail.first_visible -= span.tail_begin;
  of_tail.end_slot -= span.tail_begin;
  of_tail.begin_slot = 0;
  if (span.logits) of_tail.logits += span.tail_begin - span.begin_slot;
  attend_queries(of_tail, Tail(of_tail), {}, 0, of_tail.end_slot, queries, acc, stride);
}

/// Takes up to kSlots slots for all queries, where a machine has more than vectors for them. This
/// takes none.
template <typename Pages>
struct NoBlocks {
  static constexpr int kSlots = kBlockSlots;
  NoBlocks(const AttendSpan&, const Pages&, const float*) {}
  bool attend(int, int, float*) { return false; }
};

template <typename Pages, typename Blocks>
void attend_span_by(const AttendSpan& span) {
  using Element = typename Pages::Input;
  using Query = typename Pages::Query;
  const Pages row(span);
  typename Pages::Scales scales;
  const int head_dim = span.head_dim, value_dim = span.value_dim;
  const int widest = head_dim > value_dim ? head_dim : value_dim;
  const int stride = (widest + kPair - 1) / kPair * kPair;  // of acc, too
  alignas(
      64) float queries[kMaxSpanQueries * kMaxHeadDim];  // [num_queries, stride], in Query's order
  alignas(64) float acc[kMaxSpanQueries * kMaxHeadDim];  // [num_queries, stride], in Query's order
  for (int r = 0; r < span.num_queries; ++r) {
    const int query = span.first_query + r;
    const Element* data = static_cast<const Element*>(span.queries) +
                          query / span.group * span.query_token_stride +
                          query % span.group * span.query_head_stride;
    for (int d = 0; d < stride; d += kPair) {
      const int left = head_dim - d;
      const F32Pair q = left >= kPair ? load_pair(data + d)
                        : left > 0    ? load_pair(data + d, left)
                                      : F32Pair{};
      if constexpr (std::is_same_v<Query, Element>) {
        store(queries + r * stride + d, q.first);
        store(queries + r * stride + d + kLanes, q.second);
      } else {
        store_pair<Element>(queries + r * stride + d, q);
      }
      store(acc + r * stride + d, F32{});
      store(acc + r * stride + d + kLanes, F32{});
    }
    span.max[r] = -kInfinity;
    span.sum[r] = 0;
  }

  Blocks blocks(span, row, queries);
  const int paged =
      Pages::kIsInt4 && span.tail_begin < span.end_slot ? span.tail_begin : span.end_slot;
  for (int first = span.begin_slot; first < paged; first += Blocks::kSlots) {
    const int last = first + Blocks::kSlots < paged ? first + Blocks::kSlots : paged;
    if (blocks.attend(first, last, acc)) continue;
    for (int begin = first; begin < last; begin += kBlockSlots) {
      const int end = begin + kBlockSlots < last ? begin + kBlockSlots : last;
      row.fill(scales, begin, end, span.end_slot);
      attend_queries(span, row, scales, begin, end, queries, acc, stride);
    }
  }
  if constexpr (Pages::kIsInt4) {
    if (paged < span.end_slot) attend_tail<typename Pages::Tail>(span, queries, acc, stride);
  }

  for (int r = 0; r < span.num_queries; ++r) {
    for (int d = 0; d < value_dim; d += kPair) {
      float pair[kPair];
      store_pair<Query>(pair, load_pair(acc + r * stride + d));
      const int count = value_dim - d < kPair ? value_dim - d : kPair;
      __builtin_memcpy(span.acc + r * value_dim + d, pair, count * sizeof(float));
    }
  }
}

template <typename Pages>
void attend_span(const AttendSpan& span) {
  attend_span_by<Pages, NoBlocks<Pages>>(span);
}

}  // namespace adakv::ADAKV_ISA
