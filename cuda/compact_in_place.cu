// compact of the entries that rows hold: in place. Three launches:
//   1. move   an entry goes to a lower slot of its row, by whoever moves the same part of all of the
//             row's entries, in ascending order: a slot is read before it is written
//   2. deal   which pages rows keep, and which have to go to other pages
//   3. copy   those
// Entries before the first one that leaves are not touched.
#include <algorithm>

#include "common/async_copy.cuh"
#include "common/device_guard.h"
#include "common/divisor.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "cuda_backend.h"
#include "ops/schedule.h"
#include "ops/slot_parts.h"

namespace adakv {
namespace {

constexpr int kThreads = 256;
constexpr int kStripBytes = 128;  // of an entry that a block moves, at most
constexpr int kAtOnce = 4;        // chunks of a tile that a thread moves
constexpr int kMostSlots = 256;   // of a tile
constexpr int kMostStrips = 16;
constexpr int kDealThreads = 512;
constexpr int kCopiers = 16;  // blocks of a sequence in launch 3

/// Some bytes of every slot, which a block moves.
struct Strip {
  char* data;  // of slot 0 of page 0
  int64_t page_stride;
  int32_t slot_bytes;
  Divisor chunks;  // of a slot
  int32_t chunk_bytes;

  __device__ char* at(int32_t page, int32_t slot) const {
    return data + page * page_stride + slot * slot_bytes;
  }
};

struct InPlaceParams {
  Strip strips[kMostStrips];
  SlotPart parts[SlotParts::kMost];
  int32_t num_strips, num_parts;
  const int32_t* slots;        // [K]
  const int32_t* indptr;       // [B * Hkv + 1]
  const int32_t* page_ids;     // [Q]
  const int32_t* page_indptr;  // [B + 1]
  LayerRows layer;
  int32_t num_columns, num_fresh, num_ids;  // M, F, Q
  // Scratch memory.
  int32_t* marks;      // [N]
  int32_t* others;     // [Q]  pages that no row has kept, of each sequence where its page_ids are
  int32_t* moved;      // [Q]  pages that are copied to those
  int32_t* num_moved;  // [B]

  __device__ int32_t num_kept(int32_t row) const { return indptr[row + 1] - indptr[row]; }
  __device__ int32_t num_pages(int32_t row) const { return layer.num_pages(num_kept(row)); }
};

/// The first of a row's kept entries that changes its slot, `count` if none does: before it all have
/// slots[i] == i, behind it none has. By all threads.
__device__ int32_t first_moved(const int32_t* slots, int32_t count) {
  int32_t begin = 0, step = count;  // it lies in begin .. begin + step
  while (step > 0) {
    const int32_t next = (step + kThreads - 1) / kThreads;
    const int32_t offset = static_cast<int32_t>(threadIdx.x) * next;
    const int32_t i = begin + offset;
    const bool stays = offset < step && i < count && slots[i] == i;
    const int32_t num_stay = __syncthreads_count(stays);
    if (num_stay == 0) break;
    if (next == 1) return begin + num_stay;
    begin += (num_stay - 1) * next + 1;
    step = next - 1;
  }
  return begin;
}

/// Where tiles' entries come from and go to: page and slot of each, as page << 8 | slot.
struct TilePlaces {
  static constexpr int kStages = 4;  // put two tiles ahead, and used until all have stored a tile
  int64_t from[kStages][kMostSlots], to[kStages][kMostSlots];
};

/// Finds the places of tile after tile, a thread those of one entry. A tile's slots are read two
/// tiles before its places are put, and the table one tile before, so that nobody waits for them.
class PlaceFinder {
 public:
  __device__ PlaceFinder(const LayerRows& layer,
                         const int32_t* table,
                         const int32_t* slots,
                         int32_t first,
                         int32_t kept,
                         int32_t tile,
                         TilePlaces& places)
      : places_(places),
        table_(table),
        slots_(slots),
        shift_(layer.page_shift),
        target_(first + static_cast<int32_t>(threadIdx.x)),
        end_(static_cast<int32_t>(threadIdx.x) < tile ? kept : 0),
        tile_(tile) {
    read_slot(target_);
    read_pages(target_);
    read_slot(target_ + tile_);
  }

  /// Puts the next tile's places, to be seen behind a barrier.
  __device__ void put() {
    if (target_ < end_) {
      const int32_t mask = (1 << shift_) - 1;
      places_.from[stage_][threadIdx.x] = int64_t{from_page_} << 8 | (found_ & mask);
      places_.to[stage_][threadIdx.x] = int64_t{to_page_} << 8 | (target_ & mask);
    }
    target_ += tile_;
    stage_ = (stage_ + 1) % TilePlaces::kStages;
    read_pages(target_);
    read_slot(target_ + tile_);
  }

