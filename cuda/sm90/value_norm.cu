// The L1 norms of value_norm on sm_90: the products by warpgroup instructions, Wo by the bulk copy
// engine.
//
// Two warpgroups keep 128 values each in registers, as two blocks of 64; a third fetches tiles of
// 128 rows of Wo into a ring. While one block's products are made, |.| of the other's is summed up.
#include "value_norm.cuh"

#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

namespace adakv {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kGroupEntries = 128, kEntries = 2 * kGroupEntries;  // of a CTA
constexpr int kThreads = 3 * kGroupThreads;
constexpr int kTileRows = 128;  // of Wo
constexpr int kStages = 6;
// Tiles done in straight line: a product under way at a loop's end makes ptxas serialise all of
// them (warning C7514). The last ones are filled up with tiles behind Wo, which are zeros.
constexpr int kUnrolled = 4;

template <typename Element_, int kDim>
struct NormTile {
  using Element = Element_;
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kPanelBytes = kTileRows * kPanelRowBytes;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kSteps = kDim / 16;
  static constexpr size_t kSharedBytes = kStages * kTileBytes;
};

// One thread's part of 64 values, as mma_16x8x16 takes them; zeros from `limit` on.
template <typename Tile>
__device__ void load_values(const ValueNormParams& params,
                            const typename Tile::Element* head,
                            int32_t first,
                            int32_t limit,
                            uint32_t (&values)[Tile::kSteps][4]) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x % kGroupThreads / kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t t = first + warp * 16 + lane / 4 + 8 * i;
    const uint32_t* row = reinterpret_cast<const uint32_t*>(head + t * params.value_stride[2]);
#pragma unroll
    for (int k = 0; k < Tile::kSteps; ++k) {
      values[k][i] = t < limit ? __ldg(row + k * 8 + lane % 4) : 0;
      values[k][i + 2] = t < limit ? __ldg(row + k * 8 + lane % 4 + 4) : 0;
    }
  }
}

// Starts products = values times the rows of the tile at `tile`.
template <typename Tile>
__device__ void start_products(float (&products)[64],
                               const uint32_t (&values)[Tile::kSteps][4],
                               uint32_t tile) {
  warpgroup_fence();
#pragma unroll
  for (int k = 0; k < Tile::kSteps; ++k) {
    multiply_64x128<typename Tile::Element>(
        products, values[k], column_descriptor(panel_descriptor(tile), k, Tile::kPanelBytes),
        k > 0);
  }
  warpgroup_commit();
}

// Adds |products| of rows g and g + 8; even and odd columns apart, for shorter chains.
__device__ void add_magnitudes(float (&sums)[4], const float (&products)[64]) {
#pragma unroll
  for (int j = 0; j < 64; ++j) sums[j % 4] += fabsf(products[j]);
}

__device__ void store_norms(
    float* norms, int32_t first, int32_t limit, const float (&sums)[4], float group) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x % kGroupThreads / kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = sums[2 * i] + sums[2 * i + 1];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    const int32_t t = first + warp * 16 + lane / 4 + 8 * i;
    if (lane % 4 == 0 && t < limit) norms[t] = sum / group;
  }
}

