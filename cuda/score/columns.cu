// score for many queries, as those of a whole prompt, or for some of its positions: the columns of
// its attention.
//
//   1. lse:      for each query the log-sum-exp of z; query rows stay, and the keys stream by as far
//                as the last of the rows sees
//   2. columns:  for each entry and q head the window-reduced probabilities, a part; keys stay, and
//                the head's queries stream by from the first that counts for one of them
// and step 3 of score.cuh. Both steps take the product twice as fast as if there were no causality,
// and nothing of size [T, T] is ever stored.
#include "common/device_guard.h"
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "score/columns.cuh"
#include "score/tiles.cuh"

namespace adakv {
namespace {

constexpr int64_t kMostRows = 256;  // queries that the kernels for a window are made for

/// Sizes of one CTA: each warp keeps its own rows, and all of them look at the rows that stream by.
template <typename Element_, int kDim_>
struct ColumnTile {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr bool kIsFloat = sizeof(Element) == 4;
  static constexpr int kTiles = kIsFloat || kDim > 128 ? 1 : 2;
  static constexpr int kWarps = !kIsFloat ? 8 : kDim > 128 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kWarpRows = 16 * kTiles, kKeptRows = kWarps * kWarpRows;
  static constexpr int kStreamed = kIsFloat ? 32 : 64;
  static constexpr int kStages = kIsFloat || kDim > 128 ? 2 : 3;
  static constexpr int kCtas = kIsFloat || kDim > 128 ? 1 : 2;  // of a multiprocessor, at least
  static constexpr int kPitch = kRowPitch<Element, kDim>;

  using Kept = KeptRows<Element, kDim, kTiles>;
  static constexpr size_t kStageBytes = kStages * kStreamed * kPitch * sizeof(Element);
  static constexpr size_t kKeptBytes = kWarps * Kept::kSharedBytes;
  // 16-bit rows only pass through the stages, before these are filled.
  static constexpr size_t kSharedBytes = kStageBytes + (kIsFloat ? kKeptBytes : 0);
  static_assert(kIsFloat || kKeptBytes <= kStageBytes, "the rows that stay don't fit");
  static_assert(kColumnPadding % kKeptRows == 0 && kKeptRows % kStreamed == 0,
                "queries are padded so");
};

/// Loads a warp's rows and calls compute(first row, rows) for `count` tiles of streamed rows from
/// row `first` on, all threads together. also_load(i, stage) may copy more with the i-th tile.
template <typename Tile, typename KeptRow, typename StreamedRow, typename Load, typename Compute>
__device__ void for_each_streamed(const ScoreParams& params,
                                  char* memory,
                                  typename Tile::Kept& kept,
                                  const KeptRow& kept_row,
                                  const StreamedRow& streamed_row,
                                  int32_t first,
                                  int32_t count,
                                  const Load& also_load,
                                  const Compute& compute) {
  using Element = typename Tile::Element;
  constexpr int kStages = Tile::kStages, kStreamed = Tile::kStreamed;
  const int warp = threadIdx.x / kWarpSize;
  Element* stages = reinterpret_cast<Element*>(memory);
  char* own = memory + (Tile::kIsFloat ? Tile::kStageBytes : 0) + warp * Tile::Kept::kSharedBytes;
  kept.load(own, params.head_dim, params.is_aligned, params.keys,
            [&](int i) { return kept_row(warp * Tile::kWarpRows + i); });
  __syncthreads();
  const auto load = [&](int32_t i) {
    if (i < count) {
      copy_rows<Tile::kDim>(stages + i % kStages * kStreamed * Tile::kPitch, kStreamed,
                            params.head_dim, params.is_aligned, params.keys, threadIdx.x,
                            Tile::kThreads,
                            [&](int row) { return streamed_row(first + i * kStreamed + row); });
      also_load(i, i % kStages);
    }
    commit_copies();
  };
  for (int i = 0; i < kStages - 1; ++i) load(i);
  for (int32_t i = 0; i < count; ++i) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load(i + kStages - 1);
    compute(i, stages + i % kStages * kStreamed * Tile::kPitch);
  }
}

// grid: [ceil(W / kKeptRows), Hq, B]; one CTA: the lse of some queries. The longest rows go first.
template <typename Element, int kDim>
__global__ void __launch_bounds__((ColumnTile<Element, kDim>::kThreads),
                                  (ColumnTile<Element, kDim>::kCtas))
    score_columns_lse_kernel(const __grid_constant__ ColumnParams params) {
  using Tile = ColumnTile<Element, kDim>;
  constexpr int kTiles = Tile::kTiles;
  extern __shared__ __align__(16) char memory[];
  const ScoreParams& score = params.score;
  const ColumnHead head(score);
  if (head.candidates <= 0) return;
  const int32_t first = (gridDim.x - 1 - blockIdx.x) * Tile::kKeptRows;
  const int32_t last = min(first + Tile::kKeptRows, params.num_queries) - 1;
  if (score.lse) return head.take_lse(params, first, Tile::kKeptRows);
  const int lane = threadIdx.x % kWarpSize;
  const int32_t own = first + threadIdx.x / kWarpSize * Tile::kWarpRows;  // this warp's first
  const int32_t own_first = head.position(params, own);
  const int32_t own_last = head.position(params, min(own + Tile::kWarpRows - 1, last));
  float2 sums[2 * kTiles];  // of rows 8 i + g, over the entries of this lane
  for (int i = 0; i < 2 * kTiles; ++i) sums[i] = {kLowest, 0.f};
  typename Tile::Kept queries;
  const int32_t count = head.position(params, last) / Tile::kStreamed + 1;  // the first key is 0
  for_each_streamed<Tile>(
      score, memory, queries, [&](int i) { return head.query<Element>(params, first + i); },
      [&](int32_t t) { return head.key<Element>(params, t); }, 0,
      head.position(params, last) < 0 ? 0 : count, [](int32_t, int) {},
      [&](int32_t tile, const Element* keys) {
#pragma unroll 1
        for (int i = 0; i < Tile::kStreamed; i += 16) {
          const int32_t t = tile * Tile::kStreamed + i;
          if (t > own_last) break;
          float x[kTiles][2][4], z[2 * kTiles][4];
          logits<Tile>(score, queries, keys + i * Tile::kPitch, x);
#pragma unroll
          for (int j = 0; j < 8 * kTiles; ++j) {
            z[j / 4][j % 4] = x[j / 8][j % 4 / 2][j / 4 % 2 * 2 + j % 2] * score.multiplier;
          }
          if (t + 15 > own_first) {
#pragma unroll
            for (int j = 0; j < 8 * kTiles; ++j) {
              const int32_t position = own_first + (j / 4 * 8 + lane / 4) * params.stride;
              if (t + lane % 4 * 2 + j % 4 / 2 * 8 + j % 2 > position) z[j / 4][j % 4] = -INFINITY;
            }
          }
          add_logits(sums, z);
        }
      });
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const float2 sum = join_quad(sums[i]);
    if (lane % 4 == 0) head.put_lse(params, own + i * 8 + lane / 4, sum);
  }
}

