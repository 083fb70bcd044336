// score on sm_90: the products by warpgroup instructions, the keys by the bulk copy engine.
//
// Of the 17 warps of a CTA the last one fetches tiles of 128 keys into a ring. Four warpgroups work
// on them, two on each tile and the pairs on tiles in turn. For the maxima and sums a warpgroup
// takes 64 query rows against all keys of a tile, so that a row's are in four lanes; for the
// probabilities 64 keys against all query rows, so that the sum over rows stays in a lane.
#include "score.cuh"

#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

namespace adakv {
namespace {

constexpr int kRows = kSm90ScoreRows, kEntries = 128;  // of a tile
constexpr int kGroupWarps = 4, kGroupThreads = kGroupWarps * kWarpSize;
constexpr int kGroups = 4, kWorkers = kGroups * kGroupThreads;
constexpr int kThreads = kWorkers + kWarpSize;

template <typename Element_, int kDim>
struct ScoreTile {
  using Element = Element_;
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kPanelBytes = kEntries * kPanelRowBytes;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kStages = kPanels == 1 ? 8 : 5;
  static constexpr int kSteps = kDim / 16;
  static constexpr size_t kSharedBytes = (kStages + 1) * kTileBytes;  // the queries, then the ring
};

// The CTA's place in the grid [splits, chunks, B * Hkv] and its roles.
struct Place {
  ScoreRow row;
  int chunk, group, pair, half;
  bool is_loader;

  __device__ explicit Place(const ScoreParams& params) : row(params, blockIdx.z) {
    chunk = blockIdx.y;
    group = threadIdx.x / kGroupThreads;
    pair = group / 2;
    half = group % 2;
    is_loader = group == kGroups;
  }
};

// Fetches `count` tiles from `first` on, `step` (1 or -1) apart.
template <typename Tile>
__device__ void load_tiles(const CUtensorMap& keys,
                           const Place& place,
                           Ring<Tile::kStages>& ring,
                           uint32_t stages,
                           int32_t first,
                           int32_t step,
                           int32_t count,
                           uint64_t policy) {
  if (threadIdx.x % kWarpSize != 0) return;
  for (int32_t i = 0; i < count; ++i) {
    ring.wait_empty(i);
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      copy_box(stages + i % Tile::kStages * Tile::kTileBytes + panel * Tile::kPanelBytes, &keys,
               {panel * kPanelColumns, (first + i * step) * kEntries, place.row.h, place.row.b},
               Tile::kPanelBytes, ring.full_barrier(i), policy);
    }
  }
}

// Between the warps that work: all but the loader.
__device__ void sync_workers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory");
}

// The workers copy the chunk's queries to shared memory, zeros for rows that only fill up. All
// loads are on their way before the first is stored.
template <typename Tile>
__device__ void load_queries(const ScoreParams& params, const Place& place, char* memory) {
  using Element = typename Tile::Element;
  constexpr int kChunks = Tile::kSteps * 2;  // 16 bytes each
  constexpr int kLoads = kRows * kChunks / kWorkers;
  uint4 loaded[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int i = threadIdx.x + j * kWorkers;
    const Element* query = query_row<Element>(params, place.row, place.chunk * kRows + i / kChunks);
    loaded[j] = uint4{};
    if (query) loaded[j] = __ldg(reinterpret_cast<const uint4*>(query) + i % kChunks);
  }
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int i = threadIdx.x + j * kWorkers, chunk = i % kChunks;
    char* to = memory + chunk / 8 * Tile::kPanelBytes + panel_offset(i / kChunks, chunk % 8);
    *reinterpret_cast<uint4*>(to) = loaded[j];
  }
  fence_before_boxes();
  sync_workers();
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

