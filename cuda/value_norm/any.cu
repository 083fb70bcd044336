// The norms l1 for any head dim, dtype and address: the definition, told step by step.
//
//   norms[h, t] = mean over the group's q heads q of
//                 sum over e of |Wo[e, q D .. q D + D) . values[h, t]|
//
// grid: [ceil(T / kEntries), B * Hkv]; one CTA: the norms of a span of entries. A warp keeps the
// values of its entries, and the rows of Wo stream by in stages of shared memory, one q head of the
// group after the other. |products| are summed up as they come: nothing of size [T, E] is stored.
#include "common/launch.cuh"
#include "value_norm/tile.cuh"

namespace adakv {
namespace {

template <typename Element, int kDim>
__global__ void __launch_bounds__((NormTile<Element, kDim>::kThreads), 1)
    value_norm_l1_kernel(const __grid_constant__ ValueNormParams params) {
  using Tile = NormTile<Element, kDim>;
  extern __shared__ __align__(16) char memory[];
  Element* stages = reinterpret_cast<Element*>(memory);  // [kStages, kStreamed, pitch]
  wait_for_previous_kernel();
  const NormRow row(params, blockIdx.y);
  const int32_t first_entry = blockIdx.x * Tile::kEntries;
  float sums[Tile::kTiles][2] = {};  // of entries 16 m + g and 16 m + 8 + g, over this lane's rows

  // 1. A span of padding has norms of -inf, and nothing to compute.
  if (first_entry >= row.seq_len) {
    store_norms<Tile>(params, row, first_entry, sums, [](float sum) { return sum; });
    return;
  }

  // 2. Each warp fetches its entries' values.
  typename Tile::Kept values;
  load_values<Tile, Element>(params, row, first_entry, memory, values);

  // 3. Wo comes in stages of kStreamed rows, kStages - 1 of them on their way at a time. Stage i is
  //    of the q head i / head_stages of the group.
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

    // 4. The products of all kept values and 16 rows at a time, and the sums of their sizes.
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

  // 5. The four lanes that share an entry add up their sums; the mean over the group is the norm.
  const float group = static_cast<float>(params.group);
  store_norms<Tile>(params, row, first_entry, sums, [&](float sum) { return sum / group; });
}

}  // namespace

void any_value_norm(const ValueNormArgs& args, const ValueNormParams& params, bool early) {
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

}  // namespace adakv