// grid: [ceil(candidates / kKeptRows), Hq, B]; one CTA: a q head's part of some entries. The first
// entries, which most queries count for, go first. kIsMax: over the window, else sums.
template <typename Element, int kDim, bool kIsMax>
__global__ void __launch_bounds__((ColumnTile<Element, kDim>::kThreads),
                                  (ColumnTile<Element, kDim>::kCtas))
    score_columns_kernel(const __grid_constant__ ColumnParams params) {
  using Tile = ColumnTile<Element, kDim>;
  constexpr int kTiles = Tile::kTiles, kStreamed = Tile::kStreamed;
  extern __shared__ __align__(16) char memory[];
  __shared__ __align__(8) float shared_lse[Tile::kStages][kStreamed];
  const ScoreParams& score = params.score;
  const ColumnHead head(score);
  const int32_t first = blockIdx.x * Tile::kKeptRows;
  if (first >= head.candidates) return;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t own = first + threadIdx.x / kWarpSize * Tile::kWarpRows;  // this warp's first
  const float* lse = head.lse(params);
  float values[2 * kTiles];  // of entries 8 i + g: logarithms of maxima, or sums
  for (int i = 0; i < 2 * kTiles; ++i) values[i] = kIsMax ? -INFINITY : 0.f;
  const int32_t begin = head.first_query(params, first) / kStreamed * kStreamed;
  typename Tile::Kept keys;
  for_each_streamed<Tile>(
      score, memory, keys, [&](int i) { return head.key<Element>(params, first + i); },
      [&](int32_t w) { return head.query<Element>(params, w); }, begin,
      (params.num_queries - begin + kStreamed - 1) / kStreamed,
      [&](int32_t i, int stage) {
        if (threadIdx.x >= kStreamed) return;
        copy_4_bytes(shared_address(&shared_lse[stage][threadIdx.x]),
                     lse + begin + i * kStreamed + threadIdx.x);
      },
      [&](int32_t tile, const Element* queries) {
        const float* tile_lse = shared_lse[tile % Tile::kStages];
#pragma unroll 1
        for (int i = 0; i < kStreamed; i += 16) {
          // How far the first and the last of 16 queries reach.
          const int32_t reach =
              head.position(params, begin + tile * kStreamed + i) - params.distance;
          if (reach + 15 * params.stride < own) continue;
          float x[kTiles][2][4];
          logits<Tile>(score, keys, queries + i * Tile::kPitch, x);
          const bool reaches_all = reach >= own + Tile::kWarpRows - 1;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const int w = n * 8 + lane % 4 * 2;
            const float2 l = *reinterpret_cast<const float2*>(tile_lse + i + w);
#pragma unroll
            for (int j = 0; j < 4 * kTiles; ++j) {
              const int row = j / 2, c = j % 2;  // row: of this lane's
              float z = fmaf(x[row / 2][n][row % 2 * 2 + c], score.multiplier, c ? -l.y : -l.x);
              const int32_t t = own + row * 8 + lane / 4;
              if (!reaches_all && reach + (w + c) * params.stride < t) z = -INFINITY;
              values[row] = kIsMax ? fmaxf(values[row], z) : values[row] + fast_exp2(z);
            }
          }
        }
      });
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const float value = reduce_quad<kIsMax>(values[i]);
    if (lane % 4 == 0) head.put_column(params, own + i * 8 + lane / 4, kIsMax, value);
  }
}

