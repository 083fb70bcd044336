// The fast attend kernel: decode attention over ragged pages, one block per worker of the schedule.
//
// A tile is 16 slots of a page, keys and values. Each warp takes every kWarps-th tile of its
// worker's range and keeps kStages of them under way in a pipeline of its own, so that nothing
// waits for the slowest warp before a row ends.
//
// Tiles ask L2 to let them go first: without that other data leaves it, 5 us at 16 x 1024. One
// block of 8 warps per multiprocessor was best of 4 to 16 warps and 1 to 4 blocks. The code is kept
// small: a kernel of some 10 us feels every instruction that it has to fetch (bench_attend).
#pragma once

#include "attend/new_slots.cuh"
#include "attend/row_end.cuh"
#include "attend/tail.cuh"
#include "attend/tiles.cuh"
#include "attend/warp_codes.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/tensor_map.h"

namespace adakv {

/// Rows without entries have no worker: out is 0, lse -inf, or what tiers before this one gave. By one
/// warp of each block of several.
template <typename Config, typename PartsOf>
__device__ inline void clear_empty_rows(const PartsOf& parts_of,
                                        const AttendParams& p,
                                        int32_t block,
                                        int32_t num_blocks,
                                        bool cuts_rows) {
  constexpr bool kGoesOn = PartsOf::Parts::kGoesOn;
  const int32_t lane = threadIdx.x % kWarpSize;
  const int32_t end = cuts_rows ? p.num_rows : block + 1;
  const int32_t width = parts_of.width(Config::kHeadDim);
#pragma unroll 1
  for (int32_t r = block + lane * num_blocks; r < end; r += kWarpSize * num_blocks) {
    if (!parts_of.is_empty(r)) continue;
    const RowContext row = row_context<Config>(p, r, 0);
#pragma unroll 1
    for (int i = 0; i < row.num_queries * width; ++i) {
      const int32_t query = row.first_query + i / width, column = i % width;
      const int32_t head = row.h * p.group.value + p.group.remainder(query);
      const int32_t token = p.group.quotient(query);
      const float lse = kGoesOn ? p.before_of(row.b, head, token) : -INFINITY;
      float x = 0;
      if (lse != -INFINITY) {
        x = reinterpret_cast<const float*>(p.before_out.at(row.b, head, token))[column];
      }
      char* out = p.out.at(row.b, head, token);
      if (kGoesOn && p.writes_floats) {
        reinterpret_cast<float*>(out)[column] = x;
      } else {
        using Element = typename Config::Element;
        reinterpret_cast<Element*>(out)[column] = from_float<Element>(x);
      }
      if (column > 0 || !p.lse.data) continue;
      *reinterpret_cast<float*>(p.lse.at(row.b, head, token)) = lse;
    }
  }
}

__device__ inline schedule::RowFacts load_facts(const void* facts) {
  const int4 first = __ldg(static_cast<const int4*>(facts));
  const int4 second = __ldg(static_cast<const int4*>(facts) + 1);
  return {first.x, first.y, first.z, first.w, second.x, second.y, 0, 0};
}

/// Reads the parameters that a worker needs first: they come from memory a line at a time, which
/// would else happen when they are needed.
__device__ inline void fetch_params(const AttendParams& p) {
  asm volatile("" ::"l"(p.workers), "r"(p.layer.page_size), "l"(p.layer.lengths.data),
               "l"(p.queries.data), "l"(p.out.data), "l"(p.append.keys.data), "r"(p.append.batch),
               "l"(p.append.layer.pages), "r"(p.append.layer.entry_bytes),
               "l"(p.append.layer.lengths.data), "l"(p.append.layer.seen), "l"(p.partials),
               "r"(p.num_tokens), "r"(p.num_heads.value), "f"(p.softcap));
}

/// What the appending warp copies at a time; to tails their reader does.
template <typename Config>
using AppendBatch = std::conditional_t<
    Config::kHasTails,
    NoBatch,
    std::conditional_t<Config::kIsCoded,
                       CodeBatch<typename Config::Element, typename Config::Format, 4>,
                       EntryBatch<uint4, 8>>>;

/// What a block does: the units of a worker if rows are cut, else of a row. It is one of num_blocks that
/// have the same parameters. The warp behind kAllWarps, if there is one, appends.
template <typename Config, typename PartsOf>
__device__ __forceinline__ void attend_block(const AttendParams& p,
                                             int32_t block,
                                             int32_t num_blocks,
                                             bool cuts_rows,
                                             const PartsOf& parts_of,
                                             uint8_t* memory) {
  using Parts = typename PartsOf::Parts;
  AttendShared<Config>& shared = *reinterpret_cast<AttendShared<Config>*>(memory);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (warp < Config::kWarps && Config::kCopiesBoxes) {
    if (lane == 0) prefetch_map(&p.page_map);
    if (lane < Config::kStages) init_barrier(shared_address(&shared.barriers[warp][lane]));
    fence_barriers();
    __syncwarp();
  }
  fetch_params(p);
  // Arguments wait for the kernel before; pages and schedule only if it may have written them.
  if (!p.prefetches || warp == Config::kAllWarps) wait_for_previous_kernel();
  if (warp == Config::kAllWarps) {
#pragma unroll 1
    for (int32_t b = block; b < p.append.batch; b += num_blocks) {
      append_entries<AppendBatch<Config>>(p.append, b, {0, 1, 0, 1});
      __syncwarp();
      count_appended(p.append, b, lane, kWarpSize);
    }
    return;
  }

  Range range = {};
  range.page_shift = p.layer.page_shift - Config::kTileShift;
  schedule::RowFacts facts;
  if (cuts_rows) {
    const schedule::Worker* worker = p.workers + block;
    const int4 header = __ldg(reinterpret_cast<const int4*>(worker));
    facts = load_facts(&worker->facts);
    range.begin = header.x;
    range.end = header.y;
    range.row = header.z;
    range.listed = worker->pages;
    range.num_listed = header.w ? 0 : schedule::kWorkerPages;
  } else {
    facts = load_facts(p.rows + block);
    range.begin = facts.begin;
    range.end = facts.end;
    range.row = block;
    const int32_t b = p.num_heads.quotient(range.row), h = p.num_heads.remainder(range.row);
    range.listed = p.layer.block_table.at(b, h);
    range.num_listed = facts.end - facts.begin;
  }
  TilePipeline<Config> pipeline(p, range, shared);
  const Tails<Config> tails(p, shared);
  const bool takes_tails = Config::kHasTails && warp == Config::kWarps;
  if (takes_tails && facts.end <= range.end) tails.start(range.row, facts.length);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (warp == Config::kWarps - 1 && parts_of.clears_rows()) {
    clear_empty_rows<Config, PartsOf>(parts_of, p, block, num_blocks, cuts_rows);
  }

  int32_t row_index = range.row, tile = 0, image = 0;
  int32_t end = range.begin;
#pragma unroll 1
  while (end < range.end) {
    end = min(range.end, facts.end);
    const bool has_more = end < range.end;
    schedule::RowFacts next = facts;
    if (has_more) next = load_facts(p.rows + row_index + 1);
    const RowContext row = row_context<Config>(p, row_index, facts.length);
    if (takes_tails) {
      tails.run(row, facts.end == end, shared.image[image][warp], shared.max_sum[image][warp]);
    } else {
      WarpState<Config> state(p, row, shared);
      const int32_t end_tile = (end - range.begin) << range.page_shift;
      const int32_t row_tile = (range.begin - facts.begin) * (1 << range.page_shift);
      const int32_t tail_begin = Config::kHasTails ? p.tail_begin(row.b, row.length) : row.length;
      const NewSlots<Config> new_slots(p, row, NewSlots<Config>::are_mine(row, row_tile));
#pragma unroll 1
      for (int32_t t = warp + tile * Config::kWarps; t < end_tile; t += Config::kWarps, ++tile) {
        const TileData data = pipeline.wait(tile);
        const int32_t first_slot = (row_tile + t) * Config::kTileSlots;
        if constexpr (Config::kHasTails) {
          if (first_slot < tail_begin) state.add_tile(p, data, first_slot, row.length);
        } else {
          if (new_slots.are_in(first_slot)) new_slots.patch(first_slot, data);
          state.add_tile(p, data, first_slot, row.length);
        }
        pipeline.release(tile);
      }
      state.store(shared.image[image][warp], shared.max_sum[image][warp]);
    }
    const Parts parts = parts_of(row_index, facts);
    RowEnd<Config, Parts> row_end(p, row, parts, shared, image);
    row_end.run(facts, block, cuts_rows);
    tails.end(row, facts.end == end);
    if (!has_more) return;
    // With two images in turn, nobody can still read the one that is written next.
    image = (image + 1) % Config::kImages;
    if (Config::kImages == 1) RowEnd<Config>::wait_for_warps();
    facts = next;
#pragma unroll 1
    for (++row_index; facts.begin == facts.end;) facts = load_facts(p.rows + ++row_index);
    if (takes_tails && facts.end <= range.end) tails.start(row_index, facts.length);
  }
}

/// Parts of rows whose entries lie in one tier.
struct PartsOfOneTier {
  using Parts = OneTier;
  const AttendParams& p;

