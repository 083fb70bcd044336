// The columns of a prompt's attention on sm_90: the products by warpgroup instructions, what
// streams by from the bulk copy engine.
//
// Most tiles hold nothing that causality or `distance` leaves out: those are done several in
// straight line, without a look at positions.
#include "score/columns.cuh"

#include "common/dispatch.cuh"
#include "common/kept_blocks.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "common/tensor_map.h"
#include "score/sm90/logits.cuh"

namespace adakv {
namespace {

constexpr int kStages = 6;
constexpr int kUnrolled = 4;  // tiles in straight line
static_assert(kColumnPadding % kKeptRows == 0 && kColumnPadding % kTileRows == 0, "padded so");

template <typename Element, int kDim>
using ColumnTile = StreamedTile<Element, kDim, kStages>;

// grid: [padded / kKeptRows, Hq, B]; one CTA: the lse of some queries. The longest rows go first.
template <typename Element, int kDim>
__global__ void __launch_bounds__(kStreamThreads, 1)
    score_columns_lse_kernel(const __grid_constant__ CUtensorMap keys,
                             const __grid_constant__ ColumnParams params) {
  using Tile = ColumnTile<Element, kDim>;
  extern __shared__ __align__(1024) char stages[];
  __shared__ Ring<kStages> ring;
  const ColumnHead head(params.score);
  if (head.candidates <= 0) return;
  const int32_t first = (gridDim.x - 1 - blockIdx.x) * kKeptRows;
  if (params.score.lse) return head.take_lse(params, first, kKeptRows);
  if (threadIdx.x == 0) ring.init(Tile::kPanels, kTileReaders);
  __syncthreads();
  // The first and the last of the queries see so many entries.
  const int32_t fewest = max(head.position(params, first) + 1, 0);
  const int32_t last = min(first + kKeptRows, params.num_queries) - 1;
  const int32_t most = max(head.position(params, last) + 1, 0);
  const int32_t count = (most + kTileRows - 1) / kTileRows;
  if (threadIdx.x / kGroupThreads == kFetchingGroup) {
    take_few_registers();
    if (threadIdx.x % kGroupThreads != 0) return;
    for (int32_t i = 0; i < count; ++i) {
      ring.wait_empty(i);
      fetch_tile<Tile>(ring, stages, i, &keys, {0, i * kTileRows, head.h, head.b});
    }
  } else {
    take_many_registers();
    const int32_t own = first + threadIdx.x / kGroupThreads * kGroupRows;  // this group's first
    KeptBlocks<Tile> queries([&](int i) { return head.query<Element>(params, own + i); });
    float2 sums[2][2];  // of rows g and g + 8 of both blocks, over the entries of this lane
    for (int i = 0; i < 4; ++i) sums[i / 2][i % 2] = {kLowest, 0.f};
    const auto add = [&](int block, int32_t, const float(&x)[64]) {
      add_logits(sums[block][0], x, 0, params.score.multiplier);
      add_logits(sums[block][1], x, 2, params.score.multiplier);
    };
    const auto add_visible = [&](int block, int32_t tile, float(&x)[64]) {
      const int32_t position = head.position(params, own + block * 64 + thread_row());
      const int32_t visible = position - tile * kTileRows - thread_column();
#pragma unroll
      for (int j = 0; j < 64; ++j) {
        const int32_t behind = j % 4 / 2 * 8 * params.stride;  // of the row g + 8
        if (j / 4 * 8 + j % 2 > visible + behind) x[j] = -INFINITY;
      }
      add(block, tile, x);
    };
    int32_t i = 0;
    for (; i + kUnrolled <= fewest / kTileRows; i += kUnrolled) {
      queries.template multiply<kUnrolled>(ring, stages, i, add);
    }
    for (; i < count; ++i) queries.template multiply<1>(ring, stages, i, add_visible);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 sum = join_quad(sums[j / 2][j % 2]);
      const int32_t w = own + j / 2 * 64 + thread_row() + j % 2 * 8;
      if (threadIdx.x % 4 == 0) head.put_lse(params, w, sum);
    }
  }
}

// grid: [ceil(candidates / kKeptRows), Hq, B]; one CTA: a q head's part of some entries. The first
// entries, which most queries count for, go first. kIsMax: over the window, else sums.
template <typename Element, int kDim, bool kIsMax>
__global__ void __launch_bounds__(kStreamThreads, 1)
    score_columns_kernel(const __grid_constant__ CUtensorMap queries,
                         const __grid_constant__ ColumnParams params) {
  using Tile = ColumnTile<Element, kDim>;
  extern __shared__ __align__(1024) char stages[];
  __shared__ Ring<kStages> ring;
  __shared__ __align__(16) float lse[kStages][kTileRows];
  const ColumnHead head(params.score);
  const int32_t first = blockIdx.x * kKeptRows;
  if (first >= head.candidates) return;
  if (threadIdx.x == 0) ring.init(Tile::kPanels + 1, kTileReaders);
  __syncthreads();
  // Tiles of queries from the first that counts for an entry, and from the first for all of them.
  const int32_t begin = head.first_query(params, first) / kTileRows;
  const int32_t count = (params.num_queries + kTileRows - 1) / kTileRows - begin;
  const int32_t full = head.first_query(params, first + kKeptRows - 1);
  const int32_t partial = min((full + kTileRows - 1) / kTileRows - begin, count);
  if (threadIdx.x / kGroupThreads == kFetchingGroup) {
    take_few_registers();
    if (threadIdx.x % kGroupThreads != 0) return;
    for (int32_t i = 0; i < count; ++i) {
      const int32_t w = (begin + i) * kTileRows;
      ring.wait_empty(i);
      fetch_tile<Tile>(ring, stages, i, &queries, {0, w, head.q, head.b});
      copy_bytes(shared_address(lse[i % kStages]), head.lse(params) + w, sizeof(lse[0]),
                 ring.full_barrier(i));
    }
  } else {
    take_many_registers();
    const int32_t own = first + threadIdx.x / kGroupThreads * kGroupRows;  // this group's first
    KeptBlocks<Tile> keys([&](int i) { return head.key_of_tensor<Element>(params, own + i); });
    float values[2][4];  // of both blocks: rows g and g + 8, even and odd queries apart
    for (int i = 0; i < 8; ++i) values[i / 4][i % 4] = kIsMax ? -INFINITY : 0.f;
    const auto take = [&](float& value, float z) {
      value = kIsMax ? fmaxf(value, z) : value + fast_exp2(z);
    };
    const auto take_all = [&](int block, int32_t tile, const float(&x)[64]) {
      const float* tile_lse = lse[tile % kStages] + thread_column();
#pragma unroll
      for (int j = 0; j < 64; j += 4) {
        const float2 l = *reinterpret_cast<const float2*>(tile_lse + j * 2);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          take(values[block][k], fmaf(x[j + k], params.score.multiplier, k % 2 ? -l.y : -l.x));
        }
      }
    };
    const auto take_reaching = [&](int block, int32_t tile, float(&x)[64]) {
      const int32_t w = (begin + tile) * kTileRows + thread_column();
      const int32_t t = own + block * 64 + thread_row();
      const int32_t reach = head.position(params, w) - params.distance - t;
#pragma unroll
      for (int j = 0; j < 64; ++j) {
        const int32_t further = (j / 4 * 8 + j % 2) * params.stride;
        if (reach + further < j % 4 / 2 * 8) x[j] = -INFINITY;
      }
      take_all(block, tile, x);
    };
    int32_t i = 0;
    for (; i < partial || (count - i) % kUnrolled != 0; ++i) {
      keys.template multiply<1>(ring, stages, i, take_reaching);
    }
    for (; i < count; i += kUnrolled) {
      keys.template multiply<kUnrolled>(ring, stages, i, take_all);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float even = values[j / 2][j % 2 * 2], odd = values[j / 2][j % 2 * 2 + 1];
      const float value = reduce_quad<kIsMax>(kIsMax ? fmaxf(even, odd) : even + odd);
      const int32_t t = own + j / 2 * 64 + thread_row() + j % 2 * 8;
      if (threadIdx.x % 4 == 0) head.put_column(params, t, kIsMax, value);
    }
  }
}

