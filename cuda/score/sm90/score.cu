// score on sm_90: the products by warpgroup instructions, the keys by the bulk copy engine.
//
// Two warpgroups work on a tile of 128 keys. For the maxima and sums each takes 64 query rows
// against all keys, so that a row's are in four lanes; for the probabilities 64 keys against all
// query rows, so that the sum over rows stays in a lane. Two CTAs share a multiprocessor: one
// multiplies while the other takes exponentials, and CTAs of the second kernel begin with their
// products while the first kernel ends.
#include "score/score.cuh"

#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"
#include "score/sm90/logits.cuh"

namespace adakv {
namespace {

constexpr int kRows = kSm90ScoreSizes.rows, kEntries = kSm90ScoreSizes.entries;  // of a tile
constexpr int kUnit = kSm90ScoreSizes.unit, kUnits = kRows / kUnit;
constexpr int kGroupWarps = 4, kGroupThreads = kGroupWarps * kWarpSize;
constexpr int kThreads = 2 * kGroupThreads, kCtas = kSm90ScoreSizes.ctas_per_sm;

template <typename Element_, int kDim>
struct ScoreTile {
  using Element = Element_;
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kPanelBytes = kEntries * kPanelRowBytes;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kStages = kPanels == 1 ? 5 : 2;
  static constexpr int kSteps = kDim / 16;
  static constexpr size_t kSharedBytes = (kStages + 1) * kTileBytes;  // the queries, then the ring
};

// A CTA's place in the grid [splits or spans, chunks, B * Hkv], and a thread's in the CTA.
struct Place {
  ScoreRow row;
  int chunk, group, warp, lane;  // the warp is of the warpgroup

  __device__ explicit Place(const ScoreParams& params) : row(params, blockIdx.z) {
    chunk = blockIdx.y;
    group = threadIdx.x / kGroupThreads;
    warp = threadIdx.x / kWarpSize % kGroupWarps;
    lane = threadIdx.x % kWarpSize;
  }
};

// Tiles of keys: tile i is at entry first + i * step and comes to stage i % kStages.
template <typename Tile>
struct KeyStages {
  const CUtensorMap* keys;
  char* memory;       // [kStages, kTileBytes]
  uint64_t* arrived;  // [kStages]   barriers
  int32_t first, step, count;
  bool is_read_again;  // soon, so that the cache should hold them

  /// By one thread: tile i, if there is one. All are done with the tile before it in its stage.
  __device__ void load(const Place& place, int32_t i) const {
    if (i >= count) return;
    const uint64_t policy = is_read_again ? normal_policy() : read_once_policy();
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      copy_box(tile(i) + panel * Tile::kPanelBytes, keys,
               {panel * kPanelColumns, first + i * step, place.row.h, place.row.b},
               Tile::kPanelBytes, shared_address(&arrived[i % Tile::kStages]), policy);
    }
  }

  __device__ void wait(int32_t i) const {
    wait_barrier(shared_address(&arrived[i % Tile::kStages]), i / Tile::kStages % 2);
  }

  __device__ uint32_t tile(int32_t i) const {
    return shared_address(memory) + i % Tile::kStages * Tile::kTileBytes;
  }
};

// The chunk's queries to shared memory, zeros for rows that only fill up. All loads are on their
// way before the first is stored.
template <typename Tile>
__device__ void load_queries(const ScoreParams& params, const Place& place, char* memory) {
  using Element = typename Tile::Element;
  constexpr int kChunks = Tile::kSteps * 2;  // 16 bytes each
  constexpr int kLoads = kRows * kChunks / kThreads;
  uint4 loaded[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int i = threadIdx.x + j * kThreads;
    const Element* query = query_row<Element>(params, place.row, place.chunk * kRows + i / kChunks);
    loaded[j] = uint4{};
    if (query) loaded[j] = __ldg(reinterpret_cast<const uint4*>(query) + i % kChunks);
  }
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int i = threadIdx.x + j * kThreads, chunk = i % kChunks;
    char* to = memory + chunk / 8 * Tile::kPanelBytes + panel_offset(i / kChunks, chunk % 8);
    *reinterpret_cast<uint4*>(to) = loaded[j];
  }
  fence_before_boxes();
}

