// score for any head dim, dtype and option: a warp keeps query rows and the keys stream by. See
// score.cuh.
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/tile.cuh"
#include "score.cuh"

namespace adakv {
namespace {

// Sizes of one CTA: kRowWarps warps side by side on the rows of a chunk, kEntryWarps on entries.
template <typename Element, int kDim>
struct ScoreTile {
  static constexpr int kRowBytes = kDim * sizeof(Element);
  static constexpr int kTiles = sizeof(Element) == 2 ? 2 : 1;
  static constexpr int kUnit = 16 * kTiles;  // rows of a warp
  static constexpr int kRowWarps = kRowBytes > 512 ? 2 : 4, kEntryWarps = kRowBytes > 256 ? 1 : 2;
  static constexpr int kRows = kRowWarps * kUnit;
  static constexpr int kWarpEntries = 32;
  static constexpr int kEntries = kEntryWarps * kWarpEntries;  // of a tile
  static constexpr int kStages = sizeof(Element) == 2 ? 4 : 2;
  static constexpr int kWarps = kRowWarps * kEntryWarps, kThreads = kWarps * kWarpSize;
  static constexpr int kCtas = kThreads == 256 ? 2 : 1;  // of a multiprocessor, at least
  static constexpr int kStageElements = kEntries * kRowPitch<Element, kDim>;

  using Kept = KeptRows<Element, kDim, kTiles>;
  static constexpr size_t kStageBytes = kStages * kStageElements * sizeof(Element);
  // 16-bit rows only pass through shared memory, before the first keys come.
  static constexpr size_t kKeptBytes = sizeof(Element) == 2 ? 0 : kWarps * Kept::kSharedBytes;
  static constexpr size_t kSharedBytes = kStageBytes + kKeptBytes;
  static_assert(sizeof(Element) != 2 || kWarps * Kept::kSharedBytes <= kStageBytes);
};

// Calls compute(tile, keys) for tiles of a head's keys, [kEntries, kRowPitch] in shared memory, all
// threads together. The keys of entries from `limit` on are zeros.
template <typename Tile, int kDim, typename Element, typename Compute>
__device__ void for_each_tile(const ScoreParams& params,
                              const ScoreRow& row,
                              TileRange range,
                              int32_t limit,
                              Element* stages,
                              const Compute& compute) {
  const Element* keys = static_cast<const Element*>(params.keys) + row.b * params.key_stride[0] +
                        row.h * params.key_stride[1];
  const auto load = [&](int32_t tile) {
    if (tile < range.end) {
      Element* stage = stages + tile % Tile::kStages * Tile::kStageElements;
      copy_rows<kDim>(stage, Tile::kEntries, params.head_dim, params.is_aligned, keys, threadIdx.x,
                      Tile::kThreads, [&](int i) -> const Element* {
                        const int32_t t = tile * Tile::kEntries + i;
                        return t < limit ? keys + t * params.key_stride[2] : nullptr;
                      });
    }
    commit_copies();
  };
  for (int i = 0; i < Tile::kStages - 1; ++i) load(range.begin + i);
  for (int32_t tile = range.begin; tile < range.end; ++tile) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();
    load(tile + Tile::kStages - 1);
    compute(tile, stages + tile % Tile::kStages * Tile::kStageElements);
  }
}

// The logits of a warp's rows for 16 entries, still to be multiplied to get z.
template <typename Kept, typename Element, int kTiles>
__device__ void logits(const ScoreParams& params,
                       const Kept& queries,
                       const Element* keys,
                       float (&x)[kTiles][2][4]) {
  queries.multiply(keys, x);
  if (params.softcap == 0.f) return;
#pragma unroll
  for (int i = 0; i < 8 * kTiles; ++i) {
    float& logit = x[i / 8][i / 4 % 2][i % 4];
    logit = params.softcap * tanhf(logit * params.cap_scale);
  }
}

// Sums (or maxima) of x[0..7] over the eight lanes 4 g + t of each t: lane 4 g + t gets x[g]'s.
template <typename Combine>
__device__ float reduce_scatter(float (&x)[8], const Combine& combine) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool is_upper = threadIdx.x % kWarpSize / 4 & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = is_upper ? x[i + half] : x[i], sent = is_upper ? x[i] : x[i + half];
      x[i] = combine(kept, __shfl_xor_sync(kFullWarp, sent, 4 * half));
    }
  }
  return x[0];
}

template <typename Tile, typename Element>
__device__ void load_queries(const ScoreParams& params,
                             const ScoreRow& row,
                             int first_row,
                             char* shared,
                             typename Tile::Kept& queries) {
  const int warp = threadIdx.x / kWarpSize;
  queries.load(shared + warp * Tile::Kept::kSharedBytes, params.head_dim, params.is_aligned,
               params.queries,
               [&](int i) { return query_row<Element>(params, row, first_row + i); });
  __syncthreads();
}