 private:
  __device__ void read_slot(int32_t target) {
    if (target < end_) slot_ = slots_[target];
  }

  __device__ void read_pages(int32_t target) {
    found_ = slot_;
    if (target >= end_) return;
    from_page_ = table_[found_ >> shift_];
    to_page_ = table_[target >> shift_];
  }

  TilePlaces& places_;
  const int32_t *table_, *slots_;
  int32_t shift_, target_, end_, tile_, stage_ = 0;
  int32_t slot_ = 0, found_ = 0, from_page_ = 0, to_page_ = 0;
};
static_assert(kMostSlots <= kThreads, "a thread finds one entry of a tile");

/// Chunk k of a thread in a tile of `count` entries.
template <typename Chunk>
struct TileChunk {
  int32_t entry, in_entry;

  __device__ TileChunk(const Strip& strip, int k) {
    const int32_t i = k * kThreads + static_cast<int32_t>(threadIdx.x);
    entry = strip.chunks.quotient(i);
    in_entry = i - entry * strip.chunks.value;
  }

  __device__ Chunk* at(const Strip& strip, const int64_t* places) const {
    const int64_t place = places[entry];
    return reinterpret_cast<Chunk*>(strip.at(static_cast<int32_t>(place >> 8), place & 255)) +
           in_entry;
  }
};

template <typename Chunk>
__device__ void load_tile(const Strip& strip,
                          const int64_t* from,
                          int32_t count,
                          Chunk (&data)[kAtOnce]) {
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    const TileChunk<Chunk> chunk(strip, k);
    if (chunk.entry < count) data[k] = __ldcg(chunk.at(strip, from));
  }
}

template <typename Chunk>
__device__ void store_tile(const Strip& strip,
                           const int64_t* to,
                           int32_t count,
                           const Chunk (&data)[kAtOnce]) {
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    const TileChunk<Chunk> chunk(strip, k);
    if (chunk.entry < count) *chunk.at(strip, to) = data[k];
  }
}

/// Moves a strip of a row's entries. Tile i + 1 is on its way while tile i is stored, and all of tile
/// i was read before: what it overwrites, no later tile reads.
template <typename Chunk>
__device__ void move_strip(const InPlaceParams& p,
                           const Strip& strip,
                           const int32_t* table,
                           const int32_t* slots,
                           int32_t kept,
                           TilePlaces& places) {
  const int32_t first = first_moved(slots, kept);
  const int32_t tile = min(kMostSlots, kAtOnce * kThreads / strip.chunks.value);
  const int32_t num_tiles = (kept - first + tile - 1) / tile;
  const auto count = [&](int32_t i) { return min(tile, kept - first - i * tile); };
  PlaceFinder finder(p.layer, table, slots, first, kept, tile, places);
  Chunk data[2][kAtOnce];
  finder.put();
  finder.put();
  __syncthreads();
  if (num_tiles > 0) load_tile(strip, places.from[0], count(0), data[0]);
#pragma unroll 1
  for (int32_t i = 0; i < num_tiles; i += 2) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int32_t now = i + odd;
      if (now >= num_tiles) break;
      if (now + 1 < num_tiles) {
        load_tile(strip, places.from[(now + 1) % TilePlaces::kStages], count(now + 1),
                  data[1 - odd]);
      }
      finder.put();  // of tile now + 2
      __syncthreads();
      store_tile(strip, places.to[now % TilePlaces::kStages], count(now), data[odd]);
    }
  }
}

// Launch 1. grid: [strips, B * Hkv]
__global__ void __launch_bounds__(kThreads, 3)
    move_kernel(const __grid_constant__ InPlaceParams p) {
  __shared__ TilePlaces places;
  wait_for_previous_kernel();
  const int32_t row = blockIdx.y, b = row / p.layer.num_heads, h = row % p.layer.num_heads;
  const Strip strip = p.strips[blockIdx.x];
  const int32_t* slots = p.slots + p.indptr[row];
  const int32_t* table = p.layer.block_table.at(b, h);
  const int32_t kept = p.num_kept(row);
  if (strip.chunk_bytes == 16) return move_strip<uint4>(p, strip, table, slots, kept, places);
  if (strip.chunk_bytes == 8) return move_strip<uint2>(p, strip, table, slots, kept, places);
  if (strip.chunk_bytes == 4) return move_strip<uint32_t>(p, strip, table, slots, kept, places);
  move_strip<uint16_t>(p, strip, table, slots, kept, places);
}

