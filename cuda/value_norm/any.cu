// How far an entry can move the layer's output; see ops.h. For l1 rows of Wo stream by the values
// that a warp keeps, and |products| are summed up as they come: nothing of size [T, E] is stored.
// For l2_gram see gram.cu.
#include <algorithm>

#include "common/device_guard.h"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "cuda_backend.h"
#include "value_norm/tile.cuh"

namespace adakv {
namespace {

// grid: [ceil(T / kEntries), B * Hkv]; one CTA: the L1 norms of a span of entries.
template <typename Element, int kDim>
__global__ void __launch_bounds__((NormTile<Element, kDim>::kThreads), 1)
    value_norm_l1_kernel(const __grid_constant__ ValueNormParams params) {
  using Tile = NormTile<Element, kDim>;
  extern __shared__ __align__(16) char memory[];
  Element* stages = reinterpret_cast<Element*>(memory);
  wait_for_previous_kernel();
  const NormRow row(params, blockIdx.y);
  const int32_t first_entry = blockIdx.x * Tile::kEntries;
  float sums[Tile::kTiles][2] = {};
  if (first_entry >= row.seq_len) {
    store_norms<Tile>(params, row, first_entry, sums, [](float sum) { return sum; });
    return;
  }
  typename Tile::Kept values;
  load_values<Tile, Element>(params, row, first_entry, memory, values);

  // Stage i: kStreamed rows of Wo, of the q head i / head_stages of the group.
  const int head_stages = (params.width + Tile::kStreamed - 1) / Tile::kStreamed;
  const int num_stages = params.group * head_stages;
  const auto load = [&](int i) {
    if (i < num_stages) {
      const int q = row.h * params.group + i / head_stages;
      const int first = i % head_stages * Tile::kStreamed;
      const Element* w_o = static_cast<const Element*>(params.w_o) + q * params.head_dim;
      copy_rows<kDim>(
          stages + i % Tile::kStages * Tile::kStageElements, Tile::kStreamed, params.head_dim,
          params.is_aligned, w_o, threadIdx.x, Tile::kThreads, [&](int j) -> const Element* {
            return first + j < params.width ? w_o + (first + j) * params.w_o_stride : nullptr;
          });
    }
    commit_copies();
  };
  for (int i = 0; i < Tile::kStages - 1; ++i) load(i);
  for (int i = 0; i < num_stages; ++i) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();
    load(i + Tile::kStages - 1);
    const Element* stage = stages + i % Tile::kStages * Tile::kStageElements;
    float stage_sums[Tile::kTiles][2] = {};  // on their own: thousands of terms lose no digits
#pragma unroll 1
    for (int j = 0; j < Tile::kStreamed; j += 16) {
      float products[Tile::kTiles][2][4];
      values.multiply(stage + j * kRowPitch<Element, kDim>, products);
#pragma unroll
      for (int m = 0; m < Tile::kTiles; ++m) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          stage_sums[m][c % 4 / 2] += fabsf(products[m][c / 4][c % 4]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2 * Tile::kTiles; ++m) sums[m / 2][m % 2] += stage_sums[m / 2][m % 2];
  }
  const float group = static_cast<float>(params.group);
  store_norms<Tile>(params, row, first_entry, sums, [&](float sum) { return sum / group; });
}

// --- Launching ----------------------------------------------------------------------------------

constexpr int kGramSplits = 16;

// Scratch memory of l2_gram: partials, the Gram matrices (16-byte aligned) and their scales.
struct GramBytes {
  int64_t partials, gram, scales;
};

GramBytes gram_bytes(const ValueNormArgs& args) {
  const int64_t heads = args.values.shape[1], dim = args.values.shape[3];
  const int64_t size = heads * dim * dim;  // a multiple of 64
  return {kGramSplits * size * 4, size * static_cast<int64_t>(dtype_size(args.values.dtype)),
          heads * 4};
}

ValueNormParams make_params(const ValueNormArgs& args) {
  const TensorView& values = args.values;
  ValueNormParams params = {};
  params.values = values.data;
  params.w_o = args.w_o.data;
  params.seq_lens = args.seq_lens.ptr<int32_t>();
  params.norms = args.norms.ptr<float>();
  std::copy_n(values.stride, 3, params.value_stride);
  params.w_o_stride = args.w_o.stride[0];
  std::copy_n(args.norms.stride, 2, params.norm_stride);
  params.kv_heads = static_cast<int32_t>(values.shape[1]);
  params.length = static_cast<int32_t>(values.shape[2]);
  params.head_dim = static_cast<int32_t>(values.shape[3]);
  params.group = static_cast<int32_t>(args.w_o.shape[1]) / (params.kv_heads * params.head_dim);
  params.width = static_cast<int32_t>(args.w_o.shape[0]);
  params.is_aligned = rows_are_aligned(values, 16) && rows_are_aligned(args.w_o, 16);
  if (args.norm == Norm::kL2Gram) {
    const GramBytes bytes = gram_bytes(args);
    params.partials = args.workspace.ptr<float>();
    params.gram = args.workspace.ptr<char>() + bytes.partials;
    params.gram_scales =
        reinterpret_cast<float*>(args.workspace.ptr<char>() + bytes.partials + bytes.gram);
    params.num_splits = kGramSplits;
  }
  return params;
}

}  // namespace

void CudaBackend::value_norm(const ValueNormArgs& args) {
  const DeviceGuard guard(args.values.device);
  if (args.norms.size() == 0) return;
  const ValueNormParams params = make_params(args);
  if (sm90_value_norm_fits(args)) return sm90_value_norm(args, params);
  const bool early = has_sm90("value_norm", args.values.device.index);
  if (args.norm == Norm::kL2Gram) return value_norm_gram(args, params, early);
  dispatch_dtype(args.values.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    dispatch_tile_dim(params.head_dim, [&](auto dim) {
      using Tile = NormTile<Element, dim.value>;
      const dim3 grid((params.length + Tile::kEntries - 1) / Tile::kEntries,
                      static_cast<unsigned>(args.values.shape[0] * args.values.shape[1]));
      launch("value_norm", value_norm_l1_kernel<Element, dim.value>,
             {grid, Tile::kThreads, Tile::kSharedBytes, early}, args.stream, params);
    });
  });
}

size_t CudaBackend::workspace_bytes(const ValueNormArgs& args) const {
  if (args.norm != Norm::kL2Gram) return 0;
  const GramBytes bytes = gram_bytes(args);
  return bytes.partials + bytes.gram + bytes.scales;
}

}  // namespace adakv
