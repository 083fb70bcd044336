// || v Wo ||_1 of some entries for one q head: blocks of the product of Wo's rows with the values,
// whose absolute values are added up as they come. Lanes are entries.
//
// The other norm, sqrt(v G v^T), takes G = mean of Wo Wo^T, made first: panels of kPair columns,
// both dimensions in load_pair's order.
#pragma once

#include "cpu/simd_product.h"

namespace adakv::ADAKV_ISA {

constexpr int kBlockOutputs = 96;

template <typename Element>
void value_norm_span(const ValueNormSpan& span) {
  using P = Product<Element>;
  const typename P::Session session;
  (void)session;
  alignas(64) char panel[P::kPanelBytes];
  alignas(64) float product[kBlockOutputs * P::kColumns];
  const Element* values = static_cast<const Element*>(span.values);
  const Element* w_o = static_cast<const Element*>(span.w_o);
  for (int first = 0; first < span.num_values; first += P::kColumns) {
    const int count = span.num_values - first < P::kColumns ? span.num_values - first : P::kColumns;
    const int stride = stride_of(count);
    P::pack(values + first * span.value_stride, span.value_stride, count, span.head_dim, panel);
    F32 sums[P::kColumns / kLanes] = {};
    for (int e = 0; e < span.width; e += kBlockOutputs) {
      const int num_outputs = span.width - e < kBlockOutputs ? span.width - e : kBlockOutputs;
      P::multiply(panel, count, w_o + e * span.w_o_stride, span.w_o_stride, num_outputs,
                  span.head_dim, product);
      for (int lane = 0; lane < stride; lane += kLanes) {
        F32 block_sum = {};
        for (int i = 0; i < num_outputs; ++i) block_sum += abs(load(product + i * stride + lane));
        sums[lane / kLanes] += block_sum;
      }
    }
    for (int lane = 0; lane < stride; lane += kLanes)
      store(span.norms + first + lane, sums[lane / kLanes]);
  }
}

template <typename Element>
void gram_span(const GramSpan& span) {
  constexpr int kRowsAtOnce = 8;
  const Element* w_o = static_cast<const Element*>(span.w_o);
  const int padded = VectorProduct<Element>::padded(span.head_dim);
  const float factor = 1.f / static_cast<float>(span.group);
  __builtin_memset(span.gram, 0, sizeof(float) * padded * padded);
  alignas(64) float rows[kRowsAtOnce][kMaxHeadDim];
  for (int part = 0; part < span.group * span.width; part += kRowsAtOnce) {
    const int count =
        span.group * span.width - part < kRowsAtOnce ? span.group * span.width - part : kRowsAtOnce;
    __builtin_memset(rows, 0, sizeof rows);
    for (int i = 0; i < count; ++i) {
      const int q = (part + i) / span.width, e = (part + i) % span.width;
      VectorProduct<Element>::widen(w_o + e * span.w_o_stride + q * span.head_dim, span.head_dim,
                                    rows[i]);
    }
    for (int column = 0; column < padded; column += kPair) {
      F32Pair w[kRowsAtOnce];
      for (int i = 0; i < kRowsAtOnce; ++i) w[i] = load_pair(rows[i] + column);
      for (int d = 0; d < padded; ++d) {
        float* out = span.gram + column * padded + d * kPair;
        F32Pair sum = load_pair(out);
        for (int i = 0; i < kRowsAtOnce; ++i) {
          sum.first += rows[i][d] * w[i].first;
          sum.second += rows[i][d] * w[i].second;
        }
        store(out, sum.first);
        store(out + kLanes, sum.second);
      }
    }
  }
  for (int i = 0; i < padded * padded; ++i) span.gram[i] *= factor;
}

template <typename Element>
void gram_norm_span(const GramNormSpan& span) {
  using P = VectorProduct<Element>;
  const Element* values = static_cast<const Element*>(span.values);
  const int padded = P::padded(span.head_dim);
  alignas(64) float rows[P::kRows * kMaxHeadDim] = {};
  alignas(64) float product[P::kRows * kPair];
  for (int first = 0; first < span.num_values; first += P::kRows) {
    const int count = span.num_values - first < P::kRows ? span.num_values - first : P::kRows;
    F32 sums[P::kRows] = {};
    for (int r = 0; r < count; ++r) {
      P::widen(values + (first + r) * span.value_stride, span.head_dim, rows + r * kMaxHeadDim);
    }
    for (int column = 0; column < padded; column += kPair) {
      P::template multiply_six<2>(span.gram + column * padded, rows, padded, count, product);
      for (int r = 0; r < count; ++r) {
        const F32Pair v = load_pair(rows + r * kMaxHeadDim + column);
        sums[r] +=
            load(product + r * kPair) * v.first + load(product + r * kPair + kLanes) * v.second;
      }
    }
    for (int r = 0; r < count; ++r) {
      const float square = sum(sums[r]);
      span.norms[first + r] = __builtin_sqrtf(square > 0 ? square : 0.f);
    }
  }
}

}  // namespace adakv::ADAKV_ISA