// Barriers, the first tiles and the queries: what comes before the first product.
template <typename Tile>
__device__ void begin_tiles(const ScoreParams& params,
                            const Place& place,
                            const KeyStages<Tile>& stages,
                            char* queries) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      init_barrier(shared_address(&stages.arrived[i]), Tile::kPanels);
    }
    fence_barriers();
    for (int i = 0; i < Tile::kStages; ++i) stages.load(place, i);
  }
  load_queries<Tile>(params, place, queries);
  __syncthreads();
}

// sums = 64 rows of the tile at `a` times all 128 rows of the tile at `b`.
template <typename Tile>
__device__ void multiply_tiles(float (&sums)[64], uint32_t a, uint32_t b) {
  warpgroup_fence();
#pragma unroll
  for (int k = 0; k < Tile::kSteps; ++k) {
    multiply_64x128<typename Tile::Element>(
        sums, column_descriptor(panel_descriptor(a), k, Tile::kPanelBytes),
        column_descriptor(panel_descriptor(b), k, Tile::kPanelBytes), k > 0);
  }
  warpgroup_commit();
  warpgroup_wait<0>();
}

// One CTA: maxima and sums of a chunk's rows over a split of keys. Tiles go backwards: the last
// keys that are read are still in the cache when the next kernel begins with them.
template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, kCtas)
    score_lse_kernel(const __grid_constant__ CUtensorMap keys,
                     const __grid_constant__ ScoreParams params) {
  using Tile = ScoreTile<Element, kDim>;
  extern __shared__ __align__(1024) char memory[];
  __shared__ uint64_t arrived[Tile::kStages];
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const Place place(params);
  if (place.row.candidates <= 0) return;
  const TileRange range(place.row.seq_len, kEntries, blockIdx.x, params.lse_splits);
  const int32_t count = range.end - range.begin;
  const KeyStages<Tile> stages = {
      &keys, memory + Tile::kTileBytes, arrived, (range.end - 1) * kEntries, -kEntries, count,
      true};
  begin_tiles(params, place, stages, memory);
  const int r = place.group * 64 + place.warp * 16 + place.lane / 4;
  const int32_t visible = visible_entries(params, place.row, place.chunk * kRows + r);
  const int32_t visible_below = visible_entries(params, place.row, place.chunk * kRows + r + 8);
  float2 sum = {kLowest, 0.f}, sum_below = {kLowest, 0.f};  // of rows r and r + 8
  for (int32_t i = 0; i < count; ++i) {
    float x[64];
    stages.wait(i);
    multiply_tiles<Tile>(x, shared_address(memory) + place.group * 64 * kPanelRowBytes,
                         stages.tile(i));
    __syncthreads();
    if (threadIdx.x == 0) stages.load(place, i + Tile::kStages);
    const int32_t tile = range.end - 1 - i;
    if ((tile + 1) * kEntries > place.row.candidates) {
      const int32_t first = tile * kEntries + place.lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 64; ++j) {
        const int32_t t = first + j / 4 * 8 + j % 2;
        if (t >= (j % 4 < 2 ? visible : visible_below)) x[j] = -INFINITY;
      }
    }
    add_logits(sum, x, 0, params.multiplier);
    add_logits(sum_below, x, 2, params.multiplier);
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    sum = join(sum,
               {__shfl_xor_sync(kFullWarp, sum.x, step), __shfl_xor_sync(kFullWarp, sum.y, step)});
    sum_below = join(sum_below, {__shfl_xor_sync(kFullWarp, sum_below.x, step),
                                 __shfl_xor_sync(kFullWarp, sum_below.y, step)});
  }
  if (place.lane % 4 == 0) {
    const int64_t chunk = int64_t{blockIdx.z} * params.num_chunks + place.chunk;
    float2* partials = params.partials + (chunk * params.lse_splits + blockIdx.x) * kRows;
    partials[r] = sum;
    partials[r + 8] = sum_below;
  }
}

