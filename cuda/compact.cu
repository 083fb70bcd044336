// Copies the kept entries of a prompt into pages. Which pages a row has follows from the kept
// numbers of the rows of its sequence before it: every warp finds that out itself, and waits for
// three reads in a row, not more (the bounds of the rows; positions and page id; entries).
#include <algorithm>

#include "common/async_copy.cuh"
#include "common/check.cuh"
#include "common/codes.cuh"
#include "common/device_guard.h"
#include "common/divisor.cuh"
#include "common/int4_page.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "cuda_backend.h"
#include "ops/schedule.h"

namespace adakv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMostSlots = 16;    // that a warp fills at a time, keys or values
constexpr int kColumns = 256;     // of the block table that a warp writes
constexpr int kChunksAtOnce = 8;  // that a lane has under way

struct CompactParams {
  EntryRows keys, values;      // [B, Hkv, T, D]
  EntryRows biases;            // [B, Hkv, T] float16, or none
  const int32_t* positions;    // [K]
  const int32_t* places;       // [K], where the entries lie among keys and values
  const int32_t* indptr;       // [B * Hkv + 1]
  const int32_t* seq_lens;     // [B] or null
  const int32_t* page_ids;     // [Q]
  const int32_t* page_indptr;  // [B + 1]
  LayerRows layer;
  int32_t length, num_columns, num_fresh;  // T, M, F
  int32_t num_spans;                       // of a row of the block table, kColumns each
  int32_t part_slots, part_shift;          // a page is filled in 1 << part_shift parts
  Divisor key_chunks, value_chunks;        // of an entry

  __device__ int32_t num_pages(int32_t row) const {
    return layer.num_pages(indptr[row + 1] - indptr[row]);
  }
};

/// A row that gets filled.
struct FilledRow {
  int32_t head;
  int32_t begin, end;  // its kept entries
  int32_t first_page;  // of those of the sequence
};

/// The row of sequence b that page `page` of the sequence belongs to; head is num_heads if there
/// are fewer pages.
__device__ FilledRow find_row(const CompactParams& p, int32_t b, int32_t page) {
  const int32_t num_heads = p.layer.num_heads;
  FilledRow row = {num_heads, 0, 0, 0};
  int32_t before = 0;
#pragma unroll 1
  for (int32_t base = 0; base < num_heads && before <= page; base += kWarpSize) {
    const int32_t head = base + static_cast<int32_t>(threadIdx.x) % kWarpSize;
    const int32_t* bounds = p.indptr + b * num_heads + min(head, num_heads - 1);
    const int32_t begin = bounds[0], end = head < num_heads ? bounds[1] : begin;
    const int32_t pages = p.layer.num_pages(end - begin);
    const int32_t sum = before + warp_inclusive_sum(pages);
    const uint32_t later = __ballot_sync(kFullWarp, sum > page);
    const int lane = later ? __ffs(later) - 1 : kWarpSize - 1;
    row.head = later ? base + lane : num_heads;
    row.begin = __shfl_sync(kFullWarp, begin, lane);
    row.end = __shfl_sync(kFullWarp, end, lane);
    row.first_page = __shfl_sync(kFullWarp, sum - pages, lane);
    before = __shfl_sync(kFullWarp, sum, lane);
  }
  return row;
}

/// The keys or the values that one warp puts into slots of a page.
struct Part {
  const char* from;  // [T, D], entry_stride bytes from one to the next
  int64_t entry_stride;
  int32_t place;  // in lane i, of entry i
  int32_t count;  // of entries
  int32_t page, slot;
  bool is_value;
};

/// Copies them as they are, by chunks.
template <typename Chunk>
struct CopyEntries {
  static __device__ void run(const CompactParams& p, const Part& part);
};

template <typename Chunk>
__device__ void CopyEntries<Chunk>::run(const CompactParams& p, const Part& part) {
  char* to =
      part.is_value ? p.layer.value(part.page, part.slot) : p.layer.key(part.page, part.slot);
  const Divisor entry_chunks = part.is_value ? p.value_chunks : p.key_chunks;
  const int32_t count = part.count;
  const int32_t num_chunks = count * entry_chunks.value;
  const uint64_t policy = read_once_policy();
#pragma unroll 1
  for (int32_t first = threadIdx.x % kWarpSize; first - first % kWarpSize < num_chunks;
       first += kChunksAtOnce * kWarpSize) {
    Chunk data[kChunksAtOnce];
#pragma unroll
    for (int k = 0; k < kChunksAtOnce; ++k) {
      const int32_t chunk = min(first + k * kWarpSize, num_chunks - 1);
      const int32_t slot = entry_chunks.quotient(chunk);
      const int32_t in_entry = chunk - slot * entry_chunks.value;
      const int64_t entry = __shfl_sync(kFullWarp, part.place, slot) * part.entry_stride;
      data[k] = read_once(reinterpret_cast<const Chunk*>(part.from + entry) + in_entry, policy);
    }
#pragma unroll
    for (int k = 0; k < kChunksAtOnce; ++k) {
      const int32_t chunk = first + k * kWarpSize;
      if (chunk < num_chunks) reinterpret_cast<Chunk*>(to)[chunk] = data[k];
    }
  }
}

