// What the kernels of score share: those for any device (any.cu) and those for sm_90
// (sm90/score.cu).
//
//   1. lse:   for each query row the maximum and the sum of exp2(z - maximum) over a split of keys
//   2. probs: for each entry the window-reduced probabilities of some rows, a "part"
//   3. pool:  parts to scores
// Logits z are in units of log2(e). The rows of a kv head, its group's queries in the window, are
// worked on in chunks of kRows rows: row r belongs to the group's q head r / head_rows and is its
// window's query r % head_rows, if both exist. A sum over rows needs no heads: head_rows = W, one
// part a chunk. Where maxima come in, head_rows is such that no unit of a chunk crosses heads.
//
// If one part is all that a score is made of, step 2 pools, too: the spans of entries of its CTAs
// overlap by what the pool reaches.
#pragma once

#include "adakv/ops.h"
#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"

namespace adakv {

struct ScoreParams {
  const void* queries;       // [B, Hq, W, D]
  const void* keys;          // [B, Hkv, T, D], or pages
  LayerRows held;            // whose rows the keys are, if they are not in a tensor
  bool is_fp8;               // of its codes, if there are any
  const int32_t* seq_lens;   // [B] or null
  const float* sink_logits;  // [Hq] or null
  const float* lse;          // [B, Hq, W] or null
  float* scores;             // [B, Hkv, T]
  float2* partials;          // [B * Hkv, chunks, lse_splits, kRows]   maximum and sum
  float* parts;              // [B * Hkv, parts, T], if there are several
  int64_t query_stride[3], key_stride[3], lse_stride[2], score_stride[2];
  int32_t length, window, group, kv_heads, head_dim;
  int32_t head_rows, num_chunks, num_parts, parts_per_chunk;
  int32_t parts_per_head;         // of a q head; 0: a part is of all heads of its chunk
  int32_t lse_splits, num_spans;  // of the CTAs of steps 1 and 2 along the entries
  bool is_aligned;                // rows of queries and keys lie at multiples of 16 bytes
  float multiplier;               // of a product (or of a capped logit), to get z
  float softcap, cap_scale;  // softcap * tanh(product * cap_scale) is the capped logit; 0: no cap
  bool is_max;               // the group is reduced by maximum, else by sum
  Pool pool;                 // of step 2
  int32_t side;              // entries on one side that it reaches
  int32_t tile_step;         // tiles of step 2 begin at multiples of it, a power of two
  float weight;              // 1 / (what means divide by)
};

/// How kernels deal with rows and entries: rows of a chunk and of its units, entries of a tile.
struct ScoreSizes {
  int rows, unit, entries, ctas_per_sm;
  int lse_tiles;     // of a CTA of step 1 at least, if that leaves enough CTAs
  bool joins_heads;  // a part is of all heads of a chunk, also where maxima come in
};

/// Whether heads have to be told apart: sums over everything can be made in any order.
bool keeps_heads(const ScoreArgs& args);
/// Whether heads have to be pooled one by one.
bool pools_heads(const ScoreArgs& args);
/// What scores are multiplied by: 1 / (what means and the pool divide by).
float score_weight(const ScoreArgs& args);

/// Steps 1 and 2 (any.cuh), and 3 (pool.cu).
ScoreSizes any_score_sizes(const ScoreArgs& args);
void any_score(const ScoreArgs& args, const ScoreParams& params);
void pool_parts(const ScoreArgs& args, const ScoreParams& params);

/// columns.cu: score of more queries than a window has, or of others. It has its own steps 1
/// and 2.
bool score_reads_columns(const ScoreArgs& args);
size_t score_columns_workspace_bytes(const ScoreArgs& args);
void score_columns(const ScoreArgs& args);
/// Those of the parameters that don't depend on how rows are dealt to chunks.
ScoreParams score_inputs(const ScoreArgs& args);

/// The kernels of sm90/score.cu: D 64 or 128 of 16 bits, no cap; sums over window and group, or
/// maxima over a window of up to 128.
constexpr ScoreSizes kSm90ScoreSizes = {128, 32, 128, 2, 4, true};
bool sm90_score_fits(const ScoreArgs& args);
void sm90_score(const ScoreArgs& args, const ScoreParams& params);

constexpr float kLowest = -1e30f;  // finite, so that differences are never NaN
constexpr float kLog2e = 1.4426950408889634f;

/// Entries of a row.
__device__ inline int32_t row_length(const ScoreParams& params, int32_t b, int32_t h) {
  if (params.held.pages) return min(*params.held.lengths.at(b, h), params.length);
  return params.seq_lens ? params.seq_lens[b] : params.length;
}

/// A kv head of a sequence, and a CTA's share of its entries.
struct ScoreRow {
  int32_t b, h, seq_len, candidates;