// The sums of an entry's probabilities over all rows, from products x of entries g and g + 8 in
// lanes 4 g + t. All four lanes get both.
__device__ float2 sum_rows(const float (&x)[64], const float* lse, float multiplier) {
  const float* lane_lse = lse + threadIdx.x % 4 * 2;
  float even = 0.f, odd = 0.f, even_below = 0.f, odd_below = 0.f;
#pragma unroll
  for (int j = 0; j < 64; j += 4) {
    const float2 l = *reinterpret_cast<const float2*>(lane_lse + j * 2);
    even += fast_exp2(fmaf(x[j], multiplier, -l.x));
    odd += fast_exp2(fmaf(x[j + 1], multiplier, -l.y));
    even_below += fast_exp2(fmaf(x[j + 2], multiplier, -l.x));
    odd_below += fast_exp2(fmaf(x[j + 3], multiplier, -l.y));
  }
  float2 sum = {even + odd, even_below + odd_below};
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    sum.x += __shfl_xor_sync(kFullWarp, sum.x, step);
    sum.y += __shfl_xor_sync(kFullWarp, sum.y, step);
  }
  return sum;
}

// The same with maxima over the window, which only the highest logits are raised to a power for: of
// every head of `head_units` units, summed up or the highest.
__device__ float2 reduce_heads(
    const float (&x)[64], const float* lse, float multiplier, int head_units, bool is_max) {
  const float* lane_lse = lse + threadIdx.x % 4 * 2;
  float highest[2][kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    highest[0][u] = highest[1][u] = -INFINITY;
#pragma unroll
    for (int j = u * kUnit / 2; j < (u + 1) * kUnit / 2; j += 4) {
      const float2 l = *reinterpret_cast<const float2*>(lane_lse + j * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float z = fmaf(x[j + 2 * i], multiplier, -l.x);
        highest[i][u] = fmaxf(highest[i][u], fmaxf(z, fmaf(x[j + 2 * i + 1], multiplier, -l.y)));
      }
    }
  }
  float result[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // lane 4 g + t gets unit t's maximum over the four lanes
    const bool is_upper = threadIdx.x & 2, is_odd = threadIdx.x & 1;
    const auto exchange = [](bool keeps_second, float first, float second, int step) {
      const float kept = keeps_second ? second : first, sent = keeps_second ? first : second;
      return fmaxf(kept, __shfl_xor_sync(kFullWarp, sent, step));
    };
    const float even = exchange(is_upper, highest[i][0], highest[i][2], 2);
    const float odd = exchange(is_upper, highest[i][1], highest[i][3], 2);
    float z = exchange(is_odd, even, odd, 1);
    for (int step = 1; step < head_units; step *= 2) {
      z = fmaxf(z, __shfl_xor_sync(kFullWarp, z, step));
    }
    float p = fast_exp2(z);
    for (int step = head_units; step < kUnits; step *= 2) {
      const float other = __shfl_xor_sync(kFullWarp, p, step);
      p = is_max ? fmaxf(p, other) : p + other;
    }
    result[i] = p;
  }
  return {result[0], result[1]};
}