// Takes the 32 logits x[first], x[first + 1], x[first + 4], ... of a row into its maximum and sum.
__device__ void add_logits(float2& sum, const float (&x)[64], int first, float multiplier) {
  float even = x[first], odd = x[first + 1];
#pragma unroll
  for (int j = 4; j < 64; j += 4) {
    even = fmaxf(even, x[first + j]);
    odd = fmaxf(odd, x[first + j + 1]);
  }
  const float highest = fmaxf(sum.x, fmaxf(even, odd) * multiplier);
  sum.y *= fast_exp2(sum.x - highest);
  sum.x = highest;
  even = odd = 0.f;
#pragma unroll
  for (int j = 0; j < 64; j += 4) {
    even += fast_exp2(fmaf(x[first + j], multiplier, -highest));
    odd += fast_exp2(fmaf(x[first + j + 1], multiplier, -highest));
  }
  sum.y += even + odd;
}

// One CTA: maxima and sums of a chunk's rows over a span of keys.
template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    score_lse_kernel(const __grid_constant__ CUtensorMap keys,
                     const __grid_constant__ ScoreParams params) {
  using Tile = ScoreTile<Element, kDim>;
  extern __shared__ __align__(1024) char memory[];
  __shared__ Ring<Tile::kStages> ring;
  __shared__ float2 joined[2][kRows];
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const Place place(params);
  if (place.row.candidates <= 0) return;
  if (threadIdx.x == 0) {
    ring.init(Tile::kPanels, 2);
    if (place.chunk == 0) params.arrivals[blockIdx.z * params.num_splits + blockIdx.x] = 0;
  }
  __syncthreads();
  const uint32_t queries = shared_address(memory), stages = queries + Tile::kTileBytes;
  const TileRange range(place.row.seq_len, kEntries, blockIdx.x, params.num_splits);
  if (place.is_loader) {
    load_tiles<Tile>(keys, place, ring, stages, range.begin, 1, range.end - range.begin,
                     normal_policy());
  } else {
    load_queries<Tile>(params, place, memory);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kGroupWarps;
    const int r = place.half * 64 + warp * 16 + lane / 4;
    const int32_t visible = visible_entries(params, place.row, place.chunk * kRows + r);
    const int32_t visible_below = visible_entries(params, place.row, place.chunk * kRows + r + 8);
    float2 sum = {kLowest, 0.f}, sum_below = {kLowest, 0.f};  // of rows r and r + 8
    for (int32_t i = place.pair; i < range.end - range.begin; i += 2) {
      float x[64];
      ring.wait_full(i);
      multiply_tiles<Tile>(x, queries + place.half * 64 * kPanelRowBytes,
                           stages + i % Tile::kStages * Tile::kTileBytes);
      if (threadIdx.x % kGroupThreads == 0) ring.give_back(i);
      const int32_t first = (range.begin + i) * kEntries + lane % 4 * 2;
      if ((range.begin + i + 1) * kEntries > place.row.candidates) {
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
      sum = join(
          sum, {__shfl_xor_sync(kFullWarp, sum.x, step), __shfl_xor_sync(kFullWarp, sum.y, step)});
      sum_below = join(sum_below, {__shfl_xor_sync(kFullWarp, sum_below.x, step),
                                   __shfl_xor_sync(kFullWarp, sum_below.y, step)});
    }
    if (lane % 4 == 0) {
      joined[place.pair][r] = sum;
      joined[place.pair][r + 8] = sum_below;
    }
  }
  __syncthreads();
  const int64_t partial =
      (int64_t{blockIdx.z} * params.num_chunks + place.chunk) * params.num_splits + blockIdx.x;
  if (threadIdx.x < kRows) {
    params.partials[partial * kRows + threadIdx.x] =
        join(joined[0][threadIdx.x], joined[1][threadIdx.x]);
  }
}

// --- Pooling, by the workers; of the one part that there is --------------------------------------

__device__ float* score_row(const ScoreParams& params, const Place& place) {
  return params.scores + place.row.b * params.score_stride[0] +
         place.row.h * params.score_stride[1];
}

// The scores of entries begin .. end - 1. `values` is shared memory, [capacity].
__device__ void pool_entries(const ScoreParams& params,
                             const Place& place,
                             int32_t begin,
                             int32_t end,
                             float* values,
                             int32_t capacity) {
  const float* part = params.parts + int64_t{blockIdx.z} * params.length;
  float* scores = score_row(params, place);
  const bool is_max = params.pool == Pool::kMax;
  const float outside = is_max ? -INFINITY : 0.f;
  const int32_t most = capacity - 2 * params.side;
  for (int32_t first = begin; first < end; first += most) {
    const int32_t count = min(end - first, most);
    sync_workers();
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < count + 2 * params.side; i += kWorkers) {
      const int32_t t = first - params.side + i;
      values[i] = t >= 0 && t < place.row.candidates ? __ldcg(part + t) : outside;
    }
    sync_workers();
    for (int32_t i = threadIdx.x; i < count; i += kWorkers) {
      float pooled = values[i];
      for (int32_t j = 1; j <= 2 * params.side; ++j) {
        pooled = is_max ? fmaxf(pooled, values[i + j]) : pooled + values[i + j];
      }
      scores[first + i] = pooled * params.weight;
    }
  }
}