// grid: [splits, chunks, B * Hkv]; one CTA: maxima and sums of a chunk's rows over a span of keys.
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
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int unit = warp % Tile::kRowWarps, entry_warp = warp / Tile::kRowWarps;
  const int first_row = blockIdx.y * Tile::kRows + unit * Tile::kUnit;
  typename Tile::Kept queries;
  char* kept = sizeof(Element) == 2 ? memory : memory + Tile::kStageBytes;
  load_queries<Tile, Element>(params, row, first_row, kept, queries);

  float2 running[kTiles][2];  // of rows g and g + 8, over the entries of this lane
  int32_t visible[kTiles][2];
#pragma unroll
  for (int m = 0; m < 2 * kTiles; ++m) {
    running[m / 2][m % 2] = {kLowest, 0.f};
    visible[m / 2][m % 2] = visible_entries(params, row, first_row + m * 8 + lane / 4);
  }
  const TileRange range(row.seq_len, Tile::kEntries, blockIdx.x, params.num_splits);
  for_each_tile<Tile, kDim>(
      params, row, range, row.seq_len, reinterpret_cast<Element*>(memory),
      [&](int32_t tile, const Element* keys) {
        if (first_row >= params.group * params.head_rows) return;
        const bool masks = (tile + 1) * Tile::kEntries > row.candidates;
#pragma unroll 1
        for (int i = 0; i < Tile::kWarpEntries; i += 16) {
          const int entry = entry_warp * Tile::kWarpEntries + i;
          float z[kTiles][2][4];
          logits(params, queries, keys + entry * kRowPitch<Element, kDim>, z);
          const int32_t first = tile * Tile::kEntries + entry + lane % 4 * 2;
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              float x[4] = {z[m][0][2 * j], z[m][0][2 * j + 1], z[m][1][2 * j], z[m][1][2 * j + 1]};
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                x[c] *= params.multiplier;
                if (masks && first + c / 2 * 8 + c % 2 >= visible[m][j]) x[c] = -INFINITY;
              }
              float2& sum = running[m][j];
              const float highest = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
              if (highest > sum.x) {
                sum.y *= fast_exp2(sum.x - highest);
                sum.x = highest;
              }
              sum.y += (fast_exp2(x[0] - sum.x) + fast_exp2(x[1] - sum.x)) +
                       (fast_exp2(x[2] - sum.x) + fast_exp2(x[3] - sum.x));
            }
          }
        }
      });

#pragma unroll
  for (int m = 0; m < 2 * kTiles; ++m) {
    float2 sum = running[m / 2][m % 2];
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      sum = join(
          sum, {__shfl_xor_sync(kFullWarp, sum.x, step), __shfl_xor_sync(kFullWarp, sum.y, step)});
    }
    if (lane % 4 == 0) joined[entry_warp][unit * Tile::kUnit + m * 8 + lane / 4] = sum;
  }
  __syncthreads();
  const int64_t partial =
      (int64_t{blockIdx.z} * params.num_chunks + blockIdx.y) * params.num_splits + blockIdx.x;
  for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
    float2 sum = joined[0][r];
    for (int i = 1; i < Tile::kEntryWarps; ++i) sum = join(sum, joined[i][r]);
    params.partials[partial * Tile::kRows + r] = sum;
  }
}

// grid: [splits, chunks, B * Hkv]; one CTA: the parts of a chunk's rows for a span of entries.
// kIsMax: the window is reduced by maximum, else by sum.
template <typename Element, int kDim, bool kIsMax>
__global__ void __launch_bounds__((ScoreTile<Element, kDim>::kThreads),
                                  (ScoreTile<Element, kDim>::kCtas))
    score_probs_kernel(const __grid_constant__ ScoreParams params) {
  using Tile = ScoreTile<Element, kDim>;
  constexpr int kTiles = Tile::kTiles;
  constexpr bool kIsExact = sizeof(Element) == 4;  // 16-bit elements need less, and registers
  extern __shared__ __align__(16) char memory[];
  __shared__ float2 scales[Tile::kRows];
  __shared__ float units[2][Tile::kRowWarps][Tile::kEntries];  // of tiles in turn
  const auto combine = [](float a, float b) { return kIsMax ? fmaxf(a, b) : a + b; };
  const ScoreRow row(params, blockIdx.z);
  if (row.candidates <= 0) {
    wait_for_previous_kernel();
    return;
  }
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int unit = warp % Tile::kRowWarps, entry_warp = warp / Tile::kRowWarps;
  const int chunk = blockIdx.y, first_row = chunk * Tile::kRows + unit * Tile::kUnit;
  typename Tile::Kept queries;
  char* kept = sizeof(Element) == 2 ? memory : memory + Tile::kStageBytes;
  load_queries<Tile, Element>(params, row, first_row, kept, queries);
  let_next_kernel_begin();
  wait_for_previous_kernel();
  for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
    scales[r] = kIsExact ? row_scale<Tile::kRows>(params, row, chunk, r)
                         : float2{row_lse<Tile::kRows>(params, row, chunk, r), 1.f};
  }
  for (int i = threadIdx.x; i < 2 * Tile::kRowWarps * Tile::kEntries; i += Tile::kThreads) {
    (&units[0][0][0])[i] = 0.f;  // rows that only fill up the chunk add nothing
  }
  __syncthreads();
  float2 row_scales[kTiles][2];
