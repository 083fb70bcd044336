// The norms l2_gram: v G v^T with the Gram matrix G of each kv head, which is made first: partial
// sums over parts of Wo, then their sum in the values' dtype (scaled, so that float16 holds it).
#include "common/launch.cuh"
#include "value_norm/tile.cuh"

namespace adakv {
namespace {

constexpr int kGramThreads = 256;

// Sizes of one CTA of gram_sum_kernel: a block of G by eight warps, four down and two across.
template <typename Element, int kDim>
struct GramTile {
  static constexpr int kBlock = kDim > 128 ? 128 : kDim;
  static constexpr int kRowTiles = kBlock / 64, kColumnTiles = kBlock / 16;  // of 16 and 8
  static constexpr int kStreamed = kDim * sizeof(Element) > 256 ? 16 : 32;
  static constexpr int kStages = 3;
  static constexpr int kPitch = kRowPitch<Element, kDim>;
  static constexpr int kStageElements = kStreamed * kPitch;
  static constexpr size_t kSharedBytes = kStages * kStageElements * sizeof(Element);
};

// sums += X^T X of 16 rows of X: the block of a warp that begins at row i, column j.
template <typename Tile, typename Element>
__device__ void add_squares(const Element* x,
                            int i,
                            int j,
                            float (&sums)[Tile::kRowTiles][Tile::kColumnTiles][4]) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(Element) == 2) {
    uint32_t a[Tile::kRowTiles][4], b[4];
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      const Element* at = x + (lane / 16 * 8 + lane % 8) * Tile::kPitch + lane / 8 % 2 * 8;
      load_matrices_transposed(a[m], shared_address(at + i + 16 * m));
    }
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; n += 2) {
      const Element* at = x + (lane / 8 % 2 * 8 + lane % 8) * Tile::kPitch + lane / 16 * 8;
      load_matrices_transposed(b, shared_address(at + j + 8 * n));
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        mma_16x8x16<Element>(sums[m][n], a[m], {b[0], b[1]});
        mma_16x8x16<Element>(sums[m][n + 1], a[m], {b[2], b[3]});
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < 16; ++k, x += Tile::kPitch) {
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        const float upper = x[i + 16 * m + g], lower = x[i + 16 * m + g + 8];
#pragma unroll
        for (int n = 0; n < Tile::kColumnTiles; ++n) {
          const float2 columns = *reinterpret_cast<const float2*>(x + j + 8 * n + 2 * t);
          sums[m][n][0] = fmaf(upper, columns.x, sums[m][n][0]);
          sums[m][n][1] = fmaf(upper, columns.y, sums[m][n][1]);
          sums[m][n][2] = fmaf(lower, columns.x, sums[m][n][2]);
          sums[m][n][3] = fmaf(lower, columns.y, sums[m][n][3]);
        }
      }
    }
  }
}

// grid: [blocks of G, splits, Hkv]; one CTA: one block of G, summed over a part of the rows of Wo.
template <typename Element, int kDim>
__global__ void __launch_bounds__(kGramThreads, 1)
    gram_sum_kernel(const __grid_constant__ ValueNormParams params) {
  using Tile = GramTile<Element, kDim>;
  extern __shared__ __align__(16) char memory[];
  Element* stages = reinterpret_cast<Element*>(memory);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const int h = blockIdx.z, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  constexpr int kBlocks = kDim / Tile::kBlock;
  const int i = blockIdx.x / kBlocks * Tile::kBlock + warp / 2 * (Tile::kBlock / 4);
  const int j = blockIdx.x % kBlocks * Tile::kBlock + warp % 2 * (Tile::kBlock / 2);
  // Rows of the q heads of the group, one head after the other; each split takes its share.
  const int num_rows = params.group * params.width;
  const int share = (num_rows + params.num_splits - 1) / params.num_splits;
  const int begin = min(static_cast<int>(blockIdx.y) * share, num_rows);
  const int end = min(begin + share, num_rows);
  const int num_stages = (end - begin + Tile::kStreamed - 1) / Tile::kStreamed;
  const Element* w_o = static_cast<const Element*>(params.w_o) + h * params.group * params.head_dim;
  const auto load = [&](int stage) {
    if (stage < num_stages) {
      copy_rows<kDim>(stages + stage % Tile::kStages * Tile::kStageElements, Tile::kStreamed,
                      params.head_dim, params.is_aligned, w_o, threadIdx.x, kGramThreads,
                      [&](int row) -> const Element* {
                        const int r = begin + stage * Tile::kStreamed + row;
                        return r < end ? w_o + r / params.width * params.head_dim +
                                             r % params.width * params.w_o_stride
                                       : nullptr;
                      });
    }
    commit_copies();
  };
  float sums[Tile::kRowTiles][Tile::kColumnTiles][4] = {};
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) load(stage);
  for (int stage = 0; stage < num_stages; ++stage) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();
    load(stage + Tile::kStages - 1);
    const Element* x = stages + stage % Tile::kStages * Tile::kStageElements;
#pragma unroll
    for (int k = 0; k < Tile::kStreamed; k += 16) {
      add_squares<Tile>(x + k * Tile::kPitch, i, j, sums);
    }
  }
  const int64_t dim = params.head_dim;
  float* partial = params.partials + (int64_t{blockIdx.y} * params.kv_heads + h) * dim * dim;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = i + 16 * m + lane / 4 + c / 2 * 8;
        const int column = j + 8 * n + lane % 4 * 2 + c % 2;
        if (row < dim && column < dim) partial[row * dim + column] = sums[m][n][c];
      }
    }
  }
}

