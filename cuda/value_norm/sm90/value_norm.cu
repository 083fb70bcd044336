// The L1 norms of value_norm on sm_90: the products by warpgroup instructions, Wo by the bulk copy
// engine.
#include "value_norm/value_norm.cuh"

#include "common/dispatch.cuh"
#include "common/kept_blocks.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "common/tensor_map.h"

namespace adakv {
namespace {

constexpr int kStages = 6;
// Tiles done in straight line. The last ones are filled up with tiles behind Wo, which are zeros.
constexpr int kUnrolled = 4;

template <typename Element, int kDim>
using NormTile = StreamedTile<Element, kDim, kStages>;

// Adds |products| of rows g and g + 8; even and odd columns apart, for shorter chains.
__device__ void add_magnitudes(float (&sums)[4], const float (&products)[64]) {
#pragma unroll
  for (int j = 0; j < 64; ++j) sums[j % 4] += fabsf(products[j]);
}

// grid: [ceil(T / kKeptRows), B * Hkv]; one CTA: the norms of a span of entries.
template <typename Element, int kDim>
__global__ void __launch_bounds__(kStreamThreads, 1)
    value_norm_l1_kernel(const __grid_constant__ CUtensorMap w_o,
                         const __grid_constant__ ValueNormParams params) {
  using Tile = NormTile<Element, kDim>;
  extern __shared__ __align__(1024) char stages[];
  __shared__ Ring<kStages> ring;
  wait_for_previous_kernel();
  const int b = blockIdx.y / params.kv_heads, h = blockIdx.y % params.kv_heads;
  const int32_t seq_len = params.seq_lens ? params.seq_lens[b] : params.length;
  float* norms = params.norms + b * params.norm_stride[0] + h * params.norm_stride[1];
  const int32_t first = blockIdx.x * kKeptRows;
  if (threadIdx.x < kKeptRows) {
    const int32_t t = first + threadIdx.x;
    if (t >= seq_len && t < params.length) norms[t] = -INFINITY;
  }
  if (first >= seq_len) return;
  if (threadIdx.x == 0) ring.init(Tile::kPanels, kTileReaders);
  __syncthreads();
  const int head_tiles = (params.width + kTileRows - 1) / kTileRows;  // of a q head
  const int num_tiles = params.group * head_tiles;
  const int num_rounds = (num_tiles + kUnrolled - 1) / kUnrolled;
  if (threadIdx.x / kGroupThreads == kFetchingGroup) {
    take_few_registers();
    if (threadIdx.x % kGroupThreads != 0) return;
    for (int i = 0; i < num_rounds * kUnrolled; ++i) {
      const int q = h * params.group + i / head_tiles;
      const int32_t row = i < num_tiles ? i % head_tiles * kTileRows : params.width;
      ring.wait_empty(i);
      fetch_tile<Tile>(ring, stages, i, &w_o, {i < num_tiles ? q * kDim : 0, row, 0, 0});
    }
  } else {
    take_many_registers();
    const Element* head = static_cast<const Element*>(params.values) + b * params.value_stride[0] +
                          h * params.value_stride[1];
    const int32_t own = first + threadIdx.x / kGroupThreads * kGroupRows;  // this group's first
    KeptBlocks<Tile> values([&](int i) {
      return own + i < seq_len ? head + (own + i) * params.value_stride[2] : nullptr;
    });
    float sums[2][4] = {};  // of both blocks
    for (int i = 0; i < num_rounds * kUnrolled; i += kUnrolled) {
      values.template multiply<kUnrolled>(ring, stages, i,
                                          [&](int block, int, const float(&products)[64]) {
                                            add_magnitudes(sums[block], products);
                                          });
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float sum = reduce_quad<false>(sums[j / 2][j % 2 * 2] + sums[j / 2][j % 2 * 2 + 1]);
      const int32_t t = own + j / 2 * 64 + thread_row() + j % 2 * 8;
      if (threadIdx.x % 4 == 0 && t < seq_len) norms[t] = sum / static_cast<float>(params.group);
    }
  }
}

template <typename Element, int kDim>
void launch_value_norm(const ValueNormArgs& args, const ValueNormParams& params) {
  using Tile = NormTile<Element, kDim>;
  const uint64_t row_bytes = args.w_o.shape[0] > 1 ? params.w_o_stride * sizeof(Element) : 16;
  const TensorMapShape<4> shape = {
      {static_cast<uint64_t>(args.w_o.shape[1]), static_cast<uint64_t>(params.width), 1, 1},
      {row_bytes, 16, 16},
      {kPanelColumns, kTileRows, 1, 1}};
  const CUtensorMap w_o = encode_tensor_map("value_norm", params.w_o, shape);
  const dim3 grid((params.length + kKeptRows - 1) / kKeptRows,
                  static_cast<unsigned>(args.values.shape[0] * args.values.shape[1]));
  launch("value_norm", value_norm_l1_kernel<Element, kDim>,
         {grid, kStreamThreads, NormTile<Element, kDim>::kSharedBytes, true}, args.stream, w_o,
         params);
}

}  // namespace

bool sm90_value_norm_fits(const ValueNormArgs& args) {
  const int64_t dim = args.values.shape[3];
  return args.norm == Norm::kL1 && args.values.dtype != DType::kFloat32 &&
         (dim == 64 || dim == 128) && (args.w_o.stride[0] > 0 || args.w_o.shape[0] == 1) &&
         rows_are_aligned(args.values, 16) && rows_are_aligned(args.w_o, 16) &&
         has_wgmma("value_norm", args.values.device.index);
}

void sm90_value_norm(const ValueNormArgs& args, const ValueNormParams& params) {
  dispatch_dtype(args.values.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    if constexpr (sizeof(Element) == 2) {
      if (params.head_dim == 64) {
        launch_value_norm<Element, 64>(args, params);
      } else {
        launch_value_norm<Element, 128>(args, params);
      }
    }
  });
}

}  // namespace adakv