// Scores of a span. Those near a border to a neighbour need the parts of both: the CTA that comes
// second makes them.
__device__ void pool_span(const ScoreParams& params,
                          const Place& place,
                          const TileRange& range,
                          float* values,
                          int32_t capacity) {
  __shared__ int32_t arrived[2];  // whether the neighbours before and after have been here
  if (range.begin >= range.end) return;
  int32_t begin = range.begin * kEntries;
  int32_t end = min(range.end * kEntries, place.row.candidates);
  const bool has_before = begin > 0, has_after = end < place.row.candidates;
  sync_workers();
  if (threadIdx.x < 2) {
    const bool is_shared = params.side > 0 && (threadIdx.x == 0 ? has_before : has_after);
    int32_t* border = params.arrivals + blockIdx.z * params.num_splits + blockIdx.x - 1 +
                      static_cast<int>(threadIdx.x);
    __threadfence();
    arrived[threadIdx.x] = is_shared ? atomicAdd(border, 1) : 0;
    __threadfence();
  }
  sync_workers();
  if (has_before) begin += arrived[0] ? -params.side : params.side;
  if (has_after) end += arrived[1] ? params.side : -params.side;
  pool_entries(params, place, begin, min(end, place.row.candidates), values, capacity);
}

// Entries that don't compete; all CTAs of a row take their share.
__device__ void fill_rest(const ScoreParams& params, const Place& place) {
  float* scores = score_row(params, place);
  const int32_t step = params.num_splits * kGroups * kGroupThreads;
  for (int32_t t = max(place.row.candidates, 0) + blockIdx.x * kWorkers + threadIdx.x;
       t < params.length; t += step) {
    scores[t] = -INFINITY;
  }
}

