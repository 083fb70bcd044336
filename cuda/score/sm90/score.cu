// score on sm_90: the products by warpgroup instructions, the keys by the bulk copy engine.
//
// Two warpgroups work on a tile of 128 keys. For the maxima and sums each takes 64 query rows
// against all keys, so that a row's are in four lanes; for the probabilities 64 keys against all
// query rows, so that the sum over rows stays in a lane. Two CTAs share a multiprocessor: one
// multiplies while the other takes exponentials, and CTAs of the second kernel begin with their
// products while the first kernel ends. Keys in pages come page by page, each by a lane of its own.
#include "score/score.cuh"

#include <algorithm>

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

template <typename Element_, int kDim, bool kHeld_>
struct ScoreTile {
  using Element = Element_;
  static constexpr bool kHeld = kHeld_;  // keys are in pages
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

// Rows of a chunk that there are queries for, or may be. Those behind them add nothing.
__device__ int num_rows(const ScoreParams& params, const Place& place) {
  return min(kRows, params.group * params.head_rows - place.chunk * kRows);
}

// Boxes that a tile comes in: a panel's entries, or those of a page.
template <typename Tile>
__device__ int num_boxes(const ScoreParams& params) {
  return Tile::kHeld ? Tile::kPanels * (kEntries / params.tile_step) : Tile::kPanels;
}

// Threads that start the copies of boxes: of pages one each.
template <typename Tile>
__device__ int num_loaders(const ScoreParams& params) {
  return Tile::kHeld ? num_boxes<Tile>(params) : 1;
}

// Tiles of keys: tile i is at entry first + i * step and comes to stage i % kStages.
template <typename Tile>
struct KeyStages {
  const CUtensorMap* keys;
  char* memory;       // [kStages, kTileBytes]
  uint64_t* arrived;  // [kStages]   barriers
  int32_t first, step, count;
  bool is_read_again;  // soon, so that the cache should hold them
  int32_t page = 0;    // of pages: that of this thread's box of the next tile to load

  /// By the first threads, as many as there are loaders: tile i, if there is one. Tiles are loaded one
  /// after the other; all are done with the tile before this one in its stage.
  __device__ void load(const ScoreParams& params, const Place& place, int32_t i) {
    if (i >= count) return;
    const uint64_t policy = is_read_again ? normal_policy() : read_once_policy();
    if constexpr (Tile::kHeld) {
      const int32_t rows = params.tile_step;
      const int32_t panel = threadIdx.x % Tile::kPanels, piece = threadIdx.x / Tile::kPanels;
      const int32_t entry = first + i * step + piece * rows;
      copy_box(tile(i) + panel * Tile::kPanelBytes + piece * rows * kPanelRowBytes, keys,
               {panel * kPanelColumns, entry & (params.held.page_size - 1), 0, page},
               rows * kPanelRowBytes, shared_address(&arrived[i % Tile::kStages]), policy);
      find_page(params, place, i + 1);
    } else {
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        copy_box(tile(i) + panel * Tile::kPanelBytes, keys,
                 {panel * kPanelColumns, first + i * step, place.row.h, place.row.b},
                 Tile::kPanelBytes, shared_address(&arrived[i % Tile::kStages]), policy);
      }
    }
  }

