// The tiles of attend's fast kernel: their sizes and layout in shared memory, which pages they lie
// in, and the pipeline that each warp keeps of its own.
#pragma once

#include <algorithm>

#include "attend/attend.h"
#include "common/async_copy.cuh"
#include "common/codes.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"

namespace adakv {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

/// Sizes of one instance. Boxes: tiles come by the bulk copy engine into most of the shared memory
/// of sm_90; else by 16-byte copies into as much as every device has. Codes only come by boxes.
template <typename Element_, typename Format_, int kHeadDim_, int kQueries_, bool kCopiesBoxes_>
struct AttendConfig {
  using Element = Element_;
  using Format = Format_;
  static constexpr bool kIsCoded = Format::kScales > 0;
  static constexpr bool kHasTails = Format::kFormat == PageFormat::kInt4;
  static_assert(!kIsCoded || kCopiesBoxes_);
  static constexpr int kHeadDim = kHeadDim_, kQueries = kQueries_;
  static constexpr bool kCopiesBoxes = kCopiesBoxes_;
  static constexpr bool kStoresLogits = false;
  static constexpr int kSteps = kHeadDim / 16;  // of the products along the head dim
  static constexpr int kGroups = (kHeadDim + kGroupSize - 1) / kGroupSize;  // with a scale each
  static constexpr int kColumnTiles = (kQueries + 7) / 8;                   // of 8 queries
  // Warps for codes, whose tiles are small. Up to 8 in all have 255 registers each, up to 12 have 168.
  static constexpr int code_warps() {
    if (kHasTails && kHeadDim > 128) return kQueries > 4 ? 5 : 6;
    if (kHasTails) return kQueries > 8 ? 6 : 10;
    if (kHeadDim > 128) return kQueries > 8 ? 4 : 7;
    if (kHeadDim <= 64 && kQueries <= 8) return 11;
    return kQueries > 4 ? 7 : 8;
  }
  // Those that take pages. The appending warp makes it 8 at most where registers are short.
  static constexpr int kWarps = !kCopiesBoxes      ? (kHeadDim > 128 ? 2 : 4)
                                : kIsCoded         ? code_warps()
                                : kHeadDim > 128   ? 4
                                : kColumnTiles > 1 ? 7
                                                   : 8;
  static constexpr int kAllWarps = kWarps + kHasTails;    // one takes the rows' tails
  static constexpr int kThreads = kAllWarps * kWarpSize;  // one more warp appends
  // In registers; with codes they are held in shared memory.
  static constexpr bool kHoldsQueries = !kIsCoded && kSteps * kColumnTiles <= 16;
  static constexpr int kOperands = kSteps * kColumnTiles * kWarpSize;
  static constexpr int kSums = kGroups * kColumnTiles * 4;
  static constexpr int kImages =
      kQueries <= 4 && !kHasTails && !(kIsCoded && kHeadDim > 128) ? 2 : 1;

  static constexpr int kTileSlots = tile_slots(Format::kFormat, kHeadDim);
  static constexpr int kBlocks = kTileSlots / 16, kTileShift = kBlocks == 2 ? 5 : 4;
  static constexpr int kEntryBytes = kHeadDim * Format::kBits / 8;
  static constexpr int kEntryChunks = kEntryBytes / 16;
  static constexpr int kHalfBytes = kTileSlots * kEntryBytes;
  static constexpr int kTileBytes = 2 * kHalfBytes;
  static constexpr int kSlotScaleBytes = kGroups * Format::kScales * 2;
  static constexpr int kValueScaleBytes = kTileSlots * kSlotScaleBytes;
  static constexpr int kKeyScaleBytes = kHasTails ? 4 * kHeadDim : kValueScaleBytes;
  static constexpr int kScaleBytes = kKeyScaleBytes + kValueScaleBytes;
  // A tail, as tiles of what isn't coded.
  using TailConfig = AttendConfig<Element, Plain, kHeadDim, kQueries, kCopiesBoxes>;
  static constexpr int kTailBytes = kHasTails ? 2 * kPageSlots * kHeadDim * 2 : 0;
  static constexpr int kImageStride = kHeadDim + 4;  // floats; keeps the warps' stores apart

