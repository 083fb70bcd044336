// Attention of the last W queries of a prompt to its entries; see ops.h for the formula and
// score.cuh for the three steps. The kernels here take any head dim, dtype and option; a warp keeps
// query rows and the keys stream by. Nothing of size [heads, window, T] is ever stored.
#include "score.cuh"

#include <algorithm>
#include <cmath>

#include "common/device_guard.h"
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "common/tile.cuh"
#include "cuda_backend.h"

namespace adakv {
namespace {

// Sizes of one CTA: kRowWarps warps side by side on the rows of a chunk, kEntryWarps on the entries.
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

// The logits z of a warp's rows for 16 entries.
template <typename Kept, typename Element, int kTiles>
__device__ void logits(const ScoreParams& params,
                       const Kept& queries,
                       const Element* keys,
                       float (&z)[kTiles][2][4]) {
  queries.multiply(keys, z);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = z[m][i / 4][i % 4];
      if (params.softcap > 0) x = params.softcap * tanhf(x * params.cap_scale);
      x *= params.multiplier;
    }
  }
}

// Sums (or maxima) of x[0..7] over the eight lanes 4 g + t of each t: lane 4 g + t gets that of x[g].
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
__global__ void __launch_bounds__((ScoreTile<Element, kDim>::kThreads), (ScoreTile<Element, kDim>::kCtas))
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
                if (first + c / 2 * 8 + c % 2 >= visible[m][j]) x[c] = -INFINITY;
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
      sum = join(sum, {__shfl_xor_sync(kFullWarp, sum.x, step),
                       __shfl_xor_sync(kFullWarp, sum.y, step)});
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
__global__ void __launch_bounds__((ScoreTile<Element, kDim>::kThreads), (ScoreTile<Element, kDim>::kCtas))
    score_probs_kernel(const __grid_constant__ ScoreParams params) {
  using Tile = ScoreTile<Element, kDim>;
  constexpr int kTiles = Tile::kTiles;
  extern __shared__ __align__(16) char memory[];
  __shared__ float lse[Tile::kRows];
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
    lse[r] = row_lse<Tile::kRows>(params, row, chunk, r);
  }
  for (int i = threadIdx.x; i < 2 * Tile::kRowWarps * Tile::kEntries; i += Tile::kThreads) {
    (&units[0][0][0])[i] = 0.f;  // rows that only fill up the chunk add nothing
  }
  __syncthreads();
  float row_lses[kTiles][2];