/// A sequence's pages, while one block deals them.
class Deal {
 public:
  __device__ Deal(const InPlaceParams& p, int32_t* scratch) : p_(p), scratch_(scratch) {
    b_ = blockIdx.x;
    first_ = p.page_indptr[b_];
    count_ = p.page_indptr[b_ + 1] - first_;
    widest_ = 0;
    for (int32_t h = 0; h < p.layer.num_heads; ++h) {
      widest_ = max(widest_, p.num_pages(b_ * p.layer.num_heads + h));
    }
  }

  __device__ void run() {
    mark();
    const int32_t num_others = find_others();
    const int32_t num_moved = replace(num_others);
    write_rows(num_moved, num_others);
    if (threadIdx.x == 0) p_.num_moved[b_] = min(num_moved, num_others);
  }

 private:
  enum Mark : int32_t { kNotNamed, kNamed, kKept };

  /// Page i % widest_ of row i / widest_, in the table; null if the row keeps fewer.
  __device__ int32_t* kept_page(int32_t i) const {
    const int32_t h = i / widest_, k = i - h * widest_;
    const bool is_kept = k < p_.num_pages(b_ * p_.layer.num_heads + h);
    return is_kept ? p_.layer.block_table.at(b_, h) + k : nullptr;
  }

  /// Calls body(page, in the table) for every page that a row keeps.
  template <typename Body>
  __device__ void for_each_kept(const Body& body) const {
    for (int32_t i = threadIdx.x; i < p_.layer.num_heads * widest_; i += kDealThreads) {
      if (int32_t* page = kept_page(i)) body(page);
    }
  }

  __device__ void mark() const {
    for_each_kept([&](const int32_t* page) { p_.marks[*page] = kNotNamed; });
    __syncthreads();
    for (int32_t i = threadIdx.x; i < count_; i += kDealThreads) {
      p_.marks[p_.page_ids[first_ + i]] = kNamed;
    }
    __syncthreads();
    for_each_kept([&](const int32_t* page) {
      if (p_.marks[*page] == kNamed) p_.marks[*page] = kKept;
    });
    __syncthreads();
  }

  /// The named pages that no row has kept, in their order; their number.
  __device__ int32_t find_others() const {
    const auto is_other = [&](int32_t i) -> int32_t {
      return p_.marks[p_.page_ids[first_ + i]] == kNamed;
    };
    return block_exclusive_sum<kDealThreads>(
        count_, is_other,
        [&](int32_t i, int32_t before) {
          if (is_other(i)) p_.others[first_ + before] = p_.page_ids[first_ + i];
        },
        scratch_);
  }

  /// Puts others in the place of kept pages that are not named; their number.
  __device__ int32_t replace(int32_t num_others) const {
    const auto leaves = [&](int32_t i) -> int32_t {
      const int32_t* page = kept_page(i);
      return page && p_.marks[*page] == kNotNamed;
    };
    return block_exclusive_sum<kDealThreads>(
        p_.layer.num_heads * widest_, leaves,
        [&](int32_t i, int32_t before) {
          if (before >= num_others || !leaves(i)) return;
          int32_t* page = kept_page(i);
          p_.moved[first_ + before] = *page;
          *page = p_.others[first_ + before];
        },
        scratch_);
  }

  /// A warp writes what is behind a row's pages, its fresh pages and its length.
  __device__ void write_rows(int32_t num_moved, int32_t num_others) const {
    const LayerRows& layer = p_.layer;
    const int lane = threadIdx.x % kWarpSize;
    for (int32_t h = threadIdx.x / kWarpSize; h < layer.num_heads; h += kDealThreads / kWarpSize) {
      const int32_t kept = p_.num_kept(b_ * layer.num_heads + h), k = num_moved + h;
      int32_t *table = layer.block_table.at(b_, h), *fresh = layer.fresh_pages.at(b_, h);
      const int32_t next = k < num_others ? p_.others[first_ + k] : -1;
      for (int32_t i = layer.num_pages(kept) + lane; i < p_.num_columns; i += kWarpSize) {
        table[i] = -1;
      }
      for (int32_t i = lane; i < p_.num_fresh; i += kWarpSize) fresh[i] = i == 0 ? next : -1;
      if (lane == 0) *layer.lengths.at(b_, h) = kept;
    }
  }

  const InPlaceParams& p_;
  int32_t* scratch_;  // shared
  int32_t b_, first_, count_;
  int32_t widest_;  // pages of the row that keeps most
};

// Launch 2. grid: [B]
__global__ void __launch_bounds__(kDealThreads, 1)
    deal_kernel(const __grid_constant__ InPlaceParams p) {
  __shared__ int32_t scratch[kDealThreads / kWarpSize + 1];
  wait_for_previous_kernel();
  Deal(p, scratch).run();
}