// grid: [ceil(D / 8), Hkv]; one CTA: eight rows of G, in the dtype of the values. G is scaled by a
// power of two such that its largest element, which lies on the diagonal, is 1 to 2.
template <typename Element>
__global__ void __launch_bounds__(kGramThreads)
    gram_join_kernel(const __grid_constant__ ValueNormParams params) {
  __shared__ float warp_maxima[kGramThreads / kWarpSize];
  let_next_kernel_begin();
  wait_for_previous_kernel();
  const int64_t dim = params.head_dim, h = blockIdx.y;
  const auto joined = [&](int64_t at) {
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < params.num_splits; ++i) {
      sum += __ldcg(params.partials + (i * int64_t{params.kv_heads} + h) * dim * dim + at);
    }
    return sum / static_cast<float>(params.group);
  };
  const int thread = static_cast<int>(threadIdx.x);
  const float diagonal = warp_max(thread < dim ? joined(thread * dim + thread) : 0.f);
  if (thread % kWarpSize == 0) warp_maxima[thread / kWarpSize] = diagonal;
  __syncthreads();
  float largest = 0.f;
  for (float maximum : warp_maxima) largest = fmaxf(largest, maximum);
  const bool scales = sizeof(Element) == 2 && largest > 0.f && largest < INFINITY;
  const float scale = scales ? exp2f(-floorf(log2f(largest))) : 1.f;
  if (blockIdx.x == 0 && thread == 0) params.gram_scales[h] = scale;
  const int64_t first = blockIdx.x * 8 * dim, last = min(first + 8 * dim, dim * dim);
  Element* gram = static_cast<Element*>(params.gram) + h * dim * dim;
  for (int64_t at = first + thread; at < last; at += kGramThreads) {
    gram[at] = from_float<Element>(joined(at) * scale);
  }
}

// grid: [ceil(T / kEntries), B * Hkv]; one CTA: sqrt(v G v^T) of a span of entries.
template <typename Element, int kDim>
__global__ void __launch_bounds__((NormTile<Element, kDim>::kThreads), 1)
    value_norm_gram_kernel(const __grid_constant__ ValueNormParams params) {
  using Tile = NormTile<Element, kDim>;
  constexpr int kStreamed = Tile::kStages * Tile::kStreamed;  // all stages at once
  extern __shared__ __align__(16) char memory[];
  Element* stage = reinterpret_cast<Element*>(memory);
  const NormRow row(params, blockIdx.y);
  const int32_t first_entry = blockIdx.x * Tile::kEntries;
  float sums[Tile::kTiles][2] = {};
  if (first_entry >= row.seq_len) {
    wait_for_previous_kernel();
    store_norms<Tile>(params, row, first_entry, sums, [](float sum) { return sum; });
    return;
  }
  typename Tile::Kept values;
  load_values<Tile, Element>(params, row, first_entry, memory, values);
  wait_for_previous_kernel();
  const Element* gram =
      static_cast<const Element*>(params.gram) + int64_t{row.h} * params.head_dim * params.head_dim;
#pragma unroll
  for (int first = 0; first < kDim; first += kStreamed) {
    __syncthreads();
    copy_rows<kDim>(stage, min(kStreamed, kDim), params.head_dim, true, gram, threadIdx.x,
                    Tile::kThreads, [&](int i) -> const Element* {
                      return first + i < params.head_dim ? gram + (first + i) * params.head_dim
                                                         : nullptr;
                    });
    commit_copies();
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < min(kStreamed, kDim); j += 16) {
      if (first + j >= params.head_dim) break;
      float products[Tile::kTiles][2][4], elements[2][4];
      values.multiply(stage + j * kRowPitch<Element, kDim>, products);
#pragma unroll
      for (int m = 0; m < Tile::kTiles; ++m) {
        values.columns(m, (first + j) / 16, elements);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          sums[m][c % 4 / 2] += products[m][c / 4][c % 4] * elements[c / 4][c % 4];
        }
      }
    }
  }
  const float scale = __ldcg(params.gram_scales + row.h);
  store_norms<Tile>(params, row, first_entry, sums,
                    [&](float sum) { return sqrtf(fmaxf(sum, 0.f) / scale); });
}

template <typename Element, int kDim>
void launch_gram(const ValueNormArgs& args,
                 const ValueNormParams& params,
                 const dim3& grid,
                 bool early) {
  constexpr int kGramDim = kDim == 96 ? 128 : kDim;  // blocks of G are 64 or 128 wide
  using Gram = GramTile<Element, kGramDim>;
  using Tile = NormTile<Element, kDim>;
  constexpr unsigned kBlocks = kGramDim / Gram::kBlock;
  const unsigned heads = params.kv_heads;
  launch(
      "value_norm", gram_sum_kernel<Element, kGramDim>,
      {dim3(kBlocks * kBlocks, params.num_splits, heads), kGramThreads, Gram::kSharedBytes, early},
      args.stream, params);
  launch("value_norm", gram_join_kernel<Element>,
         {dim3((params.head_dim + 7) / 8, heads), kGramThreads, 0, early}, args.stream, params);
  launch("value_norm", value_norm_gram_kernel<Element, kDim>,
         {grid, Tile::kThreads, Tile::kSharedBytes, early}, args.stream, params);
}

}  // namespace

void value_norm_gram(const ValueNormArgs& args, const ValueNormParams& params, bool early) {
  dispatch_dtype(args.values.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    dispatch_tile_dim(params.head_dim, [&](auto dim) {
      using Tile = NormTile<Element, dim.value>;
      const dim3 grid((params.length + Tile::kEntries - 1) / Tile::kEntries,
                      static_cast<unsigned>(args.values.shape[0] * args.values.shape[1]));
      launch_gram<Element, dim.value>(args, params, grid, early);
    });
  });
}

}  // namespace adakv