#pragma unroll
  for (int m = 0; m < 2 * kTiles; ++m) {
    row_lses[m / 2][m % 2] = lse[unit * Tile::kUnit + m * 8 + lane / 4];
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
              const float low = fast_exp2(z[m][c / 2][c % 2] - row_lses[m][0]);
              const float high = fast_exp2(z[m][c / 2][c % 2 + 2] - row_lses[m][1]);
              x[4 * i + c] = combine(x[4 * i + c], combine(low, high));
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

// --- Pooling ---------------------------------------------------------------------------------------

constexpr int kPoolThreads = 256;
constexpr int kPoolEntries = 512;  // of one CTA
constexpr int kMaxSide = 31;       // entries on one side that a pool reaches

struct PoolParams {
  ScoreParams score;
  Reduce window_reduce, group_reduce;
  Pool pool;
  int32_t width;
  int32_t num_outer;       // pooled one by one, then reduced over the group: q heads, or 1
  int32_t parts_per_head;  // of a q head; 0: parts are sums over all rows
  float weight;            // 1 / (what means divide by)
};

__device__ float reduced(Reduce reduce, float a, float b) {
  return reduce == Reduce::kMax ? fmaxf(a, b) : a + b;
}

// The value that is pooled: of q head `outer`, or of all of them.
__device__ float unpooled(const PoolParams& params, const float* parts, int outer, int32_t t) {
  const ScoreParams& score = params.score;
  if (params.parts_per_head == 0) {
    float sum = 0.f;
    for (int i = 0; i < score.num_parts; ++i) sum += __ldcg(parts + int64_t{i} * score.length + t);
    return sum;
  }
  const int first = params.num_outer > 1 ? outer : 0;
  const int last = params.num_outer > 1 ? outer + 1 : score.group;
  float value = 0.f;
  for (int g = first; g < last; ++g) {
    float head = 0.f;
    for (int i = 0; i < params.parts_per_head; ++i) {
      const int64_t part = g * params.parts_per_head + i;
      head = reduced(params.window_reduce, head, __ldcg(parts + part * score.length + t));
    }
    value = reduced(params.group_reduce, value, head);
  }
  return value;
}

// grid: [ceil(T / kPoolEntries), B * Hkv]; one CTA: the scores of a span of entries.
__global__ void __launch_bounds__(kPoolThreads)
    score_pool_kernel(const __grid_constant__ PoolParams params) {
  __shared__ float values[kPoolEntries + 2 * kMaxSide];  // of entries first - side, ...
  const ScoreParams& score = params.score;
  const ScoreRow row(score, blockIdx.y);
  wait_for_previous_kernel();
  const int32_t first = blockIdx.x * kPoolEntries;
  const int side = params.pool == Pool::kNone ? 0 : params.width / 2;
  const float outside = params.pool == Pool::kMax ? -INFINITY : 0.f;
  const float* parts = score.parts + int64_t{blockIdx.y} * score.num_parts * score.length;
  float results[kPoolEntries / kPoolThreads] = {};
  for (int outer = 0; outer < params.num_outer; ++outer) {
    for (int i = threadIdx.x; i < kPoolEntries + 2 * side; i += kPoolThreads) {
      const int32_t t = first - side + i;
      const bool is_inside = t >= 0 && t < row.candidates;
      values[i] = is_inside ? unpooled(params, parts, outer, t) : outside;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPoolEntries / kPoolThreads; ++j) {
      const float* window = values + threadIdx.x + j * kPoolThreads;
      float pooled = window[0];
      for (int i = 1; i <= 2 * side; ++i) {
        pooled = params.pool == Pool::kMax ? fmaxf(pooled, window[i]) : pooled + window[i];
      }
      results[j] = reduced(params.group_reduce, results[j], pooled);
    }
    __syncthreads();
  }
  float* scores = score.scores + row.b * score.score_stride[0] + row.h * score.score_stride[1];
#pragma unroll
  for (int j = 0; j < kPoolEntries / kPoolThreads; ++j) {
    const int32_t t = first + threadIdx.x + j * kPoolThreads;
    if (t < score.length) {
      scores[t] = t < row.candidates ? results[j] * params.weight : -INFINITY;
    }
  }
}

// --- Launching -------------------------------------------------------------------------------------

// Rows of a chunk, and of a warp, whose rows are of one q head where that matters.
struct ScoreSizes {
  int rows, unit, ctas_per_sm;
};

ScoreSizes general_sizes(const ScoreArgs& args) {
  if (args.keys.dtype != DType::kFloat32) return {128, 32, 2};
  return {args.keys.shape[3] > 128 ? 32 : 64, 16, 2};
}

// Whether heads have to be told apart: sums over everything can be made in any order.
bool keeps_heads(const ScoreArgs& args) {
  return args.window_reduce == Reduce::kMax || args.group_reduce == Reduce::kMax ||
         (args.order == Order::kPoolFirst && args.pool == Pool::kMax && args.pool_width > 1);
}

int num_splits(const ScoreArgs& args, int64_t num_chunks, int ctas_per_sm) {
  const int sms =
      device_attribute("score", args.keys.device.index, cudaDevAttrMultiProcessorCount);
  const int64_t rows = std::max<int64_t>(1, args.scores.shape[0] * args.scores.shape[1]);
  const int64_t wave = int64_t{sms} * ctas_per_sm / (rows * num_chunks);
  // One wave of equal CTAs; or, if that would leave many idle, several waves of small ones.
  const int64_t splits = wave >= 4 ? wave : 4 * sms * ctas_per_sm / (rows * num_chunks) + 1;
  return static_cast<int>(std::min<int64_t>(splits, (args.keys.shape[2] + 127) / 128 + 1));
}

// How rows are dealt to chunks and chunks to CTAs.
void plan_score(const ScoreArgs& args, const ScoreSizes& sizes, ScoreParams& params) {
  params.window = static_cast<int32_t>(args.queries.shape[2]);
  params.kv_heads = static_cast<int32_t>(args.keys.shape[1]);
  params.group = static_cast<int32_t>(args.queries.shape[1]) / params.kv_heads;
  const int units = sizes.rows / sizes.unit;  // of a chunk
  int head_units = (params.window + sizes.unit - 1) / sizes.unit;
  while (head_units < units && units % head_units != 0) ++head_units;
  head_units = head_units > units ? (head_units + units - 1) / units * units : head_units;
  params.head_rows = keeps_heads(args) ? head_units * sizes.unit : params.window;
  params.num_chunks = (params.group * params.head_rows + sizes.rows - 1) / sizes.rows;
  params.parts_per_chunk = keeps_heads(args) ? std::max(1, units / head_units) : 1;
  params.num_parts = keeps_heads(args) ? params.group * std::max(1, head_units / units)
                                       : params.num_chunks;
  params.num_splits = num_splits(args, params.num_chunks, sizes.ctas_per_sm);
}

// Floats of scratch memory: partials, then parts.
int64_t partial_floats(const ScoreArgs& args, const ScoreSizes& sizes, const ScoreParams& params) {
  const int64_t rows = args.scores.shape[0] * args.scores.shape[1];
  return 2 * rows * params.num_chunks * params.num_splits * sizes.rows;
}

int64_t workspace_floats(const ScoreArgs& args, const ScoreSizes& sizes) {
  ScoreParams params = {};
  plan_score(args, sizes, params);
  return partial_floats(args, sizes, params) + args.scores.size() * params.num_parts;
}

constexpr ScoreSizes kSm90Sizes = {kSm90ScoreRows, 32, 1};

ScoreParams make_params(const ScoreArgs& args, const ScoreSizes& sizes) {
  ScoreParams params = {};
  params.queries = args.queries.data;
  params.keys = args.keys.data;
  params.seq_lens = args.seq_lens.ptr<int32_t>();
  params.sink_logits = args.sink_logits.ptr<float>();
  params.lse = args.lse.ptr<float>();
  params.scores = args.scores.ptr<float>();
  std::copy_n(args.queries.stride, 3, params.query_stride);
  std::copy_n(args.keys.stride, 3, params.key_stride);
  std::copy_n(args.lse.stride, 2, params.lse_stride);
  std::copy_n(args.scores.stride, 2, params.score_stride);
  params.length = static_cast<int32_t>(args.keys.shape[2]);
  params.head_dim = static_cast<int32_t>(args.keys.shape[3]);
  plan_score(args, sizes, params);
  params.partials = args.workspace.ptr<float2>();
  params.parts = args.workspace.ptr<float>() + partial_floats(args, sizes, params);
  params.is_aligned = rows_are_aligned(args.queries, 16) && rows_are_aligned(args.keys, 16);
  const float scale =
      args.scale != 0.f ? args.scale : 1.f / std::sqrt(static_cast<float>(params.head_dim));
  params.softcap = args.softcap;
  params.cap_scale = args.softcap > 0 ? scale / args.softcap : 0.f;
  params.multiplier = args.softcap > 0 ? kLog2e : scale * kLog2e;
  return params;
}

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

void pool_parts(const ScoreArgs& args, const ScoreParams& score) {
  PoolParams params = {};
  params.score = score;
  params.window_reduce = args.window_reduce;
  params.group_reduce = args.group_reduce;
  params.pool = args.pool;
  params.width = args.pool_width;
  const bool keeps = keeps_heads(args);
  params.num_outer = keeps && args.order == Order::kPoolFirst ? score.group : 1;
  params.parts_per_head = keeps ? score.num_parts / score.group : 0;
  params.weight = 1.f;
  if (args.window_reduce == Reduce::kMean) params.weight /= static_cast<float>(score.window);
  if (args.group_reduce == Reduce::kMean) params.weight /= static_cast<float>(score.group);
  if (args.pool == Pool::kAvg) params.weight /= static_cast<float>(args.pool_width);
  const dim3 grid((score.length + kPoolEntries - 1) / kPoolEntries,
                  static_cast<unsigned>(args.scores.shape[0] * args.scores.shape[1]));
  launch("score", score_pool_kernel,
         {grid, kPoolThreads, 0, has_sm90("score", args.keys.device.index)}, args.stream, params);
}

}  // namespace

void CudaBackend::score(const ScoreArgs& args) {
  const DeviceGuard guard(args.keys.device);
  if (args.scores.size() == 0) return;
  const bool is_sm90 = !keeps_heads(args) && sm90_score_fits(args);
  const ScoreParams params = make_params(args, is_sm90 ? kSm90Sizes : general_sizes(args));
  if (is_sm90) {
    sm90_score(args, params);
  } else {
    general_score(args, params);
  }
  pool_parts(args, params);
}

size_t CudaBackend::workspace_bytes(const ScoreArgs& args) const {
  if (args.scores.size() == 0) return 0;
  const int64_t general = workspace_floats(args, general_sizes(args));
  const int64_t sm90 = keeps_heads(args) ? 0 : workspace_floats(args, kSm90Sizes);
  return std::max(general, sm90) * sizeof(float);
}

}  // namespace adakv
