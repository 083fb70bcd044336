// The arithmetic of the model outside of adakv: float32, on OpenMP threads.
#pragma once

#include <cstdint>

namespace embed {

/// A matrix [rows, cols] whose rows are `stride` apart.
struct Matrix {
  float* data;
  int64_t rows, cols, stride;

  Matrix(float* data, int64_t rows, int64_t cols) : Matrix(data, rows, cols, cols) {}
  Matrix(float* data, int64_t rows, int64_t cols, int64_t stride)
      : data(data), rows(rows), cols(cols), stride(stride) {}
};

/// y [rows, n] = x [rows, k] w [n, k]^T, or y += with `add`. One row reads each weight once
/// (decode); several go through packed tiles (prefill).
void matmul(const Matrix& x, const float* w, const Matrix& y, bool add = false);

/// y [rows, n] = x * weight / sqrt(mean(x^2) + eps), row by row.
void rms_norm(const float* x, const float* weight, int64_t rows, int64_t n, float eps, float* y);

/// gate = gate * sigmoid(gate) * up.
void silu_times(float* gate, const float* up, int64_t size);

/// Turns each head of `rows` rows of `heads` heads [D] by its position: element i with i + D / 2 by
/// the angle position * frequencies[i]. The first row is at `position`.
void rope(float* x,
          int64_t rows,
          int64_t heads,
          int64_t head_dim,
          int64_t position,
          const float* frequencies);

/// Causal attention of a prompt with itself. queries [T, Hq * D] become the result; keys and values
/// are [T, Hkv * D]. q head q reads kv head q / (Hq / Hkv).
void attend_prompt(float* queries,
                   const float* keys,
                   const float* values,
                   int64_t tokens,
                   int64_t heads,
                   int64_t kv_heads,
                   int64_t head_dim);

}  // namespace embed