  static constexpr int kMostBytes = kCopiesBoxes ? 227 << 10 : 99 << 10;
  static constexpr int kOtherBytes = kImages * kAllWarps * kQueries * (kImageStride + 2) * 4 +
                                     kTailBytes + 1024 +  // and barriers
                                     (kIsCoded ? kWarps * (kSums + kOperands) * 8 : 0);
  static constexpr int kStages = std::min(
      kWarps > 8 ? 2 : 4, (kMostBytes - kOtherBytes) / (kWarps * (kTileBytes + kScaleBytes)));
  static_assert(kStages >= 2, "loads would not overlap");

  // The layout of a half tile: boxes of kBoxColumns columns, one after the other, in which the
  // 16-byte chunks of a row are swapped as the copy engine does it, so that eight rows of one chunk
  // lie in different banks.
  static constexpr int kRowColumns = kEntryBytes / 2;  // of 16 bits
  static constexpr int kBoxColumns = kRowColumns % 64 == 0 ? 64 : kRowColumns % 32 == 0 ? 32 : 16;
  static_assert(kRowColumns % kBoxColumns == 0);
  static constexpr int kBoxChunks = kBoxColumns / 8;

  static __device__ uint32_t chunk_offset(int slot, int chunk) {
    const int box = chunk / kBoxChunks, in_box = chunk % kBoxChunks;
    const int swapped = in_box ^ (slot / (8 / kBoxChunks) % kBoxChunks);
    return ((box * kTileSlots + slot) * kBoxChunks + swapped) * 16;
  }
};

/// The same, with the logits stored for accumulate_logits().
template <typename Config>
struct StoringLogits : Config {
  static constexpr bool kStoresLogits = true;
  using TailConfig = StoringLogits<typename Config::TailConfig>;
};

template <typename Config>
struct alignas(1024) AttendShared {
  uint8_t tiles[Config::kWarps][Config::kStages][Config::kTileBytes];
  alignas(Config::kHasTails ? 1024 : 16) uint8_t tail[std::max(16, Config::kTailBytes)];
  // Scales of keys, then of values.
  uint8_t scales[Config::kIsCoded ? Config::kWarps : 1][Config::kStages]
                [std::max(16, Config::kScaleBytes)];
  // What WarpState keeps of its row's queries, with codes.
  alignas(16) uint2 operands[Config::kIsCoded ? Config::kWarps * Config::kOperands : 1];
  float2 query_sums[Config::kIsCoded ? Config::kWarps * Config::kSums : 1];
  alignas(
      16) float image[Config::kImages][Config::kAllWarps][Config::kQueries][Config::kImageStride];
  float2 max_sum[Config::kImages][Config::kAllWarps][Config::kQueries];
  uint64_t barriers[Config::kWarps][Config::kStages];
  int32_t is_last;
};

/// Addresses of a tile in shared memory: elements or codes, and scales.
struct TileData {
  uint32_t entries, scales;
};

/// Units [begin, end) of a worker, as one warp walks over them: tile i of the warp is tile
/// warp + i * kWarps of the range.
struct Range {
  int32_t begin, end, row;
  const int32_t* listed;  // page ids of the first units
  int32_t num_listed;     // 0: all are looked up
  int32_t page_shift;     // a page has 1 << page_shift tiles
};

/// Page ids of a warp's tiles: lane l holds that of tile (i & ~31) + l. The first come with the
/// worker; others take two round trips to find, so they are looked up while tiles are under way.
template <typename Config>
class PageIds {
 public:
  __device__ PageIds(const AttendParams& p, const Range& range, int32_t num_tiles)
      : p_(p), range_(range), num_tiles_(num_tiles), row_(range.row) {
    const int32_t offset = unit_offset(0);
    current_ = offset < range.num_listed ? __ldg(range.listed + offset) : 0;
    if (range.num_listed > 0 || num_tiles == 0) return;
    facts_ = load_rows();
    wait_for_previous_kernel();  // which may have written the block table
    look_up(range.begin + offset, static_cast<int32_t>(threadIdx.x) % kWarpSize < num_tiles,
            current_);
  }