#pragma unroll
  for (int m = 0; m < 2 * kTiles; ++m) {
    row_scales[m / 2][m % 2] = scales[unit * Tile::kUnit + m * 8 + lane / 4];
    if (!kIsExact) row_scales[m / 2][m % 2].y = 1.f;
  }

  // Joins the units of a part and stores it.
  const int units_per_part = Tile::kRowWarps / params.parts_per_chunk;
  const auto store = [&](int32_t tile) {
    const int part = threadIdx.x / Tile::kEntries, entry = threadIdx.x % Tile::kEntries;
    const int part_of_row = chunk * params.parts_per_chunk + part;
    const int32_t t = tile * Tile::kEntries + entry;
    if (part >= params.parts_per_chunk || part_of_row >= params.num_parts) return;
    if (t >= row.candidates) return;
    float x = 0.f;  // probabilities are not negative
    for (int i = 0; i < units_per_part; ++i) {
      x = combine(x, units[tile % 2][part * units_per_part + i][entry]);
    }
    params.parts[(int64_t{blockIdx.z} * params.num_parts + part_of_row) * params.length + t] = x;
  };
  const TileRange range(row.candidates, Tile::kEntries, blockIdx.x, params.num_splits);
  for_each_tile<Tile, kDim>(
      params, row, range, row.candidates, reinterpret_cast<Element*>(memory),
      [&](int32_t tile, const Element* keys) {
        if (tile > range.begin) store(tile - 1);
        if (first_row >= params.group * params.head_rows) return;
        float x[8] = {};  // entries 8 i + 2 t and the next, i < 4
#pragma unroll
        for (int i = 0; i < Tile::kWarpEntries / 16; ++i) {
          const int entry = entry_warp * Tile::kWarpEntries + i * 16;
          float z[kTiles][2][4];
          logits(params, queries, keys + entry * kRowPitch<Element, kDim>, z);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float2 upper = row_scales[m][0], lower = row_scales[m][1];
              const float low = z[m][c / 2][c % 2], high = z[m][c / 2][c % 2 + 2];
              const float p = fast_exp2(fmaf(low, params.multiplier, -upper.x)) * upper.y;
              const float q = fast_exp2(fmaf(high, params.multiplier, -lower.x)) * lower.y;
              x[4 * i + c] = combine(x[4 * i + c], combine(p, q));
            }
          }
        }
        const float mine = reduce_scatter(x, combine);
        const int c = lane / 4, entry = entry_warp * Tile::kWarpEntries;
        units[tile % 2][unit][entry + c / 2 * 8 + lane % 4 * 2 + c % 2] = mine;
      });
  __syncthreads();
  if (range.begin < range.end) store(range.end - 1);
}

}  // namespace

void general_score(const ScoreArgs& args, const ScoreParams& params) {
  const bool early = has_sm90("score", args.keys.device.index);
  dispatch_dtype(args.keys.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    dispatch_tile_dim(params.head_dim, [&](auto dim) {
      using Tile = ScoreTile<Element, dim.value>;
      const dim3 grid(params.num_splits, params.num_chunks,
                      static_cast<unsigned>(args.scores.shape[0] * args.scores.shape[1]));
      LaunchShape shape = {grid, Tile::kThreads, Tile::kSharedBytes};
      if (!params.lse) {
        shape.early = early;
        launch("score", score_lse_kernel<Element, dim.value>, shape, args.stream, params);
      }
      const bool is_max = args.window_reduce == Reduce::kMax;
      launch("score",
             is_max ? score_probs_kernel<Element, dim.value, true>
                    : score_probs_kernel<Element, dim.value, false>,
             shape, args.stream, params);
    });
  });
}

}  // namespace adakv