// Boxes of kTileRows rows of queries [B, Hq, W, D] or keys.
CUtensorMap tile_map(const TensorView& x) {
  TensorMapShape<4> shape = {{}, {}, {kPanelColumns, kTileRows, 1, 1}};
  for (int i = 0; i < 4; ++i) shape.size[i] = static_cast<uint64_t>(x.shape[3 - i]);
  for (int i = 0; i < 3; ++i) {  // strides of dimensions of one element mean nothing
    const bool matters = x.shape[2 - i] > 1;
    shape.stride[i] = matters ? x.stride[2 - i] * dtype_size(x.dtype) : 16;
  }
  return encode_tensor_map("score", x.data, shape);
}

template <typename Element, int kDim>
void launch_columns(const ScoreArgs& args, const ColumnParams& params) {
  const auto launch_over = [&](auto kernel, int64_t count, const CUtensorMap& streamed) {
    if (count <= 0) return;
    const dim3 grid(static_cast<unsigned>((count + kKeptRows - 1) / kKeptRows),
                    static_cast<unsigned>(args.queries.shape[1]),
                    static_cast<unsigned>(args.queries.shape[0]));
    launch("score", kernel, {grid, kStreamThreads, ColumnTile<Element, kDim>::kSharedBytes},
           args.stream, streamed, params);
  };
  const CUtensorMap keys = tile_map(args.keys), queries = tile_map(args.queries);
  const int64_t candidates = params.score.length - params.score.window;
  launch_over(score_columns_lse_kernel<Element, kDim>, params.num_queries, keys);
  if (args.window_reduce == Reduce::kMax) {
    launch_over(score_columns_kernel<Element, kDim, true>, candidates, queries);
  } else {
    launch_over(score_columns_kernel<Element, kDim, false>, candidates, queries);
  }
}

}  // namespace

bool sm90_score_columns_fits(const ScoreArgs& args) {
  if (args.layer.pages) return false;
  bool fits =
      args.keys.dtype != DType::kFloat32 && (args.keys.shape[3] == 64 || args.keys.shape[3] == 128);
  for (const TensorView* x : {&args.keys, &args.queries}) {
    for (int i = 0; i < 3; ++i) fits &= x->stride[i] > 0 || x->shape[i] == 1;
    fits &= rows_are_aligned(*x, 16) && x->size() > 0;
  }
  return fits && args.scale >= 0.f && args.softcap == 0.f &&
         has_wgmma("score", args.keys.device.index);
}

void sm90_score_columns(const ScoreArgs& args, const ColumnParams& params) {
  dispatch_dtype(args.keys.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    if constexpr (sizeof(Element) == 2) {
      if (params.score.head_dim == 64) {
        launch_columns<Element, 64>(args, params);
      } else {
        launch_columns<Element, 128>(args, params);
      }
    }
  });
}

}  // namespace adakv
