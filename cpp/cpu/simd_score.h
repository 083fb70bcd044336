// The two passes of score over some keys of a row, for one q head: the softmax's maximum and sum
// for each query of the window, then the probabilities, reduced over the window. Lanes are queries
// of the window; keys come in blocks.
#pragma once

#include "cpu/float16.h"
#include "cpu/simd_product.h"

namespace adakv::ADAKV_ISA {

constexpr int kBlockKeys = 96;
constexpr int kSums = 8;  // side by side: long chains of additions would cost accuracy, and time

inline F32 cap_logits(F32 dots, float scale, float softcap) {
  const F32 z = dots * scale;
  return softcap > 0 ? softcap * tanh(z / softcap) : z;
}

/// Keys of the span that a query sees: those before its limit, 0 or less if none.
inline int key_limit(const ScoreSpan& span, int query) {
  const int limit = span.first_visible + query * span.stride;
  return limit < span.num_keys ? limit : span.num_keys;
}

/// Codes as elements: x = scale * code + zero, or scale * code.
template <typename Code, typename Element>
inline void dequantise(const Code* codes, const Element* scales, int head_dim, Element* out) {
  constexpr int kNumbers = std::is_same_v<Code, Float8> ? 1 : 2;
  constexpr float kUnit = kNumbers == 2 ? 1.f : 0x1p8f;  // of load_pair(const Code*)
  alignas(64) float wide[kMaxHeadDim + kPair], numbers[kPair];
  Element narrow[kPair] = {};
  __builtin_memcpy(narrow, scales,
                   (head_dim + kScaleGroup - 1) / kScaleGroup * kNumbers * sizeof(Element));
  const F32Pair of_groups = load_in_order(narrow);
  store(numbers, of_groups.first);
  store(numbers + kLanes, of_groups.second);
  for (int d = 0; d < head_dim; d += kPair) {
    const F32Pair pair =
        head_dim - d >= kPair ? load_pair(codes + d) : load_pair(codes + d, head_dim - d);
    store(wide + d, pair.first * kUnit);
    store(wide + d + kLanes, pair.second * kUnit);
  }
  for (int d = 0; d < head_dim; ++d) {
    const float* group = numbers + d / kScaleGroup * kNumbers;
    from_float(wide[d] * group[0] + (kNumbers == 2 ? group[1] : 0.f), out[d]);
  }
}

/// Copies keys that a row holds, [count, D], from slot `slot` on.
template <typename Element>
inline void fetch_keys(const ScoreSpan& span, int slot, int count, Element* out) {
  const HeldKeys& held = span.held;
  const int width = held.num_scales;
  for (int i = 0; i < count; ++i, ++slot, out += span.head_dim) {
    const int64_t page = held.page_ids[slot / held.page_size], in_page = slot % held.page_size;
    const int64_t entry = page * held.page_stride + in_page * span.head_dim;
    const int64_t scale = page * held.scale_stride + in_page * width;
    if (held.format == PageFormat::kPlain) {
      __builtin_memcpy(out, static_cast<const Element*>(held.pages) + entry,
                       span.head_dim * sizeof(Element));
    } else if constexpr (sizeof(Element) == 2) {
      const Element* scales = static_cast<const Element*>(held.scales) + scale;
      if (held.format == PageFormat::kInt8) {
        dequantise(static_cast<const Int8Code*>(held.pages) + entry, scales, span.head_dim, out);
      } else {
        dequantise(static_cast<const Float8*>(held.pages) + entry, scales, span.head_dim, out);
      }
    }
  }
}

/// Calls body(block of logits [num_keys, stride], first key, number of keys, first query, number of
/// queries) for the blocks with a key that one of the queries sees.
template <typename Element, typename Body>
inline void for_each_block(const ScoreSpan& span, Body body) {
  using P = Product<Element>;
  const typename P::Session session;
  (void)session;
  alignas(64) char panel[P::kPanelBytes];
  alignas(64) float logits[kBlockKeys * P::kColumns];
  alignas(64) Element fetched[kBlockKeys * kMaxHeadDim];
  const Element* keys = static_cast<const Element*>(span.keys);
  const Element* queries = static_cast<const Element*>(span.queries);
  for (int first = 0; first < span.window; first += P::kColumns) {
    const int count = span.window - first < P::kColumns ? span.window - first : P::kColumns;
    const int end = key_limit(span, first + count - 1);
    if (end <= 0) continue;
    P::pack(queries + first * span.query_stride, span.query_stride, count, span.head_dim, panel);
    for (int key = 0; key < end; key += kBlockKeys) {
      const int num_keys = end - key < kBlockKeys ? end - key : kBlockKeys;
      const Element* block = keys + key * span.key_stride;
      if (keys == nullptr) {
        fetch_keys(span, span.first_slot + key, num_keys, fetched);
        block = fetched;
      }
      P::multiply(panel, count, block, keys == nullptr ? span.head_dim : span.key_stride, num_keys,
                  span.head_dim, logits);
      body(logits, key, num_keys, first, count);
    }
  }
}

/// key_limit of queries first, first + 1, ...
inline I32 visible_keys(const ScoreSpan& span, int first) {
  return (lane_numbers() + first) * span.stride + span.first_visible;
}

template <typename Element>
void score_sums(const ScoreSpan& span) {
  const int padded = stride_of(span.window);
  for (int w = 0; w < padded; ++w) span.max[w] = -kInfinity;
  for (int w = 0; w < padded; ++w) span.sum[w] = 0;
  for_each_block<Element>(span, [&](float* logits, int key, int num_keys, int query, int count) {
    const int stride = stride_of(count);
    const bool sees_all = key + num_keys <= key_limit(span, query);
    for (int lane = 0; lane < stride; lane += kLanes) {
      const I32 visible = visible_keys(span, query + lane);
      const F32 old_max = load(span.max + query + lane);
      F32 largest = old_max;
      for (int i = 0; i < num_keys; ++i) {
        F32 z = cap_logits(load(logits + i * stride + lane), span.scale, span.softcap);
        if (!sees_all) z = choose(visible > key + i, z, broadcast(-kInfinity));
        store(logits + i * stride + lane, z);
        largest = max(z, largest);
      }
      const F32 base =
          choose(largest == -kInfinity, F32{}, largest);  // nothing seen: -inf - -inf would be NaN
      F32 sums[kSums] = {};
      for (int i = 0; i < num_keys; ++i)
        sums[i % kSums] += exp(load(logits + i * stride + lane) - base);
      for (int step = kSums / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
      }
      store(span.max + query + lane, largest);
      store(span.sum + query + lane, load(span.sum + query + lane) * exp(old_max - base) + sums[0]);
    }
  });
}

/// kTakesMax: over the window, else sums. The largest probability is that of the largest logit - lse.
template <bool kTakesMax>
inline F32 take(F32 taken, F32 z) {
  return kTakesMax ? max(z, taken) : taken + exp(z);
}

/// Each lane keeps its own maximum or sum of a key, over the queries that come its way; they are
/// joined once, at the end.
template <typename Element, bool kTakesMax>
void reduce_window(const ScoreSpan& span) {
  const F32 nothing = kTakesMax ? broadcast(-kInfinity) : F32{};
  const int padded = stride_of(span.num_keys);
  for (int i = 0; i < padded * kLanes; i += kLanes) store(span.lanes + i, nothing);
  for_each_block<Element>(
      span, [&](const float* logits, int key, int num_keys, int query, int count) {
        const int stride = stride_of(count);
        const bool sees_all = key + num_keys <= key_limit(span, query);
        for (int i = 0; i < num_keys; ++i) {
          float* own = span.lanes + (key + i) * kLanes;
          F32 taken = load(own);
          for (int lane = 0; lane < stride; lane += kLanes) {
            F32 z = cap_logits(load(logits + i * stride + lane), span.scale, span.softcap) -
                    load(span.lse + query + lane);
            if (!sees_all)
              z = choose(visible_keys(span, query + lane) > key + i, z, broadcast(-kInfinity));
            taken = take<kTakesMax>(taken, z);
          }
          store(own, taken);
        }
      });
  for (int first = 0; first < padded; first += kLanes) {
    F32 lanes[kLanes];  // of one key each
    for (int i = 0; i < kLanes; ++i) lanes[i] = load(span.lanes + (first + i) * kLanes);
    F32 scores = {};
    if (kTakesMax) {
      for (int i = 0; i < kLanes; ++i) scores[i] = max_lane(lanes[i]);
      scores = exp(scores);
    } else {
      scores = sum_each(lanes);
    }
    store(span.scores + first, scores);
  }
}

template <typename Element>
void score_window(const ScoreSpan& span) {
  span.takes_max ? reduce_window<Element, true>(span) : reduce_window<Element, false>(span);
}

}  // namespace adakv::ADAKV_ISA