  /// Page of tile i; for i = 0, 1, ... in turn.
  __device__ int32_t operator[](int32_t i) {
    if (i % kWarpSize == 0 && i > 0) current_ = next_;
    return __shfl_sync(kFullWarp, current_, i % kWarpSize);
  }

  /// Looks up what later tiles need; called after tile i, from i = kStages on. First the facts of
  /// rows are read, then, when they have arrived, the block tables.
  __device__ void look_ahead(int32_t i) {
    const bool is_first = i < kLead;
    if (is_first && range_.num_listed == 0) return;
    const int32_t phase = is_first ? i - Config::kStages : i % kWarpSize - kLead;
    if (phase == 0) facts_ = load_rows();
    if (phase != 1) return;
    const int32_t block = is_first ? 0 : (i / kWarpSize + 1) * kWarpSize;
    const int32_t tile = block + threadIdx.x % kWarpSize, offset = unit_offset(block);
    const bool is_missing = tile < num_tiles_ && offset >= range_.num_listed;
    int32_t id = offset < range_.num_listed ? __ldg(range_.listed + offset) : 0;
    if (__any_sync(kFullWarp, is_missing)) look_up(range_.begin + offset, is_missing, id);
    (is_first ? current_ : next_) = id;
  }

 private:
  static constexpr int kLead = 8;  // the next ids are fetched when so many are used up
  static_assert(Config::kStages + 2 <= kLead);
  static_assert((Config::kStages + 2) * Config::kWarps <= schedule::kWorkerPages,
                "the tiles before the first look ahead are listed");

  /// Begin, end and length of a row for each lane.
  __device__ int4 load_rows() const {
    const int32_t row = row_ + static_cast<int32_t>(threadIdx.x) % kWarpSize;
    return __ldcg(reinterpret_cast<const int4*>(p_.rows + min(row, p_.num_rows - 1)));
  }

  __device__ int32_t unit_offset(int32_t block) const {
    const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    return (warp + (block + lane) * Config::kWarps) >> range_.page_shift;
  }

  /// Pages of ascending units, where needed. Each lane finds the row of its unit among those that
  /// the lanes have read; again with the next rows until all have.
  __device__ void look_up(int32_t unit, bool is_needed, int32_t& id) {
#pragma unroll 1
    while (true) {
      int32_t before = 0;
#pragma unroll
      for (int step = kWarpSize / 2; step > 0; step /= 2) {
        if (__shfl_sync(kFullWarp, facts_.y, before + step - 1) <= unit) before += step;
      }
      const int32_t begin = __shfl_sync(kFullWarp, facts_.x, before);
      const int32_t end = __shfl_sync(kFullWarp, facts_.y, before);
      const int32_t length = __shfl_sync(kFullWarp, facts_.z, before);
      if (is_needed && unit < end) {
        id = page_of(row_ + before, unit - begin, length);
        is_needed = false;
      }
      if (!__any_sync(kFullWarp, is_needed)) return;
      row_ += kWarpSize;
      facts_ = load_rows();
    }
  }

  __device__ int32_t page_of(int32_t row, int32_t index, int32_t length) const {
    const LayerRows& layer = p_.layer;
    const int32_t b = p_.num_heads.quotient(row), h = p_.num_heads.remainder(row);
    if (p_.append.keys.data) {
      const int32_t used = layer.num_pages(length - p_.new_tokens(b));
      if (index >= used) return layer.fresh_pages.at(b, h)[index - used];
    }
    return layer.block_table.at(b, h)[index];
  }

  const AttendParams& p_;
  const Range& range_;
  int32_t num_tiles_, row_;
  int32_t current_ = 0, next_ = 0;
  int4 facts_;
};

/// The pipeline of one warp's tiles; the warp that takes tails has none.
template <typename Config>
class TilePipeline {
 public:
  __device__ TilePipeline(const AttendParams& p, const Range& range, AttendShared<Config>& shared)
      : p_(p),
        warp_(threadIdx.x / kWarpSize),
        num_tiles_(count_tiles(range, warp_)),
        page_shift_(range.page_shift),
        tiles_(shared_address(shared.tiles[warp_])),
        scales_(shared_address(shared.scales[Config::kIsCoded ? warp_ : 0])),
        barriers_(shared_address(shared.barriers[warp_])),
        policy_(read_once_policy()),
        ids_(p, range, num_tiles_) {
#pragma unroll 1
    for (int i = 0; i < Config::kStages; ++i) start(i);
  }