  __device__ OneTier operator()(int32_t row, const schedule::RowFacts& facts) const {
    return OneTier(p, row, facts);
  }
  /// Whether this block clears rows without entries.
  __device__ bool clears_rows() const { return true; }
  __device__ bool is_empty(int32_t row) const { return p.rows[row].begin >= p.rows[row].end; }
  /// Columns of out, where the tier has so many.
  static __device__ constexpr int32_t width(int32_t of_tier) { return of_tier; }
};

// grid: [num_workers] if rows are cut, else [num_rows, blocks of queries].
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads + kWarpSize, 1)
    attend_kernel(const __grid_constant__ AttendParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  attend_block<Config>(p, blockIdx.x, gridDim.x, gridDim.y == 1, PartsOfOneTier{p}, memory);
}

template <typename Config>
void launch_instance(const AttendParams& p, cudaStream_t stream) {
  constexpr auto kFormat = Config::Format::kFormat;
  if constexpr (Config::kCopiesBoxes && !Config::kStoresLogits &&
                has_storing_kernel(kFormat, Config::kHeadDim, Config::kQueries)) {
    if (p.logits) return launch_instance<StoringLogits<Config>>(p, stream);
  }
  static_assert(sizeof(AttendShared<Config>) <= Config::kMostBytes);
  const int blocks = schedule::ceil_div(p.group.value * p.num_tokens, Config::kQueries);
  LaunchShape shape;
  shape.grid = blocks == 1 ? dim3(p.num_workers) : dim3(p.num_rows, blocks);
  shape.threads = Config::kThreads + (p.append.keys.data ? kWarpSize : 0);
  shape.shared_bytes = sizeof(AttendShared<Config>);
  shape.early = Config::kCopiesBoxes;
  launch("attend", attend_kernel<Config>, shape, stream, p);
}