int64_t padded_queries(const ScoreArgs& args) {
  return (args.queries.shape[2] + kColumnPadding - 1) / kColumnPadding * kColumnPadding;
}

int64_t num_not_competing(const ScoreArgs& args) {
  return args.window < 0 ? args.queries.shape[2] : args.window;
}

template <typename Element, int kDim>
void launch_columns(const ScoreArgs& args, const ColumnParams& params) {
  using Tile = ColumnTile<Element, kDim>;
  const auto launch_over = [&](auto kernel, int64_t count) {
    if (count <= 0) return;
    const dim3 grid(static_cast<unsigned>((count + Tile::kKeptRows - 1) / Tile::kKeptRows),
                    static_cast<unsigned>(args.queries.shape[1]),
                    static_cast<unsigned>(args.queries.shape[0]));
    launch("score", kernel, {grid, Tile::kThreads, Tile::kSharedBytes}, args.stream, params);
  };
  const int64_t candidates = params.score.length - num_not_competing(args);
  launch_over(score_columns_lse_kernel<Element, kDim>, params.num_queries);
  if (args.window_reduce == Reduce::kMax) {
    launch_over(score_columns_kernel<Element, kDim, true>, candidates);
  } else {
    launch_over(score_columns_kernel<Element, kDim, false>, candidates);
  }
}

}  // namespace

bool score_reads_columns(const ScoreArgs& args) {
  const int64_t rows = args.queries.shape[2];
  return rows > kMostRows || num_not_competing(args) != rows || args.stride != 1 ||
         args.distance != 0;
}

size_t score_columns_workspace_bytes(const ScoreArgs& args) {
  const int64_t heads = args.queries.shape[0] * args.queries.shape[1];
  return static_cast<size_t>(heads * (padded_queries(args) + args.keys.shape[2])) * sizeof(float);
}

void score_columns(const ScoreArgs& args) {
  ScoreArgs summed = args;  // columns are divided by the queries that count, each by its own
  if (args.window_reduce == Reduce::kMean) summed.window_reduce = Reduce::kSum;
  ColumnParams params = {};
  params.score = score_inputs(summed);
  params.score.window = static_cast<int32_t>(num_not_competing(args));
  params.score.num_parts = params.score.group;
  params.num_queries = static_cast<int32_t>(args.queries.shape[2]);
  params.padded = static_cast<int32_t>(padded_queries(args));
  params.stride = args.stride;
  params.distance = args.distance;
  params.is_mean = args.window_reduce == Reduce::kMean;
  params.lse = args.workspace.ptr<float>();
  params.score.parts =
      params.lse + args.queries.shape[0] * args.queries.shape[1] * int64_t{params.padded};
  if (sm90_score_columns_fits(args)) {
    sm90_score_columns(summed, params);
    return pool_parts(summed, params.score);
  }
  dispatch_dtype(args.keys.dtype, [&](auto element) {
    dispatch_tile_dim(args.keys.shape[3], [&](auto dim) {
      launch_columns<typename decltype(element)::type, dim.value>(summed, params);
    });
  });
  pool_parts(summed, params.score);
}

}  // namespace adakv