  /// Shared memory of tile i, once it is there.
  __device__ TileData wait(int32_t i) {
    const int stage = i % Config::kStages;
    if constexpr (Config::kCopiesBoxes) {
      wait_barrier(barriers_ + stage * 8, i / Config::kStages % 2);
    } else {
      wait_copies<Config::kStages - 1>();
      __syncwarp();
    }
    return {tiles_ + stage * Config::kTileBytes, scales_ + stage * Config::kScaleBytes};
  }

  /// Tile i is done with; starts the one that takes its place.
  __device__ void release(int32_t i) {
    const int32_t next = i + Config::kStages;
    __syncwarp();
    start(next);
    if (next < num_tiles_) ids_.look_ahead(next);
  }

 private:
  static __device__ int32_t count_tiles(const Range& range, int32_t warp) {
    if (warp >= Config::kWarps) return 0;
    const int32_t all = (range.end - range.begin) << range.page_shift;
    return (all - warp + Config::kWarps - 1) / Config::kWarps;
  }

  __device__ void start(int32_t i) {
    if (i < num_tiles_) {
      const int32_t page = ids_[i];
      const int32_t tile = (warp_ + i * Config::kWarps) & ((1 << page_shift_) - 1);
      const int stage = i % Config::kStages;
      const uint32_t to = tiles_ + stage * Config::kTileBytes;
      if constexpr (Config::kIsCoded) {
        if (threadIdx.x % kWarpSize == 0) copy_codes(to, page, tile * Config::kTileSlots, stage);
      } else if constexpr (Config::kCopiesBoxes) {
        const int32_t row = ((page * 2 << page_shift_) + tile) * Config::kTileSlots;
        if (threadIdx.x % kWarpSize == 0) {
          copy_box(to, &p_.page_map, {0, row, 0, 0}, Config::kTileBytes, barriers_ + stage * 8,
                   policy_);
        }
      } else {
        copy_chunks(to, p_.layer.key(page, tile * Config::kTileSlots));
      }
    }
    if constexpr (!Config::kCopiesBoxes) commit_copies();
  }

  __device__ void copy_codes(uint32_t to, int32_t page, int32_t slot, int stage) const {
    const uint32_t barrier = barriers_ + stage * 8, scales = scales_ + stage * Config::kScaleBytes;
    arrive_with_bytes(barrier, Config::kTileBytes + Config::kScaleBytes);
    start_box(to, &p_.page_map, {0, slot, 0, 0, page}, barrier, policy_);
    const char* of_keys = p_.layer.key_scales.at(page, slot);
    if (p_.scales_adjoin) {
      return start_bytes(scales, of_keys, Config::kScaleBytes, barrier, policy_);
    }
    start_bytes(scales, of_keys, Config::kKeyScaleBytes, barrier, policy_);
    start_bytes(scales + Config::kKeyScaleBytes, p_.layer.value_scales.at(page, slot),
                Config::kValueScaleBytes, barrier, policy_);
  }

  __device__ void copy_chunks(uint32_t to, const char* keys) const {
    constexpr int kHalfChunks = Config::kTileSlots * Config::kEntryChunks;
#pragma unroll
    for (int first = 0; first < 2 * kHalfChunks; first += kWarpSize) {
      const int i = first + threadIdx.x % kWarpSize, in_half = i % kHalfChunks;
      const char* from = keys + in_half * 16 + (i / kHalfChunks) * p_.layer.half_page_bytes();
      const uint32_t offset =
          Config::chunk_offset(in_half / Config::kEntryChunks, in_half % Config::kEntryChunks);
      copy_16_bytes(to + i / kHalfChunks * Config::kHalfBytes + offset, from, policy_);
    }
  }

  const AttendParams& p_;
  int warp_;
  int32_t num_tiles_, page_shift_;
  uint32_t tiles_, scales_, barriers_;
  uint64_t policy_;
  PageIds<Config> ids_;
};

}  // namespace adakv
