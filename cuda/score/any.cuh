// score for any head dim, dtype and option: the definition, told step by step.
//
//   p[w, t]   = softmax over t of z[w, t], of the entries that query w sees
//   scores[t] = pool of  reduce over the group's q heads of  reduce over the window of  p[w, t]
//
// Two launches, and score_pool_kernel (pool.cu) if a score is made of several parts; score.cuh says
// how rows of queries are dealt to chunks, and tiles.cuh how a CTA's warps share a tile.
//   1. lse, grid: [splits, chunks, B * Hkv]; one CTA: maxima and sums of a chunk's rows over a
//      split of the keys
//   2. probs, grid: [spans, chunks, B * Hkv]; one CTA: the scores of a span of entries, or a
//      chunk's parts of them
// In both a warp keeps rows of queries in registers and the keys stream by in tiles: nothing of
// size [W, T] is stored, but each product is taken twice.
#pragma once

#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "score/tiles.cuh"

namespace adakv {

// Launch 1. grid: [splits, chunks, B * Hkv]; one CTA: maxima and sums of a chunk's rows over a
// split of keys.
template <typename Element, int kDim>
__global__ void __launch_bounds__((ScoreTile<Element, kDim>::kThreads),
                                  (ScoreTile<Element, kDim>::kCtas))
    score_lse_kernel(const __grid_constant__ ScoreParams params) {
  using Tile = ScoreTile<Element, kDim>;
  constexpr int kTiles = Tile::kTiles;
  extern __shared__ __align__(16) char memory[];
  __shared__ float2 joined[Tile::kEntryWarps][Tile::kRows];
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const ScoreRow row(params, blockIdx.z);
  if (row.candidates <= 0) return;
  const Place<Tile> place;
  typename Tile::Kept queries;
  float2 sums[2 * kTiles];  // of rows 8 i + g, over the entries of this lane
  for (int i = 0; i < 2 * kTiles; ++i) sums[i] = {kLowest, 0.f};

  // 1. This CTA's tiles of keys come one after the other; each warp takes some of their entries.
  const TileRange range(row.seq_len, Tile::kEntries, blockIdx.x, params.lse_splits);
  const KeyTiles tiles = {range.begin * Tile::kEntries, range.end - range.begin, row.seq_len};
  for_each_tile<Tile>(params, row, tiles, memory, queries, [&](int32_t tile, const Element* keys) {
    if (place.first_row >= params.group * params.head_rows) return;
#pragma unroll 1
    for (int i = place.entry; i < place.entry + Tile::kWarpEntries; i += 16) {
      // 2. The logits z of 16 entries, sorted by row: four of each for this lane.
      float x[kTiles][2][4], z[2 * kTiles][4];
      logits<Tile>(params, queries, keys + i * Tile::kPitch, x);
#pragma unroll
      for (int j = 0; j < 8 * kTiles; ++j) {
        z[j / 4][j % 4] = x[j / 8][j % 4 / 2][j / 4 % 2 * 2 + j % 2] * params.multiplier;
      }
      // 3. Within the window a query sees no entries behind its own.
      const int32_t first = tiles.first + tile * Tile::kEntries + i;
      if (first + 16 > row.candidates) {
#pragma unroll
        for (int j = 0; j < 8 * kTiles; ++j) {
          const int r = place.first_row + j / 4 * 8 + place.lane / 4;
          const int32_t t = first + place.lane % 4 * 2 + j % 4 / 2 * 8 + j % 2;
          if (t >= visible_entries(params, row, r)) z[j / 4][j % 4] = -INFINITY;
        }
      }
      // 4. Into the rows' maxima and sums.
      add_logits(sums, z);
    }
  });

  // 5. Those of a row are joined over its lanes, over the warps, and stored as the split's partial.
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const float2 sum = join_quad(sums[i]);
    const int r = place.row_in_chunk + i * 8 + place.lane / 4;
    if (place.lane % 4 == 0) joined[place.warp / Tile::kRowWarps][r] = sum;
  }
  __syncthreads();
  const int64_t partial =
      (int64_t{blockIdx.z} * params.num_chunks + blockIdx.y) * params.lse_splits + blockIdx.x;
  for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
    float2 sum = joined[0][r];
    for (int i = 1; i < Tile::kEntryWarps; ++i) sum = join(sum, joined[i][r]);
    params.partials[partial * Tile::kRows + r] = sum;
  }
}

// What values of a window's rows are reduced by; they are not negative.
template <bool kIsMax>
__device__ float combined(float a, float b) {
  return kIsMax ? fmaxf(a, b) : a + b;
}