// One CTA: the scores of a span of entries, or a chunk's part of them. kIsMax: the window is
// reduced by maximum, else by sum.
template <typename Element, int kDim, bool kIsMax>
__global__ void __launch_bounds__(kThreads, kCtas)
    score_probs_kernel(const __grid_constant__ CUtensorMap keys,
                       const __grid_constant__ ScoreParams params) {
  using Tile = ScoreTile<Element, kDim>;
  extern __shared__ __align__(1024) char memory[];
  __shared__ uint64_t arrived[Tile::kStages];
  __shared__ PoolRing<kEntries> pool;
  __shared__ __align__(8) float lse[kRows];
  if (params.lse) wait_for_previous_kernel();  // else the one before this has waited for inputs
  let_next_kernel_begin();
  const Place place(params);
  const Span span(params, place.row, kEntries, blockIdx.x);
  const int32_t count = span.num_tiles;
  const KeyStages<Tile> stages = {
      &keys, memory + Tile::kTileBytes, arrived, span.first, kEntries, count, false};
  float* to = score_row(params, place.row);
  if (params.num_parts > 1) {
    to = params.parts + (int64_t{blockIdx.z} * params.num_parts + place.chunk) * params.length;
  }
  if (count > 0) begin_tiles(params, place, stages, memory);
  for (int32_t i = 0; i < count; ++i) {
    float x[64];
    stages.wait(i);
    multiply_tiles<Tile>(x, stages.tile(i) + place.group * 64 * kPanelRowBytes,
                         shared_address(memory));
    if (i == 0) {
      wait_for_previous_kernel();
      const float row = row_lse<kRows>(params, place.row, place.chunk, threadIdx.x / 2);
      if (place.lane % 2 == 0) lse[threadIdx.x / 2] = row;
    }
    __syncthreads();
    if (threadIdx.x == 0) stages.load(place, i + Tile::kStages);
    const float2 values =
        kIsMax ? reduce_heads(x, lse, params.multiplier, params.head_rows / kUnit, params.is_max)
               : sum_rows(x, lse, params.multiplier);
    const int lane_row = place.lane % 4;
    if (lane_row < 2) {
      const int32_t t = span.first + i * kEntries + place.group * 64 + place.warp * 16;
      pool.put(params, place.row, t + place.lane / 4 + lane_row * 8,
               lane_row == 0 ? values.x : values.y);
    }
    if (i > 0 && threadIdx.x < kEntries) pool.store(params, span, i - 1, threadIdx.x, to);
  }
  __syncthreads();
  if (count > 0 && threadIdx.x < kEntries) pool.store(params, span, count - 1, threadIdx.x, to);
  wait_for_previous_kernel();
  if (params.num_parts == 1) {
    fill_scores(params, place.row, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
  }
}

template <typename Element, int kDim>
void launch_score(const ScoreArgs& args, const ScoreParams& params) {
  using Tile = ScoreTile<Element, kDim>;
  TensorMapShape<4> shape = {
      {kDim, static_cast<uint64_t>(params.length), static_cast<uint64_t>(args.keys.shape[1]),
       static_cast<uint64_t>(args.keys.shape[0])},
      {},
      {kPanelColumns, kEntries, 1, 1}};
  for (int i = 0; i < 3; ++i) {  // strides of dimensions of one element mean nothing
    const bool matters = args.keys.shape[2 - i] > 1;
    shape.stride[i] = matters ? args.keys.stride[2 - i] * sizeof(Element) : 16;
  }
  const CUtensorMap keys = encode_tensor_map("score", params.keys, shape);
  const unsigned rows = static_cast<unsigned>(args.scores.shape[0] * args.scores.shape[1]);
  const auto launch_over = [&](auto kernel, int splits) {
    const LaunchShape launch_shape = {dim3(splits, params.num_chunks, rows), kThreads,
                                      Tile::kSharedBytes, true};
    launch("score", kernel, launch_shape, args.stream, keys, params);
  };
  if (!params.lse) launch_over(score_lse_kernel<Element, kDim>, params.lse_splits);
  if (args.window_reduce == Reduce::kMax) {
    launch_over(score_probs_kernel<Element, kDim, true>, params.num_spans);
  } else {
    launch_over(score_probs_kernel<Element, kDim, false>, params.num_spans);
  }
}

}  // namespace

bool sm90_score_fits(const ScoreArgs& args) {
  const TensorView& keys = args.keys;
  const bool is_max = args.window_reduce == Reduce::kMax;
  if (keeps_heads(args) && !(is_max && !pools_heads(args) && args.queries.shape[2] <= kRows)) {
    return false;
  }
  bool fits = keys.dtype != DType::kFloat32 && (keys.shape[3] == 64 || keys.shape[3] == 128);
  for (int i = 0; i < 3; ++i) fits &= keys.stride[i] > 0 || keys.shape[i] == 1;
  return fits && args.scale >= 0.f && args.softcap == 0.f && rows_are_aligned(keys, 16) &&
         rows_are_aligned(args.queries, 16) && has_wgmma("score", keys.device.index);
}

void sm90_score(const ScoreArgs& args, const ScoreParams& params) {
  dispatch_dtype(args.keys.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    if constexpr (sizeof(Element) == 2) {
      if (params.head_dim == 64) {
        launch_score<Element, 64>(args, params);
      } else {
        launch_score<Element, 128>(args, params);
      }
    }
  });
}

}  // namespace adakv