  /// Of pages: the one that this thread's box of tile i lies in, or one that is not there, which reads
  /// as zeros.
  __device__ void find_page(const ScoreParams& params, const Place& place, int32_t i) {
    const int32_t piece = threadIdx.x / Tile::kPanels;
    const int32_t entry = first + i * step + piece * params.tile_step;
    const bool is_there = i < count && entry >= 0 && entry < place.row.seq_len;
    page = -1;
    if (!is_there) return;
    const int32_t* table = params.held.block_table.at(place.row.b, place.row.h);
    page = __ldg(table + (entry >> params.held.page_shift));
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
                            KeyStages<Tile>& stages,
                            char* queries) {
  if (threadIdx.x < num_loaders<Tile>(params)) {
    if constexpr (Tile::kHeld) stages.find_page(params, place, 0);
    if (threadIdx.x == 0) {
      for (int i = 0; i < Tile::kStages; ++i) {
        init_barrier(shared_address(&stages.arrived[i]), num_boxes<Tile>(params));
      }
      fence_barriers();
    }
    if constexpr (Tile::kHeld) __syncwarp(kFullWarp >> (kWarpSize - num_loaders<Tile>(params)));
    for (int i = 0; i < Tile::kStages; ++i) stages.load(params, place, i);
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
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kCtas)
    score_lse_kernel(const __grid_constant__ CUtensorMap keys,
                     const __grid_constant__ ScoreParams params) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ uint64_t arrived[Tile::kStages];
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const Place place(params);
  if (place.row.candidates <= 0) return;
  const TileRange range(place.row.seq_len, kEntries, blockIdx.x, params.lse_splits);
  const int32_t count = range.end - range.begin;
  KeyStages<Tile> stages = {
      &keys, memory + Tile::kTileBytes, arrived, (range.end - 1) * kEntries, -kEntries, count,
      true};
  begin_tiles(params, place, stages, memory);
  const int r = place.group * 64 + place.warp * 16 + place.lane / 4;
  const int rows = num_rows(params, place);
  const bool group_has_rows = place.group * 64 < rows, has_rows = r - place.lane / 4 < rows;
  const int32_t visible = visible_entries(params, place.row, place.chunk * kRows + r);
  const int32_t visible_below = visible_entries(params, place.row, place.chunk * kRows + r + 8);
  float2 sum = {kLowest, 0.f}, sum_below = {kLowest, 0.f};  // of rows r and r + 8
  for (int32_t i = 0; i < count; ++i) {
    float x[64];
    stages.wait(i);
    if (group_has_rows) {
      multiply_tiles<Tile>(x, shared_address(memory) + place.group * 64 * kPanelRowBytes,
                           stages.tile(i));
    }
    __syncthreads();
    if (threadIdx.x < num_loaders<Tile>(params)) stages.load(params, place, i + Tile::kStages);
    if (!has_rows) continue;
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
__device__ float2 sum_rows(const float (&x)[64], const float* lse, float multiplier, int num_rows) {
  const float* lane_lse = lse + threadIdx.x % 4 * 2;
  float even = 0.f, odd = 0.f, even_below = 0.f, odd_below = 0.f;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (u * kUnit >= num_rows) break;
#pragma unroll
    for (int j = u * kUnit / 2; j < (u + 1) * kUnit / 2; j += 4) {
      const float2 l = *reinterpret_cast<const float2*>(lane_lse + j * 2);
      even += fast_exp2(fmaf(x[j], multiplier, -l.x));
      odd += fast_exp2(fmaf(x[j + 1], multiplier, -l.y));
      even_below += fast_exp2(fmaf(x[j + 2], multiplier, -l.x));
      odd_below += fast_exp2(fmaf(x[j + 3], multiplier, -l.y));
    }
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
template <typename Tile, bool kIsMax>
__global__ void __launch_bounds__(kThreads, kCtas)
    score_probs_kernel(const __grid_constant__ CUtensorMap keys,
                       const __grid_constant__ ScoreParams params) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ uint64_t arrived[Tile::kStages];
  __shared__ PoolRing<kEntries> pool;
  __shared__ __align__(8) float lse[kRows];
  if (params.lse) wait_for_previous_kernel();  // else the one before this has waited for inputs
  let_next_kernel_begin();
  const Place place(params);
  const Span span(params, place.row, kEntries, blockIdx.x);
  const int32_t count = span.num_tiles;
  const int rows = num_rows(params, place);
  KeyStages<Tile> stages = {&keys, memory + Tile::kTileBytes, arrived, span.first, kEntries, count,
                            false};
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
    if (threadIdx.x < num_loaders<Tile>(params)) stages.load(params, place, i + Tile::kStages);
    const float2 values =
        kIsMax ? reduce_heads(x, lse, params.multiplier, params.head_rows / kUnit, params.is_max)
               : sum_rows(x, lse, params.multiplier, rows);
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

// The keys of a tensor, in boxes of a tile's entries.
CUtensorMap tensor_keys(const ScoreArgs& args) {
  const TensorView& keys = args.keys;
  TensorMapShape<4> shape = {
      {static_cast<uint64_t>(keys.shape[3]), static_cast<uint64_t>(keys.shape[2]),
       static_cast<uint64_t>(keys.shape[1]), static_cast<uint64_t>(keys.shape[0])},
      {},
      {kPanelColumns, kEntries, 1, 1}};
  for (int i = 0; i < 3; ++i) {  // strides of dimensions of one element mean nothing
    const bool matters = keys.shape[2 - i] > 1;
    shape.stride[i] = matters ? keys.stride[2 - i] * dtype_size(keys.dtype) : 16;
  }
  return encode_tensor_map("score", keys.data, shape);
}

// Those of pages, in boxes of `rows` slots.
CUtensorMap held_keys(const ScoreArgs& args, int32_t rows) {
  const TensorView& pages = args.layer.pages;
  const auto size = [&](int i) { return static_cast<uint64_t>(pages.shape[i]); };
  const uint64_t bytes = dtype_size(pages.dtype), slot = size(3) * bytes;
  // Strides of dimensions of one element mean nothing.
  const uint64_t page = size(0) > 1 ? pages.stride[0] * bytes : size(1) * size(2) * slot;
  const TensorMapShape<4> shape = {{size(3), size(2), size(1), std::max<uint64_t>(size(0), 1)},
                                   {slot, size(2) * slot, page},
                                   {kPanelColumns, static_cast<uint32_t>(rows), 1, 1}};
  return encode_tensor_map("score", pages.data, shape);
}

template <typename Tile>
void launch_score(const ScoreArgs& args, const ScoreParams& params) {
  const CUtensorMap keys = Tile::kHeld ? held_keys(args, params.tile_step) : tensor_keys(args);
  const unsigned rows = static_cast<unsigned>(args.scores.shape[0] * args.scores.shape[1]);
  const auto launch_over = [&](auto kernel, int splits) {
    const LaunchShape launch_shape = {dim3(splits, params.num_chunks, rows), kThreads,
                                      Tile::kSharedBytes, true};
    launch("score", kernel, launch_shape, args.stream, keys, params);
  };
  if (!params.lse) launch_over(score_lse_kernel<Tile>, params.lse_splits);
  if (args.window_reduce == Reduce::kMax) {
    launch_over(score_probs_kernel<Tile, true>, params.num_spans);
  } else {
    launch_over(score_probs_kernel<Tile, false>, params.num_spans);
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
  for (int i = 0; i < 3; ++i) fits &= keys.stride[i] > 0 || keys.shape[i] <= 1;
  if (args.layer.pages) {
    fits &= args.layer.format() == PageFormat::kPlain && rows_are_aligned(args.layer.pages, 16);
  }
  return fits && args.scale >= 0.f && args.softcap == 0.f && rows_are_aligned(keys, 16) &&
         rows_are_aligned(args.queries, 16) && has_wgmma("score", keys.device.index);
}

void sm90_score(const ScoreArgs& args, const ScoreParams& given) {
  ScoreParams params = given;
  const bool is_held = params.held.pages != nullptr;
  if (is_held) params.tile_step = std::min(params.held.page_size, kEntries);
  const auto run = [&](auto element, auto dim) {
    using Element = typename decltype(element)::type;
    if (is_held) {
      launch_score<ScoreTile<Element, dim.value, true>>(args, params);
    } else {
      launch_score<ScoreTile<Element, dim.value, false>>(args, params);
    }
  };
  dispatch_dtype(args.keys.dtype, [&](auto element) {
    if constexpr (sizeof(typename decltype(element)::type) == 2) {
      if (params.head_dim == 64) {
        run(element, IntTag<64>{});
      } else {
        run(element, IntTag<128>{});
      }
    }
  });
}

}  // namespace adakv