template <typename Element, typename Format, int kHeadDim, bool kCopiesBoxes>
void launch_for_queries(const AttendParams& p, cudaStream_t stream) {
  constexpr int kMost = most_queries(Format::kFormat, kHeadDim);
  switch (std::min(kMost, padded_queries(int64_t{p.group.value} * p.num_tokens))) {
    case 4:
      return launch_instance<AttendConfig<Element, Format, kHeadDim, 4, kCopiesBoxes>>(p, stream);
    case 8:
      return launch_instance<AttendConfig<Element, Format, kHeadDim, 8, kCopiesBoxes>>(p, stream);
    default:
      return launch_instance<AttendConfig<Element, Format, kHeadDim, kMost, kCopiesBoxes>>(p,
                                                                                           stream);
  }
}

/// The map of the pages, which the copy engine needs.
template <typename Element, typename Format, int kHeadDim>
void encode_pages(AttendParams& p, int64_t num_pages) {
  using Config = AttendConfig<Element, Format, kHeadDim, 4, true>;
  constexpr uint32_t kColumns = Config::kBoxColumns, kBoxes = Config::kRowColumns / kColumns;
  const uint64_t half_bytes = uint64_t(p.layer.page_size) * Config::kEntryBytes;
  if constexpr (Config::kIsCoded) {
    const ScaleRows &keys = p.layer.key_scales, &values = p.layer.value_scales;
    p.scales_adjoin = p.layer.page_size == Config::kTileSlots &&
                      values.data == keys.data + Config::kKeyScaleBytes &&
                      values.page_stride == keys.page_stride;
    // Columns of a box, slots of a page, boxes side by side, keys and values, pages.
    p.page_map = encode_tensor_map<5>(
        "attend", p.layer.pages,
        {{kColumns, uint64_t(p.layer.page_size), kBoxes, 2, uint64_t(num_pages)},
         {Config::kEntryBytes, kColumns * 2, half_bytes, uint64_t(p.layer.page_stride)},
         {kColumns, Config::kTileSlots, kBoxes, 2, 1}});
  } else {
    // Columns of a box, slots of all pages, boxes side by side, keys and values.
    p.page_map =
        encode_tensor_map<4>("attend", p.layer.pages,
                             {{kColumns, uint64_t(num_pages) * 2 * p.layer.page_size, kBoxes, 2},
                              {Config::kEntryBytes, kColumns * 2, half_bytes},
                              {kColumns, Config::kTileSlots, kBoxes, 2}});
  }
}

template <typename Element, typename Format, int kHeadDim>
void launch_attend(const AttendParams& params, int64_t num_pages, cudaStream_t stream) {
  if constexpr (Format::kScales == 0) {
    if (!device_copies_boxes()) {
      return launch_for_queries<Element, Format, kHeadDim, false>(params, stream);
    }
  }
  AttendParams p = params;
  encode_pages<Element, Format, kHeadDim>(p, num_pages);
  launch_for_queries<Element, Format, kHeadDim, true>(p, stream);
}

}  // namespace adakv