// One CTA: a chunk's part for a span of entries. Tiles go backwards: the last keys that the kernel
// before has read are still in the cache.
template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    score_probs_kernel(const __grid_constant__ CUtensorMap keys,
                       const __grid_constant__ ScoreParams params) {
  using Tile = ScoreTile<Element, kDim>;
  extern __shared__ __align__(1024) char memory[];
  __shared__ Ring<Tile::kStages> ring;
  __shared__ __align__(8) float lse[kRows];
  const Place place(params);
  if (place.row.candidates <= 0) {
    wait_for_previous_kernel();
    if (params.num_parts == 1 && !place.is_loader) fill_rest(params, place);
    return;
  }
  if (threadIdx.x == 0) ring.init(Tile::kPanels, 2);
  __syncthreads();
  let_next_kernel_begin();
  const uint32_t queries = shared_address(memory), stages = queries + Tile::kTileBytes;
  const TileRange range(place.row.candidates, kEntries, blockIdx.x, params.num_splits);
  const int32_t count = range.end - range.begin;
  if (place.is_loader) {
    load_tiles<Tile>(keys, place, ring, stages, range.end - 1, -1, count, read_once_policy());
    wait_for_previous_kernel();
    return;
  }
  load_queries<Tile>(params, place, memory);
  wait_for_previous_kernel();
  if (threadIdx.x < kRows) {
    lse[threadIdx.x] = row_lse<kRows>(params, place.row, place.chunk, threadIdx.x);
  }
  sync_workers();

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kGroupWarps;
  float* parts =
      params.parts + (int64_t{blockIdx.z} * params.num_parts + place.chunk) * params.length;
  for (int32_t i = place.pair; i < count; i += 2) {
    float x[64];
    ring.wait_full(i);
    multiply_tiles<Tile>(
        x, stages + i % Tile::kStages * Tile::kTileBytes + place.half * 64 * kPanelRowBytes,
        queries);
    if (threadIdx.x % kGroupThreads == 0) ring.give_back(i);
    float even = 0.f, odd = 0.f, even_below = 0.f, odd_below = 0.f;
#pragma unroll
    for (int j = 0; j < 64; j += 4) {
      const float2 l = *reinterpret_cast<const float2*>(lse + j * 2 + lane % 4 * 2);
      even += fast_exp2(fmaf(x[j], params.multiplier, -l.x));
      odd += fast_exp2(fmaf(x[j + 1], params.multiplier, -l.y));
      even_below += fast_exp2(fmaf(x[j + 2], params.multiplier, -l.x));
      odd_below += fast_exp2(fmaf(x[j + 3], params.multiplier, -l.y));
    }
    float sum = even + odd, sum_below = even_below + odd_below;
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
      sum_below += __shfl_xor_sync(kFullWarp, sum_below, step);
    }
    const int32_t t =
        (range.end - 1 - i) * kEntries + place.half * 64 + warp * 16 + lane / 4 + lane % 4 * 8;
    if (lane % 4 < 2 && t < place.row.candidates) parts[t] = lane % 4 == 0 ? sum : sum_below;
  }
  if (params.num_parts == 1) {
    pool_span(params, place, range, reinterpret_cast<float*>(memory),
              Tile::kSharedBytes / sizeof(float));  // all tiles are done with
    fill_rest(params, place);
  }
}

template <typename Element, int kDim>
void launch_score(const ScoreArgs& args, const ScoreParams& params) {
  using Tile = ScoreTile<Element, kDim>;
  TensorMapShape shape = {
      {kDim, static_cast<uint64_t>(params.length), static_cast<uint64_t>(args.keys.shape[1]),
       static_cast<uint64_t>(args.keys.shape[0])},
      {},
      {kPanelColumns, kEntries, 1, 1}};
  for (int i = 0; i < 3; ++i) {  // strides of dimensions of one element mean nothing
    const bool matters = args.keys.shape[2 - i] > 1;
    shape.stride[i] = matters ? args.keys.stride[2 - i] * sizeof(Element) : 16;
  }
  const CUtensorMap keys = encode_tensor_map("score", params.keys, shape);
  LaunchShape launch_shape = {
      dim3(params.num_splits, params.num_chunks,
           static_cast<unsigned>(args.scores.shape[0] * args.scores.shape[1])),
      kThreads, Tile::kSharedBytes};
  if (!params.lse) {
    launch_shape.early = true;
    launch("score", score_lse_kernel<Element, kDim>, launch_shape, args.stream, keys, params);
  } else if (params.num_parts == 1) {
    const size_t bytes = launch_shape.grid.x * launch_shape.grid.z * sizeof(int32_t);
    ADAKV_CUDA_CHECK("score", cudaMemsetAsync(params.arrivals, 0, bytes,
                                              static_cast<cudaStream_t>(args.stream)));
  }
  launch("score", score_probs_kernel<Element, kDim>, launch_shape, args.stream, keys, params);
}

}  // namespace

bool sm90_score_fits(const ScoreArgs& args) {
  const TensorView& keys = args.keys;
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