/// Quantises them: eight elements a lane, as many entries at a time as a warp has lanes for.
template <typename Element, typename Format>
struct QuantiseEntries {
  static constexpr int kAtOnce = 3;  // chunks that a lane has under way

  static __device__ void run(const CompactParams& p, const Part& part) {
    const int32_t width = width_of(p, part);
    const int32_t entry_lanes = padded_head_dim(width) / kChunkElements;  // 8, 16, 24 or 32
    const int32_t at_once = kWarpSize / entry_lanes;
    const int32_t lane = threadIdx.x % kWarpSize, entry = lane / entry_lanes;
    EntryPart mine;
    mine.element = (lane - entry * entry_lanes) * kChunkElements;
    mine.is_value = part.is_value;
#pragma unroll 1
    for (int32_t first = 0; first < part.count; first += kAtOnce * at_once) {
      uint4 data[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int32_t i = first + k * at_once + entry;
        const int64_t place = __shfl_sync(kFullWarp, part.place, i % kWarpSize);
        data[k] = make_uint4(0, 0, 0, 0);
        if (is_there(p, part, mine, entry, at_once, i)) {
          data[k] = load_chunk<Element>(part.from + place * part.entry_stride +
                                        mine.element * sizeof(Element));
        }
      }
      CodedChunk chunks[kAtOnce];
      quantise<Format, Element>(data, mine.element < width, chunks);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int32_t i = first + k * at_once + entry;
        mine.is_there = is_there(p, part, mine, entry, at_once, i);
        store_chunk<Format>(p.layer, part.page, part.slot + i, mine, chunks[k]);
      }
    }
  }

 private:
  static __device__ bool is_there(const CompactParams& p,
                                  const Part& part,
                                  const EntryPart& mine,
                                  int32_t entry,
                                  int32_t at_once,
                                  int32_t i) {
    return entry < at_once && i < part.count && mine.element < width_of(p, part);
  }

  static __device__ int32_t width_of(const CompactParams& p, const Part& part) {
    return part.is_value ? p.layer.value_dim : p.layer.head_dim;
  }
};

/// One warp fills parts of pages of sequence b: part `job`, job + step, ...
template <typename Fill>
__device__ void fill_pages(const CompactParams& p, int32_t b, int32_t job, int32_t step) {
  const LayerRows& layer = p.layer;
  const int32_t lane = threadIdx.x % kWarpSize;
  const int32_t first_id = p.page_indptr[b];
#pragma unroll 1
  while (true) {
    const int32_t page = job >> p.part_shift, part = job - (page << p.part_shift);
    const bool is_value = part & 1;
    const int32_t slot = (part >> 1) * p.part_slots;
    const FilledRow row = find_row(p, b, page);
    if (row.head == layer.num_heads) break;
    const int32_t id = p.page_ids[first_id + page];
    const int32_t begin = row.begin + (page - row.first_page) * layer.page_size + slot;
    const int32_t count = min(p.part_slots, row.end - begin);
    const int32_t place = lane < count ? p.places[begin + lane] : 0;
    if (!is_value && lane < count) {
      layer.page_positions[id * layer.positions_stride + slot + lane] = p.positions[begin + lane];
      if (layer.page_biases) {
        const char* bias = p.biases.data ? p.biases.at(b, row.head, place) : nullptr;
        layer.page_biases[id * layer.biases_stride + slot + lane] =
            bias ? *reinterpret_cast<const uint16_t*>(bias) : 0;
      }
    }
    const EntryRows& entries = is_value ? p.values : p.keys;
    Fill::run(p, {entries.at(b, row.head, 0), entries.stride[2], place, count, id, slot, is_value});
    job += step;
  }
}