// Combines x[0..7] over the eight lanes 4 g + t of each t: lane 4 g + t gets x[g]'s.
template <bool kIsMax>
__device__ float reduce_scatter(float (&x)[8]) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool is_upper = threadIdx.x % kWarpSize / 4 & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = is_upper ? x[i + half] : x[i], sent = is_upper ? x[i] : x[i + half];
      x[i] = combined<kIsMax>(kept, __shfl_xor_sync(kFullWarp, sent, 4 * half));
    }
  }
  return x[0];
}

// The reduced probabilities of a CTA's entries, in shared memory: of each unit of the chunk for a
// tile and the one before it, and joined those of the tiles that scores are being made from.
template <typename Tile, bool kIsMax>
struct TileValues {
  static constexpr int kEntries = Tile::kEntries;
  static constexpr int kUnits = Tile::kRowWarps * Tile::kUnits;
  float units[2][kUnits][kEntries];  // of tiles in turn
  PoolRing<kEntries> pool;

  /// Rows that only fill up the chunk add nothing.
  __device__ void clear() {
    for (int i = threadIdx.x; i < 2 * kUnits * kEntries; i += Tile::kThreads) {
      (&units[0][0][0])[i] = 0.f;
    }
  }

  /// Stores a warp's values x[u] of its units, [8], of entries 8 i + 2 t and the next, i < 4.
  __device__ void put(const Place<Tile>& place, int32_t tile, float (&x)[Tile::kUnits][8]) {
    const int c = place.lane / 4, t = place.lane % 4;
    const int entry = place.entry + c / 2 * 8 + t * 2 + c % 2;
#pragma unroll
    for (int u = 0; u < Tile::kUnits; ++u) {
      units[tile % 2][place.row_warp * Tile::kUnits + u][entry] = reduce_scatter<kIsMax>(x[u]);
    }
  }

  /// Joins a tile's units of each part, for the scores or as a result.
  __device__ void join_units(const ScoreParams& params,
                             const ScoreRow& row,
                             const Span& span,
                             int32_t tile) {
    const int units_per_part = kUnits / params.parts_per_chunk;
    for (int i = threadIdx.x; i < params.parts_per_chunk * kEntries; i += Tile::kThreads) {
      const int part = i / kEntries, entry = i % kEntries;
      const int part_of_row = blockIdx.y * params.parts_per_chunk + part;
      const int32_t t = span.first + tile * kEntries + entry;
      float x = 0.f;
      for (int j = 0; j < units_per_part; ++j) {
        x = combined<kIsMax>(x, units[tile % 2][part * units_per_part + j][entry]);
      }
      if (params.num_parts == 1) {
        if (part == 0) pool.put(params, row, t, x);
      } else if (part_of_row < params.num_parts && t < span.end) {
        const int64_t first = int64_t{blockIdx.z} * params.num_parts + part_of_row;
        params.parts[first * params.length + t] = x;
      }
    }
  }

  /// Stores the scores that became complete with a tile, by threads that don't join units.
  __device__ void store_scores(const ScoreParams& params,
                               const ScoreRow& row,
                               const Span& span,
                               int32_t tile) const {
    const int i = static_cast<int>(threadIdx.x) - kEntries;
    if (params.num_parts > 1 || i < 0 || i >= kEntries) return;
    pool.store(params, span, tile, i, score_row(params, row));
  }
};

// What the probabilities of a warp's rows 8 i + g are made with. 16-bit elements need to be less
// exact, and registers.
template <typename Tile>
__device__ void load_scales(const ScoreParams& params,
                            const ScoreRow& row,
                            const Place<Tile>& place,
                            float2 (&shared)[Tile::kRows],
                            float2 (&scales)[2 * Tile::kTiles]) {
  for (int r = threadIdx.x / 2; r < Tile::kRows; r += Tile::kThreads / 2) {
    const float2 scale = Tile::kIsFloat
                             ? row_scale<Tile::kRows>(params, row, blockIdx.y, r)
                             : float2{row_lse<Tile::kRows>(params, row, blockIdx.y, r), 1.f};
    if (threadIdx.x % 2 == 0) shared[r] = scale;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2 * Tile::kTiles; ++i) {
    scales[i] = shared[place.row_in_chunk + i * 8 + place.lane / 4];
    if (!Tile::kIsFloat) scales[i].y = 1.f;
  }
}