// Launch 3. grid: [kCopiers * parts, B]; one block: a part of some pages.
__global__ void __launch_bounds__(kThreads, 4)
    copy_kernel(const __grid_constant__ InPlaceParams p) {
  wait_for_previous_kernel();
  const int32_t b = blockIdx.y, first = p.page_indptr[b], count = p.num_moved[b];
  const SlotPart& part = p.parts[blockIdx.x / kCopiers];
  const int32_t chunks = p.layer.page_size * part.slot_bytes / 16;
  for (int32_t i = first + blockIdx.x % kCopiers; i < first + count; i += kCopiers) {
    const int64_t from = p.moved[i] * part.page_stride, to = p.others[i] * part.page_stride;
    const uint4* source = reinterpret_cast<const uint4*>(part.data + from);
    uint4* target = reinterpret_cast<uint4*>(part.data + to);
    for (int32_t c = threadIdx.x; c < chunks; c += kThreads) target[c] = source[c];
  }
}

/// The largest piece of 16 bytes or less that a part can be moved by.
int32_t chunk_bytes_of(const SlotPart& part) {
  const auto address = reinterpret_cast<uintptr_t>(part.data);
  const auto steps = static_cast<uintptr_t>(part.page_stride | part.slot_bytes) | address;
  for (int32_t bytes = 16; bytes > 2; bytes /= 2) {
    if (steps % bytes == 0) return bytes;
  }
  return 2;
}

/// Parts in strips that a block moves.
void find_strips(const SlotParts& parts, InPlaceParams& p) {
  p.num_parts = parts.count;
  for (int i = 0; i < parts.count; ++i) {
    const SlotPart& part = p.parts[i] = parts.parts[i];
    const int32_t chunk_bytes = chunk_bytes_of(part);
    const int32_t strip_bytes = std::max(kStripBytes, part.slot_bytes / 4 / 16 * 16);
    for (int32_t begin = 0; begin < part.slot_bytes; begin += strip_bytes) {
      const int32_t bytes = std::min(strip_bytes, part.slot_bytes - begin);
      p.strips[p.num_strips++] = {part.data + begin, part.page_stride, part.slot_bytes,
                                  Divisor::of(bytes / chunk_bytes), chunk_bytes};
    }
  }
}

int64_t num_pages(const CompactArgs& args) {
  return (args.layer.pages.shape[0] + 3) / 4 * 4;
}

}  // namespace

// ------------------------------------------------------------------------------------------------

void cuda_compact_in_place(const CompactArgs& args) {
  const DeviceGuard guard(args.positions.device);
  const int64_t batch = args.layer.lengths.shape[0], num_heads = args.layer.lengths.shape[1];
  if (batch == 0 || num_heads == 0) return;
  InPlaceParams p = {};
  find_strips(SlotParts(args.layer), p);
  p.slots = args.positions.ptr<int32_t>();
  p.indptr = args.indptr.ptr<int32_t>();
  p.page_ids = args.page_ids.ptr<int32_t>();
  p.page_indptr = args.page_indptr.ptr<int32_t>();
  p.layer = layer_rows(args.layer);
  p.num_columns = static_cast<int32_t>(args.layer.block_table.shape[2]);
  p.num_fresh = static_cast<int32_t>(args.layer.fresh_pages.shape[2]);
  p.num_ids = static_cast<int32_t>(args.page_ids.shape[0]);
  p.marks = args.workspace.ptr<int32_t>();
  p.others = p.marks + num_pages(args);
  p.moved = p.others + p.num_ids;
  p.num_moved = p.moved + p.num_ids;
  const bool early = has_sm90("compact", args.positions.device.index);
  const auto sequences = static_cast<unsigned>(batch);
  const dim3 rows(static_cast<unsigned>(p.num_strips), static_cast<unsigned>(batch * num_heads));
  const dim3 copiers(static_cast<unsigned>(kCopiers * p.num_parts), sequences);
  launch("compact", move_kernel, {rows, kThreads, 0, early}, args.stream, p);
  launch("compact", deal_kernel, {dim3(sequences), kDealThreads, 0, early}, args.stream, p);
  launch("compact", copy_kernel, {copiers, kThreads, 0, early}, args.stream, p);
}

size_t cuda_compact_in_place_workspace_bytes(const CompactArgs& args) {
  const int64_t ints = num_pages(args) + 2 * args.page_ids.shape[0] + args.layer.lengths.shape[0];
  return static_cast<size_t>(ints) * sizeof(int32_t);
}

}  // namespace adakv
