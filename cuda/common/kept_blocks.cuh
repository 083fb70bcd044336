// Rows that stay in registers, times rows that stream by: what long products on sm_90 are made of.
//
// A CTA is three warpgroups. Two keep 128 rows each, as two blocks of 64; the third fetches tiles of
// 128 rows into a ring by the bulk copy engine. While one block's products are made, the other's
// are used.
#pragma once

#include "common/reduce.cuh"
#include "common/wgmma.cuh"

namespace adakv {

constexpr int kGroupThreads = 128;
constexpr int kGroupRows = 128, kKeptRows = 2 * kGroupRows;  // kept by a warpgroup, by a CTA
constexpr int kStreamThreads = 3 * kGroupThreads;
constexpr int kTileRows = 128;
constexpr int kFetchingGroup = 2;
constexpr int kTileReaders = 2 * kGroupThreads / kWarpSize;  // warps that give a stage back

/// Tiles of 128 rows of 16 bits in a ring of kStages.
template <typename Element_, int kDim_, int kStages_>
struct StreamedTile {
  using Element = Element_;
  static constexpr int kDim = kDim_, kStages = kStages_;
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kPanelBytes = kTileRows * kPanelRowBytes;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kSteps = kDim / 16;
  static constexpr size_t kSharedBytes = kStages * kTileBytes;
};

/// Registers go from the warpgroup that fetches to those that compute.
__device__ inline void take_few_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
}
__device__ inline void take_many_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
}

/// A thread's products: of row thread_row() of 64 and the one 8 further, at columns
/// 8 j + thread_column() and the next.
__device__ inline int thread_row() {
  return threadIdx.x % kGroupThreads / kWarpSize * 16 + threadIdx.x % kWarpSize / 4;
}
__device__ inline int thread_column() {
  return threadIdx.x % 4 * 2;
}

/// By one thread: fetches tile i, which begins at `place` of a tensor map.
template <typename Tile>
__device__ void fetch_tile(const Ring<Tile::kStages>& ring,
                           const char* stages,
                           int32_t i,
                           const CUtensorMap* map,
                           const int32_t (&place)[4]) {
  const uint32_t to = shared_address(stages) + i % Tile::kStages * Tile::kTileBytes;
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    copy_box(to + panel * Tile::kPanelBytes, map,
             {place[0] + panel * kPanelColumns, place[1], place[2], place[3]}, Tile::kPanelBytes,
             ring.full_barrier(i), normal_policy());
  }
}

/// The 128 rows of a warpgroup: blocks 0 and 1.
template <typename Tile>
class KeptBlocks {
 public:
  /// row(i) is the i-th row of 128, or null for zeros.
  template <typename Row>
  __device__ __forceinline__ explicit KeptBlocks(const Row& row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const void* from = row(i / 2 * 64 + thread_row() + i % 2 * 8);
      const uint32_t* own = static_cast<const uint32_t*>(from) + threadIdx.x % 4;
#pragma unroll
      for (int k = 0; k < Tile::kSteps; ++k) {
        rows_[i / 2][k][i % 2] = from ? __ldg(own + k * 8) : 0;
        rows_[i / 2][k][i % 2 + 2] = from ? __ldg(own + k * 8 + 4) : 0;
      }
    }
  }

  /// Calls use(block, i, products) for tiles first .. first + kCount - 1, in straight line: a
  /// product under way at a loop's end makes ptxas serialise all of them (warning C7514).
  template <int kCount, typename Use>
  __device__ __forceinline__ void multiply(const Ring<Tile::kStages>& ring,
                                           const char* stages,
                                           int32_t first,
                                           const Use& use) {
    const uint32_t memory = shared_address(stages);
    const auto start = [&](int block, int32_t i) {
      const uint64_t tile = panel_descriptor(memory + i % Tile::kStages * Tile::kTileBytes);
      warpgroup_fence();
#pragma unroll
      for (int k = 0; k < Tile::kSteps; ++k) {
        multiply_64x128<typename Tile::Element>(products_[block], rows_[block][k],
                                                column_descriptor(tile, k, Tile::kPanelBytes),
                                                k > 0);
      }
      warpgroup_commit();
    };
    ring.wait_full(first);
    start(0, first);
#pragma unroll
    for (int32_t i = first; i < first + kCount; ++i) {
      start(1, i);
      warpgroup_wait<1>();
      use(0, i, products_[0]);
      if (i + 1 < first + kCount) {
        ring.wait_full(i + 1);
        start(0, i + 1);
        warpgroup_wait<1>();
      } else {
        warpgroup_wait<0>();
      }
      use(1, i, products_[1]);
      __syncwarp();
      ring.give_back(i, threadIdx.x % kWarpSize == 0);
    }
  }

 private:
  uint32_t rows_[2][Tile::kSteps][4];  // as mma_16x8x16 takes them
  float products_[2][64] = {};
};

}  // namespace adakv
