// The slots of a row that aren't in its pages yet, in attend's fast kernel: the tokens that come with
// the call, which another warp appends at the same time. They are put into the tiles that lack them,
// with codes quantised as in the pages.
#pragma once

#include "attend/warp_codes.cuh"
#include "common/codes.cuh"

namespace adakv {

/// Slots of a row that aren't in its pages yet: the new tokens, which come from the arguments.
template <typename Config>
class NewSlots {
 public:
  /// Starts reading the first of them, if this warp will need it.
  __device__ NewSlots(const AttendParams& p, const RowContext& row, bool is_mine)
      : p_(p), row_(row), is_mine_(is_mine && row.settled < row.length) {
    if constexpr (!kReadsAhead) return;
    if (!is_mine_) return;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) first_[piece] = read(row.settled, piece);
  }

  /// Whether the first of them is in a tile of this warp, of a row whose tiles begin with `row_tile`.
  static __device__ bool are_mine(const RowContext& row, int32_t row_tile) {
    const int32_t tile = row.settled / Config::kTileSlots - row_tile;
    return tile >= 0 && tile % Config::kWarps == static_cast<int32_t>(threadIdx.x) / kWarpSize;
  }

  /// Whether the tile of slots `first_slot` on has some of them.
  __device__ bool are_in(int32_t first_slot) const {
    return row_.settled < min(row_.length, first_slot + Config::kTileSlots);
  }

  /// Puts them into a tile.
  __device__ void patch(int32_t first_slot, const TileData& data) const {
    const int32_t begin = max(0, row_.settled - first_slot);
    const int32_t end = min(Config::kTileSlots, row_.length - first_slot);
    const bool has_first = kReadsAhead && is_mine_ && first_slot <= row_.settled;
    if (has_first) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) write(data, begin, piece, first_[piece]);
    }
#pragma unroll 1
    for (int32_t slot = begin + has_first; slot < end; ++slot) {
#pragma unroll 1
      for (int piece = 0; piece < kPieces; ++piece) {
        write(data, slot, piece, read(first_slot + slot, piece));
      }
    }
    fence_before_boxes();
    __syncwarp();
  }

 private:
  static constexpr int kPadded =
      Config::kIsCoded ? padded_head_dim(Config::kHeadDim) : Config::kHeadDim;
  static constexpr int kPieces = EntryPart::pieces(2 * kPadded);
  static constexpr bool kReadsAhead = !Config::kIsCoded || kPieces == 1;  // if registers allow

  __device__ uint4 read(int32_t slot, int piece) const {
    const EntryPart part = EntryPart::of(Config::kHeadDim, kPadded, Config::kHeadDim, piece);
    const EntryRows& source = part.is_value ? p_.append.values : p_.append.keys;
    const char* entry = source.at(row_.b, row_.h, p_.num_tokens - (row_.length - slot));
    if (!part.is_there) return make_uint4(0, 0, 0, 0);
    return __ldg(reinterpret_cast<const uint4*>(entry + part.element * 2));
  }

  __device__ void write(const TileData& data, int32_t slot, int piece, const uint4& x) const {
    const EntryPart part = EntryPart::of(Config::kHeadDim, kPadded, Config::kHeadDim, piece);
    const int byte = part.element * Config::Format::kBits / 8;
    const uint32_t to = data.entries + (part.is_value ? Config::kHalfBytes : 0) +
                        Config::chunk_offset(slot, byte / 16) + byte % 16;
    if constexpr (Config::kIsCoded) {
      using Format = typename Config::Format;
      CodedChunk chunks[1];
      quantise<Format, typename Config::Element>({x}, part.is_there, chunks);
      const CodedChunk& chunk = chunks[0];
      if (!part.is_there) return;
      asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(chunk.codes.x),
                   "r"(chunk.codes.y)
                   : "memory");
      if (part.element % kGroupSize > 0) return;
      const uint32_t scale = data.scales + (part.is_value ? Config::kKeyScaleBytes : 0) +
                             slot * Config::kSlotScaleBytes +
                             part.element / kGroupSize * Format::kScales * 2;
      asm volatile("st.shared.b16 [%0], %1;" ::"r"(scale), "h"(chunk.scale) : "memory");
      if constexpr (Format::kScales == 2) {
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(scale + 2), "h"(chunk.zero) : "memory");
      }
    } else if (part.is_there) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y),
                   "r"(x.z), "r"(x.w)
                   : "memory");
    }
  }

  const AttendParams& p_;
  const RowContext& row_;
  bool is_mine_;
  uint4 first_[kReadsAhead ? kPieces : 1];
};

}  // namespace adakv
