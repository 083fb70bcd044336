// What the kernels of score's columns share: those for any device (columns.cu) and those for sm_90
// (sm90/columns.cu).
#pragma once

#include "score/keys.cuh"
#include "score/score.cuh"

namespace adakv {

struct ColumnParams {
  ScoreParams score;  // window: last positions, which don't compete; parts: [B, Hq, T]
  float* lse;         // [B, Hq, padded]: log-sum-exp of z; +inf for queries that don't exist
  int32_t num_queries, padded;
  int32_t stride, distance;
  bool is_mean;  // over the window
};

constexpr int64_t kColumnPadding = 256;  // queries are padded to a multiple of this

/// A q head of a sequence, the place of a CTA in grid [tiles, Hq, B].
struct ColumnHead {
  int32_t b, q, h, seq_len, candidates;

  __device__ explicit ColumnHead(const ScoreParams& params) {
    q = blockIdx.y;
    b = blockIdx.z;
    h = q / params.group;
    seq_len = row_length(params, b, h);
    candidates = seq_len - params.window;
  }

  __device__ int64_t index(const ScoreParams& params) const {
    return int64_t{b} * params.kv_heads * params.group + q;
  }

  __device__ int32_t position(const ColumnParams& params, int32_t query) const {
    return seq_len - 1 - (params.num_queries - 1 - query) * params.stride;
  }

  /// The first query that counts for an entry.
  __device__ int32_t first_query(const ColumnParams& params, int32_t t) const {
    const int32_t behind = seq_len - 1 - params.distance - t;  // of the last query
    if (behind < 0) return params.num_queries;
    return max(params.num_queries - 1 - behind / params.stride, 0);
  }

  template <typename Element>
  __device__ const Element* query(const ColumnParams& params, int32_t w) const {
    if (w >= params.num_queries) return nullptr;
    const int64_t* stride = params.score.query_stride;
    return static_cast<const Element*>(params.score.queries) + b * stride[0] + q * stride[1] +
           w * stride[2];
  }

  template <typename Element>
  __device__ KeyRow<Element> key(const ColumnParams& params, int32_t t) const {
    if (t >= seq_len) return {};
    return key_row<Element>(params.score, b, h, t);
  }

  /// The same where keys are in a tensor.
  template <typename Element>
  __device__ const Element* key_of_tensor(const ColumnParams& params, int32_t t) const {
    if (t >= seq_len) return nullptr;
    const int64_t* stride = params.score.key_stride;
    return static_cast<const Element*>(params.score.keys) + b * stride[0] + h * stride[1] +
           t * stride[2];
  }

  __device__ float* lse(const ColumnParams& params) const {
    return params.lse + index(params.score) * params.padded;
  }

  __device__ bool has_query(const ColumnParams& params, int32_t w) const {
    return w < params.num_queries && position(params, w) >= 0;
  }

  /// Takes the lse that were given of queries first .. first + count - 1, by all threads of a CTA.
  __device__ void take_lse(const ColumnParams& params, int32_t first, int32_t count) const {
    const ScoreParams& score = params.score;
    const float* given = score.lse + b * score.lse_stride[0] + q * score.lse_stride[1];
    for (int32_t w = first + threadIdx.x; w < first + count; w += blockDim.x) {
      lse(params)[w] = has_query(params, w) ? given[w] * kLog2e : INFINITY;
    }
  }

  /// Stores a query's lse, made from the maximum and the sum over all entries.
  __device__ void put_lse(const ColumnParams& params, int32_t w, float2 sum) const {
    const float* sinks = params.score.sink_logits;
    if (sinks) sum = join(sum, {sinks[q] * kLog2e, 1.f});
    lse(params)[w] = has_query(params, w) ? sum.x + log2f(sum.y) : INFINITY;
  }

  /// Stores an entry's column: its highest z, or the sum of its probabilities.
  __device__ void put_column(const ColumnParams& params, int32_t t, bool is_max, float x) const {
    if (t >= candidates) return;
    if (is_max) x = fast_exp2(x);
    if (params.is_mean) x /= max(params.num_queries - first_query(params, t), 1);
    params.score.parts[index(params.score) * params.score.length + t] = x;
  }
};

/// The kernels of sm90/columns.cu: D 64 or 128 of 16 bits, no cap.
bool sm90_score_columns_fits(const ScoreArgs& args);
void sm90_score_columns(const ScoreArgs& args, const ColumnParams& params);

}  // namespace adakv