/// One warp writes a span of the block table's row for (b, head); with the first span what else
/// there is to write about the row.
__device__ void write_row(const CompactParams& p, int32_t b, int32_t head, int32_t span) {
  const LayerRows& layer = p.layer;
  const int32_t lane = threadIdx.x % kWarpSize, first_row = b * layer.num_heads;
  int32_t pages_before = 0, num_pages = 0;  // before this row, and of the sequence
#pragma unroll 1
  for (int32_t h = lane; h < layer.num_heads; h += kWarpSize) {
    const int32_t pages = p.num_pages(first_row + h);
    num_pages += pages;
    if (h < head) pages_before += pages;
  }
  pages_before = warp_sum(pages_before);
  num_pages = warp_sum(num_pages);
  const int32_t* ids = p.page_ids + p.page_indptr[b];
  const int32_t used = p.num_pages(first_row + head);
  const int32_t end = min(p.num_columns, (span + 1) * kColumns);
  for (int32_t column = span * kColumns + lane; column < end; column += kWarpSize) {
    layer.block_table.at(b, head)[column] = column < used ? ids[pages_before + column] : -1;
  }
  if (span > 0) return;
  for (int32_t k = lane; k < p.num_fresh; k += kWarpSize) {
    layer.fresh_pages.at(b, head)[k] = k == 0 ? ids[num_pages + head] : -1;
  }
  if (lane > 0) return;
  *layer.lengths.at(b, head) = p.indptr[first_row + head + 1] - p.indptr[first_row + head];
  if (head == 0) layer.seen[b] = p.seq_lens ? p.seq_lens[b] : p.length;
}

// grid: [blocks of a sequence, B]; the first warps of a sequence write its rows' integers, each of
// the others fills parts of pages.
template <typename Fill>
__global__ void __launch_bounds__(kThreads, 4)
    compact_kernel(const __grid_constant__ CompactParams p) {
  const int32_t b = blockIdx.y, num_writers = p.layer.num_heads * p.num_spans;
  const int32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  if (warp < num_writers) {
    write_row(p, b, warp / p.num_spans, warp % p.num_spans);
  } else {
    fill_pages<Fill>(p, b, warp - num_writers, gridDim.x * kWarps - num_writers);
  }
}

/// Entries [begin, begin + count) of a page, as one block has them in shared memory: a row for each
/// key, then for each value, apart in banks.
template <typename Element>
class PageEntries {
 public:
  __device__ PageEntries(const CompactParams& p, const FilledRow& row, int32_t b, int32_t begin)
      : p_(p), row_(row), b_(b), places_(p.places + begin) {}

  static size_t bytes(int32_t head_dim) { return 2 * kPageSlots * row_bytes(head_dim); }

  /// Eight elements of an entry in memory.
  __device__ uint4 read(bool is_value, int32_t slot, int32_t element) const {
    const EntryRows& entries = is_value ? p_.values : p_.keys;
    return load_chunk<Element>(entries.at(b_, row_.head, places_[slot]) + element * 2);
  }

  /// Calls the body with (is_value, slot, element) of each eight elements of `count` entries.
  template <typename Body>
  __device__ void for_each(int32_t count, const Body& body) const {
    const int32_t chunks = p_.layer.head_dim / kChunkElements;
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < 2 * count * chunks; i += kThreads) {
      const bool is_value = i >= count * chunks;
      body(is_value, i / chunks - (is_value ? count : 0), i % chunks * kChunkElements);
    }
  }

  __device__ uint4& held(bool is_value, int32_t slot, int32_t element) const {
    extern __shared__ uint4 memory[];
    const int32_t row = slot + (is_value ? kPageSlots : 0);
    return memory[(row * row_bytes(p_.layer.head_dim) + element * 2) / sizeof(uint4)];
  }

 private:
  static constexpr __host__ __device__ int32_t row_bytes(int32_t head_dim) {
    return head_dim * 2 + 16;
  }

  const CompactParams& p_;
  const FilledRow& row_;
  const int32_t b_, *places_;
};

/// One block quantises page `page` of sequence b; entries that fill no page go to the row's tail.
/// Returns whether there is such a page.
template <typename Element>
__device__ bool fill_tailed_page(const CompactParams& p, int32_t b, int32_t page) {
  const LayerRows& layer = p.layer;
  const FilledRow row = find_row(p, b, page);
  if (row.head == layer.num_heads) return false;
  const int32_t id = p.page_ids[p.page_indptr[b] + page];
  const int32_t begin = row.begin + (page - row.first_page) * kPageSlots;
  const int32_t count = min(kPageSlots, row.end - begin);
  if (static_cast<int32_t>(threadIdx.x) < count) {
    const int32_t slot = threadIdx.x;
    layer.page_positions[id * layer.positions_stride + slot] = p.positions[begin + slot];
  }
  const PageEntries<Element> entries(p, row, b, begin);
  const auto hold = [&](bool is_value, int32_t slot, int32_t element) {
    entries.held(is_value, slot, element) = entries.read(is_value, slot, element);
  };
  const auto keep = [&](bool is_value, int32_t slot, int32_t element) {
    *reinterpret_cast<uint4*>(layer.tail(b, row.head, is_value, slot, element)) =
        entries.read(is_value, slot, element);
  };
  if (count < kPageSlots) {
    entries.for_each(count, keep);
    return true;
  }
  entries.for_each(count, hold);
  __syncthreads();
  const auto load = [&](bool is_value, int32_t slot, int32_t element) {
    return entries.held(is_value, slot, element);
  };
  quantise_page<Element>(layer, id, load, threadIdx.x / kWarpSize, kWarps);
  __syncthreads();
  return true;
}

