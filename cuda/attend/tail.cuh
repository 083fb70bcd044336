// The tails of rows in attend's fast kernel over int4: the last entries of a row, which are in 16 bits
// until they fill a page. One warp of a block takes them, as two tiles of what isn't coded, while the
// others are busy with pages. It also puts the new token into the tail; if that is full then, all warps
// quantise it.
#pragma once

#include "attend/new_slots.cuh"
#include "attend/row_end.cuh"
#include "attend/warp_codes.cuh"
#include "common/int4_page.cuh"

namespace adakv {

template <typename Config>
class TailReader {
 public:
  using Tiles = typename Config::TailConfig;
  using Element = typename Config::Element;

  __device__ TailReader(const AttendParams& p, AttendShared<Config>& shared)
      : p_(p), tiles_(shared_address(shared.tail)) {}

  /// Starts reading the tail of a row of `length` entries.
  __device__ void start(int32_t row_index, int32_t length) const {
    const RowContext row = row_context<Config>(p_, row_index, length);
    const int32_t begin = p_.tail_begin(row.b, length);
    constexpr int kChunks = Tiles::kEntryChunks;
    const uint64_t policy = read_once_policy();
#pragma unroll 4
    for (int32_t i = threadIdx.x % kWarpSize; i < 2 * kPageSlots * kChunks; i += kWarpSize) {
      const int32_t slot = i / kChunks % kPageSlots, chunk = i % kChunks;
      const bool is_value = i >= kPageSlots * kChunks;
      if (begin + slot >= row.settled) continue;
      copy_16_bytes(tiles_ + offset(is_value, slot, chunk),
                    p_.layer.tail(row.b, row.h, is_value, slot, chunk * 8), policy);
    }
    commit_copies();
  }

  /// Takes in the row's tail, which start() reads, if the row ends here, and stores the result.
  __device__ void run(const RowContext& row,
                      bool ends_here,
                      float (&image)[Config::kQueries][Config::kImageStride],
                      float2 (&max_sum)[Config::kQueries]) const {
    const int32_t begin = ends_here ? p_.tail_begin(row.b, row.length) : row.length;
    WarpState<Tiles> state(p_, row);
    const NewSlots<Tiles> new_slots(p_, row, ends_here);
    wait_copies<0>();
    __syncwarp();
#pragma unroll 1
    for (int32_t first = begin; first < row.length; first += Tiles::kTileSlots) {
      const TileData data = {tiles_ + (first - begin) / Tiles::kTileSlots * Tiles::kTileBytes, 0};
      if (new_slots.are_in(first)) new_slots.patch(first, data);
      state.add_tile(p_, data, first, row.length);
    }
    state.store(image, max_sum);
    const int32_t slot = row.settled % kPageSlots;
    if (!ends_here || row.settled == row.length || slot == kPageSlots - 1) return;
#pragma unroll 1
    for (int32_t i = threadIdx.x % kWarpSize; i < 2 * Tiles::kEntryChunks; i += kWarpSize) {
      const bool is_value = i >= Tiles::kEntryChunks;
      const int32_t chunk = i % Tiles::kEntryChunks;
      char* to = p_.layer.tail(row.b, row.h, is_value, slot, chunk * 8);
      *reinterpret_cast<uint4*>(to) = load_shared_16_bytes(tiles_ + offset(is_value, slot, chunk));
    }
    __syncwarp();  // the tiles may be overwritten
  }

  /// Quantises a tail that the new token has filled. By all warps, behind the end of the row.
  __device__ void end(const RowContext& row, bool ends_here) const {
    if (!ends_here || row.settled == row.length || row.length % kPageSlots != 0) return;
    quantise(p_, tiles_, p_.layer.block_table.at(row.b, row.h)[row.settled / kPageSlots]);
    RowEnd<Config>::wait_for_warps();  // the tiles may be overwritten
  }

 private:
  /// Where a chunk of 16 bytes of a tail lies.
  static __device__ uint32_t offset(bool is_value, int32_t slot, int32_t chunk) {
    return slot / Tiles::kTileSlots * Tiles::kTileBytes + (is_value ? Tiles::kHalfBytes : 0) +
           Tiles::chunk_offset(slot % Tiles::kTileSlots, chunk);
  }

  /// A function of its own, so that the others' registers are theirs.
  static __device__ __noinline__ void quantise(const AttendParams& p,
                                               uint32_t tiles,
                                               int32_t page) {
    const auto load = [&](bool is_value, int32_t slot, int32_t element) {
      return load_shared_16_bytes(tiles + offset(is_value, slot, element / 8));
    };
    quantise_page<Element, true>(p.layer, page, load, threadIdx.x / kWarpSize, Config::kAllWarps);
  }

  const AttendParams& p_;
  uint32_t tiles_;
};

/// For pages without tails.
struct NoTails {
  template <typename Shared>
  __device__ NoTails(const AttendParams&, Shared&) {}
  __device__ void start(int32_t, int32_t) const {}
  template <typename Image, typename MaxSum>
  __device__ void run(const RowContext&, bool, Image&, MaxSum&) const {}
  __device__ void end(const RowContext&, bool) const {}
};

template <typename Config>
using Tails = std::conditional_t<Config::kHasTails, TailReader<Config>, NoTails>;

}  // namespace adakv
