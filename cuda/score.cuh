// What the kernels of score share: the general ones and those for sm_90 (sm90/score.cu).
//
//   1. lse:   for each query row the maximum and the sum of exp2(z - maximum) over a split of keys
//   2. probs: for each entry the window-reduced probabilities of some rows, a "part"
//   3. pool:  parts to scores
// Logits z are in units of log2(e). The rows of a kv head, its group's queries in the window, are
// worked on in chunks of kRows rows: row r belongs to the group's q head r / head_rows and is its
// window's query r % head_rows, if both exist. A sum over rows needs no heads: head_rows = W, one
// part a chunk. Where maxima come in, head_rows is such that no unit of a chunk crosses heads.
#pragma once

#include "adakv/ops.h"
#include "common/async_copy.cuh"
#include "common/mma.cuh"

namespace adakv {

struct ScoreParams {
  const void* queries;       // [B, Hq, W, D]
  const void* keys;          // [B, Hkv, T, D]
  const int32_t* seq_lens;   // [B] or null
  const float* sink_logits;  // [Hq] or null
  const float* lse;          // [B, Hq, W] or null
  float* scores;             // [B, Hkv, T]
  float2* partials;          // [B * Hkv, chunks, splits, kRows]   maximum and sum
  float* parts;              // [B * Hkv, parts, T]
  int32_t* arrivals;         // [B * Hkv, splits]
  int64_t query_stride[3], key_stride[3], lse_stride[2], score_stride[2];
  int32_t length, window, group, kv_heads, head_dim;
  int32_t head_rows, num_chunks, num_splits, num_parts, parts_per_chunk;
  bool is_aligned;           // rows of queries and keys lie at multiples of 16 bytes
  float multiplier;          // of a product (or of a capped logit), to get z
  float softcap, cap_scale;  // softcap * tanh(product * cap_scale) is the capped logit; 0: no cap
  Pool pool;
  int32_t side;  // entries on one side that the pool reaches
  float weight;  // 1 / (what means divide by)
};

/// Whether heads have to be told apart: sums over everything can be made in any order.
bool keeps_heads(const ScoreArgs& args);

/// Steps 1 and 2 (score_general.cu), and 3 (score_pool.cu).
void general_score(const ScoreArgs& args, const ScoreParams& params);
void pool_parts(const ScoreArgs& args, const ScoreParams& params);

/// The kernels of sm90/score.cu: D 64 or 128 of 16 bits, sums over window and group, no cap. If
/// there is one part only, the second one pools too.
constexpr int kSm90ScoreRows = 128;
bool sm90_score_fits(const ScoreArgs& args);
void sm90_score(const ScoreArgs& args, const ScoreParams& params);

constexpr float kLowest = -1e30f;  // finite, so that differences are never NaN
constexpr float kLog2e = 1.4426950408889634f;

/// A kv head of a sequence, and a CTA's share of its entries.
struct ScoreRow {
  int32_t b, h, seq_len, candidates;

  __device__ ScoreRow(const ScoreParams& params, int row) {
    b = row / params.kv_heads;
    h = row % params.kv_heads;
    seq_len = params.seq_lens ? params.seq_lens[b] : params.length;
    candidates = seq_len - params.window;
  }
};

/// Tiles begin .. end - 1 of `count` entries, for split `split`.
struct TileRange {
  int32_t begin, end;

  __device__ TileRange(int32_t count, int32_t tile, int split, int num_splits) {
    const int32_t tiles = (count + tile - 1) / tile;
    const int32_t share = (tiles + num_splits - 1) / num_splits;
    begin = min(split * share, tiles);
    end = min(begin + share, tiles);
  }
};

/// The query of row r, or null for rows that only fill up a chunk.
template <typename Element>
__device__ inline const Element* query_row(const ScoreParams& params, const ScoreRow& row, int r) {
  const int g = r / params.head_rows, w = r % params.head_rows;
  if (g >= params.group || w >= params.window) return nullptr;
  return static_cast<const Element*>(params.queries) + row.b * params.query_stride[0] +
         (row.h * params.group + g) * params.query_stride[1] + w * params.query_stride[2];
}

/// Entries that row r may see.
__device__ inline int32_t visible_entries(const ScoreParams& params, const ScoreRow& row, int r) {
  return row.candidates + r % params.head_rows + 1;
}

/// Joins two pairs of maximum and sum.
__device__ inline float2 join(float2 a, float2 b) {
  const float maximum = fmaxf(a.x, b.x);
  return {maximum, a.y * fast_exp2(a.x - maximum) + b.y * fast_exp2(b.x - maximum)};
}

/// What the probabilities of a row of a chunk are made with: exp2(z - x) * y. A chunk has kRows
/// rows; those that only fill it up get y = 0.
template <int kRows>
__device__ inline float2 row_scale(const ScoreParams& params,
                                   const ScoreRow& row,
                                   int chunk,
                                   int row_in_chunk) {
  const int r = chunk * kRows + row_in_chunk;
  const int g = r / params.head_rows, w = r % params.head_rows;
  if (g >= params.group || w >= params.window) return {0.f, 0.f};
  const int q = row.h * params.group + g;
  if (params.lse) {
    const float* lse = params.lse + row.b * params.lse_stride[0] + q * params.lse_stride[1];
    return {lse[w] * kLog2e, 1.f};
  }
  const int64_t first = (int64_t{row.b} * params.kv_heads + row.h) * params.num_chunks + chunk;
  const float2* partial = params.partials + first * params.num_splits * kRows + row_in_chunk;
  float2 joined = {kLowest, 0.f};
#pragma unroll 8
  for (int i = 0; i < params.num_splits; ++i) joined = join(joined, __ldcg(partial + i * kRows));
  if (params.sink_logits) joined = join(joined, {params.sink_logits[q] * kLog2e, 1.f});
  return {joined.x, 1.f / joined.y};
}

/// The same in one number, a little coarser: probabilities are exp2(z - result).
template <int kRows>
__device__ inline float row_lse(const ScoreParams& params,
                                const ScoreRow& row,
                                int chunk,
                                int row_in_chunk) {
  const float2 scale = row_scale<kRows>(params, row, chunk, row_in_chunk);
  return scale.x - log2f(scale.y);  // +inf for rows that only fill up
}

}  // namespace adakv
