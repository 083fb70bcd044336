// Copies the kept entries of a prompt into pages, a page at a time. Which pages a row has follows
// from the kept numbers of the rows of its sequence before it, so every warp finds that out itself.
#include <algorithm>

#include "common/check.cuh"
#include "common/device_guard.h"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "cuda_backend.h"
#include "ops/schedule.h"

namespace adakv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

struct CompactParams {
  EntryRows keys, values;      // [B, Hkv, T, D]
  const int32_t* positions;    // [K]
  const int32_t* indptr;       // [B * Hkv + 1]
  const int32_t* seq_lens;     // [B] or null
  const int32_t* page_ids;     // [Q]
  const int32_t* page_indptr;  // [B + 1]
  LayerRows layer;
  int32_t length, num_columns, num_fresh;  // T, M, F
};

/// A page that gets filled: its row, which page of the row it is, and its id.
struct PageJob {
  int32_t head, index, id;
};

/// One warp copies kept entries [first, first + count) of row (b, head) into a page.
template <typename Chunk>
__device__ void fill_page(const CompactParams& p, int32_t b, const PageJob& job) {
  const LayerRows& layer = p.layer;
  const int32_t lane = threadIdx.x % kWarpSize, row = b * layer.num_heads + job.head;
  const int32_t begin = p.indptr[row] + job.index * layer.page_size;
  const int32_t count = min(layer.page_size, p.indptr[row + 1] - begin);
  const int32_t* positions = p.positions + begin;  // [count]
  for (int32_t i = lane; i < count; i += kWarpSize) {
    layer.page_positions[job.id * layer.positions_stride + i] = positions[i];
  }
  const int32_t entry_chunks = layer.entry_bytes / static_cast<int32_t>(sizeof(Chunk));
  const int32_t half = count * entry_chunks;
  char* page = layer.key(job.id, 0);
#pragma unroll 8
  for (int32_t i = lane; i < 2 * half; i += kWarpSize) {
    const bool is_value = i >= half;
    const int32_t chunk = is_value ? i - half : i;
    const int32_t slot = chunk / entry_chunks, offset = chunk % entry_chunks;
    const char* from = (is_value ? p.values : p.keys).at(b, job.head, __ldg(positions + slot));
    char* to = page + (is_value ? layer.half_page_bytes() : 0);
    reinterpret_cast<Chunk*>(to)[chunk] = __ldg(reinterpret_cast<const Chunk*>(from) + offset);
  }
}

/// Writes the integers of sequence b, by threads `thread` of `num_threads`. first_page[h] is how
/// many pages the rows before h fill, [Hkv + 1].
__device__ void write_rows(const CompactParams& p,
                           int32_t b,
                           const int32_t* first_page,
                           int32_t thread,
                           int32_t num_threads) {
  const LayerRows& layer = p.layer;
  const int32_t* ids = p.page_ids + p.page_indptr[b];
  for (int32_t i = thread; i < layer.num_heads * p.num_columns; i += num_threads) {
    const int32_t h = i / p.num_columns, column = i % p.num_columns;
    const bool is_used = column < first_page[h + 1] - first_page[h];
    layer.block_table.at(b, h)[column] = is_used ? ids[first_page[h] + column] : -1;
  }
  for (int32_t i = thread; i < layer.num_heads * p.num_fresh; i += num_threads) {
    const int32_t h = i / p.num_fresh, k = i % p.num_fresh;
    layer.fresh_pages.at(b, h)[k] = k == 0 ? ids[first_page[layer.num_heads] + h] : -1;
  }
  for (int32_t h = thread; h < layer.num_heads; h += num_threads) {
    const int32_t row = b * layer.num_heads + h;
    *layer.lengths.at(b, h) = p.indptr[row + 1] - p.indptr[row];
  }
  if (thread == 0) layer.seen[b] = p.seq_lens ? p.seq_lens[b] : p.length;
}

// grid: [blocks of a sequence, B]; one warp: pages of the sequence, one at a time.
template <typename Chunk>
__global__ void __launch_bounds__(kThreads)
    compact_kernel(const __grid_constant__ CompactParams p) {
  extern __shared__ int32_t first_page[];  // [Hkv + 1]
  __shared__ int32_t scratch[kWarps + 1];
  const int32_t b = blockIdx.y, num_heads = p.layer.num_heads;
  const int32_t* indptr = p.indptr + b * num_heads;
  const int32_t num_pages = block_exclusive_sum<kThreads>(
      num_heads,
      [&](int32_t h) { return schedule::ceil_div(indptr[h + 1] - indptr[h], p.layer.page_size); },
      [&](int32_t h, int32_t before) { first_page[h] = before; }, scratch);
  if (threadIdx.x == 0) first_page[num_heads] = num_pages;
  __syncthreads();

  const int32_t* ids = p.page_ids + p.page_indptr[b];
  const int32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  int32_t head = 0;
  for (int32_t page = warp; page < num_pages; page += gridDim.x * kWarps) {
    while (first_page[head + 1] <= page) ++head;
    fill_page<Chunk>(p, b, {head, page - first_page[head], ids[page]});
  }
  write_rows(p, b, first_page, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
}

}  // namespace

// ------------------------------------------------------------------------------------------------

void CudaBackend::compact(const CompactArgs& args) {
  const DeviceGuard guard(args.keys.device);
  CompactParams p = {};
  p.keys = entry_rows(args.keys);
  p.values = entry_rows(args.values);
  p.positions = args.positions.ptr<int32_t>();
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

  // A warp for each page, if kept entries are spread evenly over the sequences.
  const int64_t pages = args.positions.shape[0] / p.layer.page_size / batch + num_heads;
  const dim3 grid(static_cast<uint32_t>(std::clamp<int64_t>(pages / kWarps, 1, 1024)),
                  static_cast<uint32_t>(batch));
  const size_t shared_bytes = static_cast<size_t>(num_heads + 1) * sizeof(int32_t);
  const bool is_aligned = rows_are_aligned(args.keys, 16) && rows_are_aligned(args.values, 16) &&
                          rows_are_aligned(args.layer.pages, 16);
  dispatch_chunk(is_aligned, args.keys.dtype, [&](auto tag) {
    using Chunk = typename decltype(tag)::type;
    compact_kernel<Chunk>
        <<<grid, kThreads, shared_bytes, static_cast<cudaStream_t>(args.stream)>>>(p);
  });
  ADAKV_CUDA_CHECK("compact", cudaGetLastError());
}

size_t CudaBackend::workspace_bytes(const CompactArgs&) const {
  return 0;
}

}  // namespace adakv
