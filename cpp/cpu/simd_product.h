// Products of two matrices whose rows are both contiguous: c[i, j] = rows[i] . columns[j]. score
// and value_norm are such a product and something done to its result, which stays in a small
// buffer.
//
// The columns are packed once, into panels; any number of rows is then multiplied with them.
//   Product<Element>::kColumns   most columns of a panel
//   pack(columns, stride, count, head_dim, panel)                 panel: kPanelBytes, aligned to 64
//   multiply(panel, count, rows, stride, num_rows, head_dim, c)   c: [num_rows, stride_of(count)]
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace adakv::ADAKV_ISA {

/// Columns of a panel's result, with those that fill up the last vector.
constexpr int stride_of(int count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

/// By fused multiply-adds in float32: six rows times up to four vectors of columns at once.
template <typename Element>
struct VectorProduct {
  static constexpr int kVectors = kNumRegisters == 32 ? 4 : 2;
  static constexpr int kColumns = kVectors * kLanes;
  static constexpr int kRows = 6;
  static constexpr int kPart = 64;
  static constexpr int kPanelBytes = kMaxHeadDim * kColumns * 4;

  /// Makes a thread ready for multiply, and undoes it.
  struct Session {};

  static int padded(int head_dim) { return (head_dim + kPair - 1) / kPair * kPair; }

  static void widen(const Element* row, int head_dim, float* out) {
    int d = 0;
    for (; d + kPair <= head_dim; d += kPair) {
      const F32Pair pair = load_pair(row + d);
      store(out + d, pair.first);
      store(out + d + kLanes, pair.second);
    }
    if (d < head_dim) {
      const F32Pair pair = load_pair(row + d, head_dim - d);
      store(out + d, pair.first);
      store(out + d + kLanes, pair.second);
    }
  }

  /// panel: [padded(head_dim), stride_of(count)] float32, the dimension in load_pair's order.
  static void pack(const Element* columns, int64_t stride, int count, int head_dim, void* panel) {
    float* out = static_cast<float*>(panel);
    const int width = stride_of(count);
    float column[kMaxHeadDim];
    for (int j = 0; j < width; ++j) {
      if (j < count) {
        widen(columns + j * stride, head_dim, column);
      } else {
        __builtin_memset(column, 0, sizeof column);
      }
      for (int d = 0; d < padded(head_dim); ++d) out[d * width + j] = column[d];
    }
  }

  /// Sums of 64 products at a time: long chains of additions would cost accuracy.
  template <int kUsed>
  static void multiply_six(
      const float* panel, const float* rows, int depth, int num_rows, float* c) {
    multiply_part<kUsed, false>(panel, rows, depth < kPart ? depth : kPart, num_rows, c);
    for (int d = kPart; d < depth; d += kPart) {
      const float* columns = panel + d * kUsed * kLanes;
      multiply_part<kUsed, true>(columns, rows + d, depth - d < kPart ? depth - d : kPart, num_rows,
                                 c);
    }
  }

  template <int kUsed, bool kAdds>
  static void multiply_part(
      const float* panel, const float* rows, int depth, int num_rows, float* c) {
    F32 sums[kRows][kUsed] = {};
    for (int d = 0; d < depth; ++d) {
      F32 column[kUsed];
#pragma GCC unroll 4
      for (int v = 0; v < kUsed; ++v) column[v] = load(panel + (d * kUsed + v) * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const F32 x = broadcast(rows[r * kMaxHeadDim + d]);
#pragma GCC unroll 4
        for (int v = 0; v < kUsed; ++v) sums[r][v] += x * column[v];
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      if (r >= num_rows) break;
#pragma GCC unroll 4
      for (int v = 0; v < kUsed; ++v) {
        float* out = c + (r * kUsed + v) * kLanes;
        store(out, kAdds ? load(out) + sums[r][v] : sums[r][v]);
      }
    }
  }

  static void multiply(const void* panel,
                       int count,
                       const Element* rows,
                       int64_t stride,
                       int num_rows,
                       int head_dim,
                       float* c) {
    const float* columns = static_cast<const float*>(panel);
    const int used = stride_of(count) / kLanes;
    alignas(64) float wide[kRows * kMaxHeadDim] = {};
    for (int first = 0; first < num_rows; first += kRows) {
      const int now = num_rows - first < kRows ? num_rows - first : kRows;
      for (int r = 0; r < now; ++r)
        widen(rows + (first + r) * stride, head_dim, wide + r * kMaxHeadDim);
      float* out = c + first * used * kLanes;
      if (used == 1) multiply_six<1>(columns, wide, padded(head_dim), now, out);
      if (used == 2) multiply_six<2>(columns, wide, padded(head_dim), now, out);
      if constexpr (kVectors == 4) {
        if (used == 3) multiply_six<3>(columns, wide, padded(head_dim), now, out);
        if (used == 4) multiply_six<4>(columns, wide, padded(head_dim), now, out);
      }
    }
  }
};

template <typename Element>
struct ProductOf {
  using Type = VectorProduct<Element>;
};

template <typename Element>
using Product = typename ProductOf<Element>::Type;

}  // namespace adakv::ADAKV_ISA