// grid: [blocks of a sequence, B]; the first blocks of a sequence write its rows' integers, each of
// the others fills pages.
template <typename Element>
__global__ void __launch_bounds__(kThreads, 4)
    compact_tailed_kernel(const __grid_constant__ CompactParams p) {
  const int32_t b = blockIdx.y, num_writers = p.layer.num_heads * p.num_spans;
  const int32_t writer_blocks = (num_writers + kWarps - 1) / kWarps;
  const int32_t page = blockIdx.x - writer_blocks;
  if (page < 0) {
    const int32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
    if (warp < num_writers) write_row(p, b, warp / p.num_spans, warp % p.num_spans);
    return;
  }
  const int32_t step = gridDim.x - writer_blocks;
#pragma unroll 1
  for (int32_t i = page; fill_tailed_page<Element>(p, b, i);) i += step;
}

}  // namespace

// ------------------------------------------------------------------------------------------------

void CudaBackend::compact(const CompactArgs& args) {
  if (!args.keys) return cuda_compact_in_place(args);
  const DeviceGuard guard(args.keys.device);
  CompactParams p = {};
  p.keys = entry_rows(args.keys);
  p.values = entry_rows(args.values);
  p.biases = entry_rows(args.biases);
  p.positions = args.positions.ptr<int32_t>();
  p.places = (args.places ? args.places : args.positions).ptr<int32_t>();
  p.indptr = args.indptr.ptr<int32_t>();
  p.seq_lens = args.seq_lens ? args.seq_lens.ptr<int32_t>() : nullptr;
  p.page_ids = args.page_ids.ptr<int32_t>();
  p.page_indptr = args.page_indptr.ptr<int32_t>();
  p.layer = layer_rows(args.layer);
  p.length = static_cast<int32_t>(args.keys.shape[2]);
  p.num_columns = static_cast<int32_t>(args.layer.block_table.shape[2]);
  p.num_fresh = static_cast<int32_t>(args.layer.fresh_pages.shape[2]);
  const int64_t batch = args.keys.shape[0], num_heads = args.keys.shape[1];
  if (batch == 0 || num_heads == 0) return;

  p.num_spans = std::max(1, schedule::ceil_div(p.num_columns, kColumns));
  p.part_slots = std::min(kMostSlots, p.layer.page_size);
  p.part_shift = 1;  // keys and values
  while (p.part_slots << p.part_shift < 2 * p.layer.page_size) ++p.part_shift;

  const bool is_aligned = rows_are_aligned(args.keys, 16) && rows_are_aligned(args.values, 16) &&
                          rows_are_aligned(args.layer.pages, 16) &&
                          rows_are_aligned(args.layer.values(), 16);
  const cudaStream_t stream = static_cast<cudaStream_t>(args.stream);
  // A warp for each part, if kept entries are spread evenly over the sequences; with tails a block for
  // each page.
  const int64_t pages = args.positions.shape[0] / p.layer.page_size / batch + num_heads;
  const int64_t writers = num_heads * p.num_spans;
  const auto grid = [&](int64_t blocks) {
    return dim3(static_cast<uint32_t>(blocks), static_cast<uint32_t>(batch));
  };
  const auto run = [&](auto fill) {
    const int64_t warps = writers + (pages << p.part_shift);
    compact_kernel<typename decltype(fill)::type>
        <<<grid((warps + kWarps - 1) / kWarps), kThreads, 0, stream>>>(p);
  };
  const PageFormat format = args.layer.format();
  if (format == PageFormat::kPlain) {
    dispatch_chunk(is_aligned, args.keys.dtype, [&](auto chunk) {
      using Chunk = typename decltype(chunk)::type;
      p.key_chunks = Divisor::of(p.layer.entry_bytes / sizeof(Chunk));
      p.value_chunks = Divisor::of(p.layer.value_bytes / sizeof(Chunk));
      run(TypeTag<CopyEntries<Chunk>>{});
    });
  } else {
    dispatch_codes(args.keys.dtype, format, [&](auto element, auto codes) {
      using Element = typename decltype(element)::type;
      using Format = typename decltype(codes)::type;
      if constexpr (Format::kHasTails) {
        compact_tailed_kernel<Element>
            <<<grid((writers + kWarps - 1) / kWarps + pages), kThreads,
               PageEntries<Element>::bytes(p.layer.head_dim), stream>>>(p);
      } else {
        run(TypeTag<QuantiseEntries<Element, Format>>{});
      }
    });
  }
  ADAKV_CUDA_CHECK("compact", cudaGetLastError());
}

size_t CudaBackend::workspace_bytes(const CompactArgs& args) const {
  return args.keys ? 0 : cuda_compact_in_place_workspace_bytes(args);
}

}  // namespace adakv