// Takes the probabilities of a warp's rows for 16 entries into the values x of its units.
template <typename Tile, bool kIsMax>
__device__ void add_probs(const float (&logits)[Tile::kTiles][2][4],
                          float multiplier,
                          const float2 (&scales)[2 * Tile::kTiles],
                          int first,
                          float (&x)[Tile::kUnits][8]) {
#pragma unroll
  for (int m = 0; m < Tile::kTiles; ++m) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float2 upper = scales[2 * m], lower = scales[2 * m + 1];
      const float low = logits[m][c / 2][c % 2], high = logits[m][c / 2][c % 2 + 2];
      const float p = fast_exp2(fmaf(low, multiplier, -upper.x)) * upper.y;
      const float q = fast_exp2(fmaf(high, multiplier, -lower.x)) * lower.y;
      float& value = x[m / Tile::kUnitTiles][first + c];
      value = combined<kIsMax>(value, combined<kIsMax>(p, q));
    }
  }
}

// Launch 2. grid: [spans, chunks, B * Hkv]; one CTA: the scores of a span of entries, or a chunk's
// parts of them. kIsMax: the window is reduced by maximum, else by sum.
template <typename Element, int kDim, bool kIsMax>
__global__ void __launch_bounds__((ScoreTile<Element, kDim>::kThreads),
                                  (ScoreTile<Element, kDim>::kCtas))
    score_probs_kernel(const __grid_constant__ ScoreParams params) {
  using Tile = ScoreTile<Element, kDim>;
  extern __shared__ __align__(16) char memory[];
  __shared__ float2 shared_scales[Tile::kRows];
  __shared__ TileValues<Tile, kIsMax> values;
  const ScoreRow row(params, blockIdx.z);
  const Span span(params, row, Tile::kEntries, blockIdx.x);
  if (params.lse) wait_for_previous_kernel();  // else the one before this has waited for inputs
  let_next_kernel_begin();
  values.clear();
  const Place<Tile> place;
  typename Tile::Kept queries;
  float2 scales[2 * Tile::kTiles];
  const KeyTiles tiles = {span.first, span.num_tiles, row.candidates};
  for_each_tile<Tile>(params, row, tiles, memory, queries, [&](int32_t tile, const Element* keys) {
    // 1. Once the first keys are on their way: what rows' probabilities are made with, from the
    //    partials of launch 1 or the lse that was given.
    if (tile == 0) {
      wait_for_previous_kernel();
      load_scales(params, row, place, shared_scales, scales);
    }
    // 2. The tile before is joined over the warps, and the one before that becomes scores: pooling
    //    reaches into the next tile.
    if (tile > 0) values.join_units(params, row, span, tile - 1);
    if (tile > 1) values.store_scores(params, row, span, tile - 2);
    if (place.first_row >= params.group * params.head_rows) return;
    // 3. The probabilities of this warp's rows for its entries, reduced over rows as they come.
    float x[Tile::kUnits][8] = {};
#pragma unroll
    for (int i = 0; i < Tile::kWarpEntries / 16; ++i) {
      float products[Tile::kTiles][2][4];
      logits<Tile>(params, queries, keys + (place.entry + i * 16) * Tile::kPitch, products);
      add_probs<Tile, kIsMax>(products, params.multiplier, scales, 4 * i, x);
    }
    // 4. Reduced over the lanes, too, and left in shared memory.
    values.put(place, tile, x);
  });

  // 5. The same of the last two tiles, and -inf for entries that don't compete.
  wait_for_previous_kernel();
  const int32_t last = span.num_tiles - 1;
  __syncthreads();
  if (last >= 0) values.join_units(params, row, span, last);
  if (last > 0) values.store_scores(params, row, span, last - 1);
  __syncthreads();
  if (last >= 0) values.store_scores(params, row, span, last);
  if (params.num_parts == 1) {
    fill_scores(params, row, blockIdx.x * Tile::kThreads + threadIdx.x, gridDim.x * Tile::kThreads);
  }
}

/// The two launches, for queries and keys of one dtype.
template <typename Element>
void launch_any_score(const ScoreArgs& args, const ScoreParams& params) {
  const bool early = has_sm90("score", args.keys.device.index);
  dispatch_tile_dim(args.keys.shape[3], [&](auto dim) {
    using Tile = ScoreTile<Element, dim.value>;
    const unsigned rows = static_cast<unsigned>(args.scores.shape[0] * args.scores.shape[1]);
    const auto launch_over = [&](auto kernel, int splits) {
      const LaunchShape shape = {dim3(splits, params.num_chunks, rows), Tile::kThreads,
                                 Tile::kSharedBytes, early};
      launch("score", kernel, shape, args.stream, params);
    };
    if (!params.lse) launch_over(score_lse_kernel<Element, Tile::kDim>, params.lse_splits);
    if (args.window_reduce == Reduce::kMax) {
      launch_over(score_probs_kernel<Element, Tile::kDim, true>, params.num_spans);
    } else {
      launch_over(score_probs_kernel<Element, Tile::kDim, false>, params.num_spans);
    }
  });
}

}  // namespace adakv
