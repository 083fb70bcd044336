// What the kernels of any.cu and gram.cu share: a warp keeps values, and rows stream by.
#pragma once

#include <algorithm>

#include "common/tile.cuh"
#include "value_norm/value_norm.cuh"

namespace adakv {

// Sizes of one CTA.
template <typename Element, int kDim>
struct NormTile {
  static constexpr bool kIsFloat = sizeof(Element) == 4;
  static constexpr int kTiles = kIsFloat ? 1 : kDim > 128 ? 2 : 4;
  static constexpr int kWarpEntries = 16 * kTiles, kWarps = kIsFloat ? 4 : 8;
  static constexpr int kEntries = kWarps * kWarpEntries, kThreads = kWarps * kWarpSize;
  static constexpr int kStreamed = kIsFloat ? 16 : kDim > 128 ? 32 : 64;  // rows of a stage
  static constexpr int kStages = kIsFloat ? 2 : 4;
  static constexpr int kStageElements = kStreamed * kRowPitch<Element, kDim>;
  using Kept = KeptRows<Element, kDim, kTiles>;
  static constexpr size_t kStageBytes = kStages * kStageElements * sizeof(Element);
  // 16-bit values only pass through shared memory, before the first stage comes.
  static constexpr size_t kSharedBytes =
      kIsFloat ? kStageBytes + kWarps * Kept::kSharedBytes
               : std::max<size_t>(kStageBytes, kWarps* Kept::kSharedBytes);
};

struct NormRow {
  int32_t b, h, seq_len;

  __device__ NormRow(const ValueNormParams& params, int row) {
    b = row / params.kv_heads;
    h = row % params.kv_heads;
    seq_len = params.seq_lens ? params.seq_lens[b] : params.length;
  }
};

template <typename Tile, typename Element>
__device__ void load_values(const ValueNormParams& params,
                            const NormRow& row,
                            int32_t first_entry,
                            char* memory,
                            typename Tile::Kept& values) {
  const int warp = threadIdx.x / kWarpSize;
  char* kept = memory + (Tile::kIsFloat ? Tile::kStageBytes : 0);
  const Element* head = static_cast<const Element*>(params.values) +
                        row.b * params.value_stride[0] + row.h * params.value_stride[1];
  values.load(kept + warp * Tile::Kept::kSharedBytes, params.head_dim, params.is_aligned, head,
              [&](int i) -> const Element* {
                const int32_t t = first_entry + warp * Tile::kWarpEntries + i;
                return t < row.seq_len ? head + t * params.value_stride[2] : nullptr;
              });
  __syncthreads();
}

// Stores finish(sums[m][j]) of the kept rows 16 m + 8 j + g, added up over the four lanes of a row.
template <typename Tile, typename Finish>
__device__ void store_norms(const ValueNormParams& params,
                            const NormRow& row,
                            int32_t first_entry,
                            const float (&sums)[Tile::kTiles][2],
                            const Finish& finish) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float* norms = params.norms + row.b * params.norm_stride[0] + row.h * params.norm_stride[1];
#pragma unroll
  for (int i = 0; i < 2 * Tile::kTiles; ++i) {
    float sum = sums[i / 2][i % 2];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    const int32_t t = first_entry + warp * Tile::kWarpEntries + i * 8 + lane / 4;
    if (lane % 4 == 0 && t < params.length) norms[t] = t < row.seq_len ? finish(sum) : -INFINITY;
  }
}

}  // namespace adakv