// grid: [ceil(T / kEntries), B * Hkv]; one CTA: the norms of a span of entries.
template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    value_norm_l1_kernel(const __grid_constant__ CUtensorMap w_o,
                         const __grid_constant__ ValueNormParams params) {
  using Tile = NormTile<Element, kDim>;
  extern __shared__ __align__(1024) char memory[];  // [kStages, tile]
  __shared__ Ring<kStages> ring;
  wait_for_previous_kernel();
  const int b = blockIdx.y / params.kv_heads, h = blockIdx.y % params.kv_heads;
  const int32_t seq_len = params.seq_lens ? params.seq_lens[b] : params.length;
  float* norms = params.norms + b * params.norm_stride[0] + h * params.norm_stride[1];
  const int32_t first_entry = blockIdx.x * kEntries;
  if (threadIdx.x < kEntries) {
    const int32_t t = first_entry + threadIdx.x;
    if (t >= seq_len && t < params.length) norms[t] = -INFINITY;
  }
  if (first_entry >= seq_len) return;
  if (threadIdx.x == 0) ring.init(Tile::kPanels, 2);
  __syncthreads();
  const uint32_t stages = shared_address(memory);
  const int head_tiles = (params.width + kTileRows - 1) / kTileRows;  // of a q head
  const int num_tiles = params.group * head_tiles;
  const int num_rounds = (num_tiles + kUnrolled - 1) / kUnrolled;
  const int group = threadIdx.x / kGroupThreads;
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x % kGroupThreads != 0) return;
    const uint64_t policy = normal_policy();
    for (int i = 0; i < num_rounds * kUnrolled; ++i) {
      const int q = h * params.group + i / head_tiles;
      const int32_t row = i < num_tiles ? i % head_tiles * kTileRows : params.width;
      ring.wait_empty(i);
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        copy_box(stages + i % kStages * Tile::kTileBytes + panel * Tile::kPanelBytes, &w_o,
                 {i < num_tiles ? q * kDim + panel * kPanelColumns : 0, row, 0, 0},
                 Tile::kPanelBytes, ring.full_barrier(i), policy);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const Element* head = static_cast<const Element*>(params.values) + b * params.value_stride[0] +
                          h * params.value_stride[1];
    const int32_t first = first_entry + group * kGroupEntries;
    uint32_t upper[Tile::kSteps][4], lower[Tile::kSteps][4];
    load_values<Tile>(params, head, first, seq_len, upper);
    load_values<Tile>(params, head, first + 64, seq_len, lower);
    float upper_products[64] = {}, lower_products[64] = {}, upper_sums[4] = {}, lower_sums[4] = {};
    const auto tile_at = [&](int i) { return stages + i % kStages * Tile::kTileBytes; };
    const auto give_back = [&](int i) {
      if (threadIdx.x % kGroupThreads == 0) ring.give_back(i);
    };
    for (int i = 0; i < num_rounds * kUnrolled; i += kUnrolled) {
      ring.wait_full(i);
      start_products<Tile>(upper_products, upper, tile_at(i));
#pragma unroll
      for (int u = i; u < i + kUnrolled; ++u) {
        start_products<Tile>(lower_products, lower, tile_at(u));
        warpgroup_wait<1>();
        add_magnitudes(upper_sums, upper_products);
        if (u + 1 < i + kUnrolled) {
          ring.wait_full(u + 1);
          start_products<Tile>(upper_products, upper, tile_at(u + 1));
          warpgroup_wait<1>();
        } else {
          warpgroup_wait<0>();
        }
        give_back(u);
        add_magnitudes(lower_sums, lower_products);
      }
    }
    const float heads = static_cast<float>(params.group);
    store_norms(norms, first, seq_len, upper_sums, heads);
    store_norms(norms, first + 64, seq_len, lower_sums, heads);
  }
}

template <typename Element, int kDim>
void launch_value_norm(const ValueNormArgs& args, const ValueNormParams& params) {
  using Tile = NormTile<Element, kDim>;
  const uint64_t row_bytes = args.w_o.shape[0] > 1 ? params.w_o_stride * sizeof(Element) : 16;
  const TensorMapShape shape = {
      {static_cast<uint64_t>(args.w_o.shape[1]), static_cast<uint64_t>(params.width), 1, 1},
      {row_bytes, 16, 16},
      {kPanelColumns, kTileRows, 1, 1}};
  const CUtensorMap w_o = encode_tensor_map("value_norm", params.w_o, shape);
  const dim3 grid((params.length + kEntries - 1) / kEntries,
                  static_cast<unsigned>(args.values.shape[0] * args.values.shape[1]));
  launch("value_norm", value_norm_l1_kernel<Element, kDim>,
         {grid, kThreads, Tile::kSharedBytes, true}, args.stream, w_o, params);
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