  __device__ ScoreRow(const ScoreParams& params, int row) {
    b = row / params.kv_heads;
    h = row % params.kv_heads;
    seq_len = row_length(params, b, h);
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

/// Entries begin .. end - 1, for a CTA of step 2. Its tiles start with entry `first`, which may be
/// negative, and go as far as the pool reaches.
struct Span {
  int32_t begin, end, first, num_tiles;

  __device__ Span(const ScoreParams& params, const ScoreRow& row, int32_t tile, int span) {
    const int32_t share = (row.candidates + params.num_spans - 1) / params.num_spans;
    begin = min(span * share, row.candidates);
    end = min(begin + share, row.candidates);
    first = (begin - params.side) & -params.tile_step;
    num_tiles = begin < end ? (end - first + params.side + tile - 1) / tile : 0;
  }
};

constexpr int kMaxSide = 31;  // entries on one side that a pool reaches, at most

__device__ inline float outside_of_pool(Pool pool) {
  return pool == Pool::kMax ? -INFINITY : 0.f;
}

/// The values (of shared memory) around `center`, [2 * side + 1], as one. A ring of kSize values
/// has them modulo kSize.
template <int kSize>
__device__ inline float pooled(Pool pool, int32_t side, const float* values, int32_t center) {
  const auto value = [&](int32_t i) { return values[(center + i) & (kSize - 1)]; };
  float result = value(-side);
  for (int32_t i = 1 - side; i <= side; ++i) {
    result = pool == Pool::kMax ? fmaxf(result, value(i)) : result + value(i);
  }
  return result;
}

/// The values of a span's last tiles, in shared memory, from which scores are made as tiles come.
/// Between putting a tile and its scores, and before putting the next but one, lies a barrier.
template <int kTile>
struct PoolRing {
  static constexpr int kSize = 4 * kTile;
  static_assert(kSize >= 2 * kTile + 2 * kMaxSide && (kSize & (kSize - 1)) == 0, "no overlap");
  float values[kSize];

  __device__ void put(const ScoreParams& params, const ScoreRow& row, int32_t t, float value) {
    const bool is_inside = t >= 0 && t < row.candidates;
    values[t & (kSize - 1)] = is_inside ? value : outside_of_pool(params.pool);
  }

  /// Stores the i-th result of those that became complete with a tile.
  __device__ void store(
      const ScoreParams& params, const Span& span, int32_t tile, int i, float* to) const {
    const int32_t t = span.first + tile * kTile - params.side + i;
    if (t < span.begin || t >= span.end) return;
    to[t] = params.weight * pooled<kSize>(params.pool, params.side, values, t);
  }
};

__device__ inline float* score_row(const ScoreParams& params, const ScoreRow& row) {
  return params.scores + row.b * params.score_stride[0] + row.h * params.score_stride[1];
}

/// Scores of entries that don't compete, by `thread` of `num_threads` of a row.
__device__ inline void fill_scores(const ScoreParams& params,
                                   const ScoreRow& row,
                                   int32_t thread,
                                   int32_t num_threads) {
  float* scores = score_row(params, row);
  for (int32_t t = max(row.candidates, 0) + thread; t < params.length; t += num_threads) {
    scores[t] = -INFINITY;
  }
}

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

/// Joins the pairs of the four lanes that share rows of a product.
__device__ inline float2 join_quad(float2 pair) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    pair = join(
        pair, {__shfl_xor_sync(kFullWarp, pair.x, step), __shfl_xor_sync(kFullWarp, pair.y, step)});
  }
  return pair;
}

/// Joins partials 0, step, 2 * step, ... below `count`, `stride` pairs apart.
__device__ inline float2 join_partials(const float2* partials, int count, int step, int stride) {
  constexpr int kLoads = 8;  // under way at the same time
  float2 joined = {kLowest, 0.f};
  for (int first = 0; first < count; first += kLoads * step) {
    float2 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int k = first + i * step;
      loaded[i] = k < count ? __ldcg(partials + k * stride) : float2{kLowest, 0.f};
    }
    float highest = joined.x;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) highest = fmaxf(highest, loaded[i].x);
    joined.y *= fast_exp2(joined.x - highest);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) joined.y += loaded[i].y * fast_exp2(loaded[i].x - highest);
    joined.x = highest;
  }
  return joined;
}

/// What the probabilities of a row of a chunk are made with: exp2(z - x) * y. Made by lanes 2 i and
/// 2 i + 1 together. A chunk has kRows rows; those that only fill it up get y = 0.
template <int kRows>
__device__ inline float2 row_scale(const ScoreParams& params,
                                   const ScoreRow& row,
                                   int chunk,
                                   int row_in_chunk) {
  const int r = chunk * kRows + row_in_chunk;
  const int g = r / params.head_rows, w = r % params.head_rows;
  const bool exists = g < params.group && w < params.window;
  const int q = row.h * params.group + g;
  if (params.lse) {
    if (!exists) return {0.f, 0.f};
    const float* lse = params.lse + row.b * params.lse_stride[0] + q * params.lse_stride[1];
    return {lse[w] * kLog2e, 1.f};
  }
  const int64_t first = (int64_t{row.b} * params.kv_heads + row.h) * params.num_chunks + chunk;
  const float2* partials = params.partials + first * params.lse_splits * kRows + row_in_chunk;
  const int odd = threadIdx.x % 2;
  float2 joined = join_partials(partials + odd * kRows, params.lse_splits - odd, 2, kRows);
  joined = join(joined,
                {__shfl_xor_sync(kFullWarp, joined.x, 1), __shfl_xor_sync(kFullWarp, joined.y, 1)});
  if (!exists) return {0.f, 0.f};
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
