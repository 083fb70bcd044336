// Shares the pages of all rows out to workers, a layer at a time; the same integers as
// cpp/cpu/plan.cc. The rules and the format are in ops/schedule.h.
//
// A layer is done by kSlices blocks. Each finds the borders of all ranges for itself, which takes a
// few prefix sums and searches over the rows, and writes its share of the rows and workers: no block
// waits for another.
#include <algorithm>

#include "common/check.cuh"
#include "common/device_guard.h"
#include "common/reduce.cuh"
#include "cuda_backend.h"
#include "ops/schedule.h"

namespace adakv {
namespace {

using schedule::RowFacts;
using schedule::Worker;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSlices = 4;

struct PlanParams {
  const int32_t* lengths;      // [L, B, Hkv]
  const int32_t* block_table;  // [L, B, Hkv, M]
  const int32_t* fresh_pages;  // [L, B, Hkv, F]
  const int32_t* num_new;      // [B] or null
  int32_t* schedule;           // [L, X]
  int64_t lengths_stride[3], table_stride[3], fresh_stride[3], num_new_stride, schedule_stride;
  int32_t num_rows, num_heads, num_workers, page_size, new_tokens;
  bool keeps_rows_in_schedule;  // too many for shared memory
};

/// Integers of all rows of a layer, in shared memory or in a field of the schedule's row facts.
struct RowArray {
  int32_t* data;
  int32_t stride;

  __device__ int32_t& operator[](int32_t row) const { return data[int64_t{row} * stride]; }
};

/// First i of 0 .. count with value(i) > wanted; value must ascend.
template <typename Value>
__device__ int32_t first_above(int32_t wanted, int32_t count, const Value& value) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (value(middle) > wanted) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

/// One layer, as one block sees it. All its threads call each function.
struct LayerPlan {
  const PlanParams& p;
  int64_t layer;
  int32_t slice, num_slices;
  Worker* workers;   // [num_workers]
  RowFacts* rows;    // [num_rows]
  RowArray begins;   // [num_rows] units before a row
  RowArray partials;  // [num_rows] partial results before a row
  int32_t* borders;  // [num_workers + 1], shared memory
  int32_t* scratch;  // [kWarps + 1], shared memory
  int32_t num_units = 0, num_ranges = 0;

  __device__ int64_t row_offset(const int64_t (&stride)[3], int32_t row) const {
    return layer * stride[0] + row / p.num_heads * stride[1] + row % p.num_heads * stride[2];
  }

  __device__ int32_t length_before(int32_t row) const {
    return p.lengths[row_offset(p.lengths_stride, row)];
  }

  __device__ int32_t length(int32_t row) const {
    const int32_t b = row / p.num_heads;
    const bool is_ragged = p.num_new && p.new_tokens > 0;
    return length_before(row) + (is_ragged ? p.num_new[b * p.num_new_stride] : p.new_tokens);
  }

  __device__ int32_t end(int32_t row) const {
    return row + 1 < p.num_rows ? begins[row + 1] : num_units;
  }

  __device__ int32_t units(int32_t row) const { return end(row) - begins[row]; }

  __device__ void find_units() {
    num_units = block_exclusive_sum<kThreads>(
        p.num_rows, [&](int32_t r) { return schedule::ceil_div(length(r), p.page_size); },
        [&](int32_t r, int32_t before) { begins[r] = before; }, scratch);
    __syncthreads();
  }

  /// Chunks that all rows make, counted by one warp.
  __device__ int32_t count_chunks(int32_t chunk) const {
    int32_t chunks = 0;
    for (int32_t r = threadIdx.x % kWarpSize; r < p.num_rows; r += kWarpSize) {
      chunks += schedule::ceil_div(units(r), chunk);
    }
    return warp_sum(chunks);
  }

  /// The smallest chunk that makes at most `active` chunks, if it is even enough, else 0. Chunks
  /// below P / N make too many, so a few sizes are left to try, one warp each.
  __device__ int32_t find_chunk(int32_t active) {
    __shared__ int32_t smallest_good, largest_bad;
    int32_t low = schedule::ceil_div(num_units, active);
    const int32_t too_uneven = schedule::largest_even_chunk(num_units, active) + 1;
    int32_t high = too_uneven;
    while (low < high) {
      const int32_t step = schedule::ceil_div(high - low, kWarps);
      const int32_t chunk = low + static_cast<int32_t>(threadIdx.x) / kWarpSize * step;
      if (threadIdx.x == 0) {
        smallest_good = high;
        largest_bad = low - 1;
      }
      __syncthreads();
      if (chunk < high) {
        const bool is_good = count_chunks(chunk) <= active;
        if (threadIdx.x % kWarpSize == 0) {
          if (is_good) atomicMin(&smallest_good, chunk);
          if (!is_good) atomicMax(&largest_bad, chunk);
        }
      }
      __syncthreads();
      high = smallest_good;
      low = largest_bad + 1;
      __syncthreads();
    }
    return high < too_uneven ? high : 0;
  }

  __device__ void cut_rows(int32_t chunk) {
    num_ranges = block_exclusive_sum<kThreads>(
        p.num_rows, [&](int32_t r) { return schedule::ceil_div(units(r), chunk); },
        [&](int32_t r, int32_t before) {
          const int32_t parts = schedule::ceil_div(units(r), chunk);
          for (int32_t j = 1; j <= parts; ++j) {
            borders[before + j] = begins[r] + schedule::even_border(j, units(r), parts);
          }
        },
        scratch);
  }

  __device__ void cut_evenly(int32_t active) {
    num_ranges = active;
    for (int32_t k = threadIdx.x + 1; k <= active; k += kThreads) {
      const int32_t even = schedule::even_border(k, num_units, active);
      const int32_t row = first_above(even - 1, p.num_rows, [&](int32_t r) { return end(r); });
      borders[k] = schedule::snapped_border(even, begins[row], end(row), num_units, active);
    }
  }

  __device__ void find_borders() {
    if (threadIdx.x == 0) borders[0] = 0;
    if (num_units > 0) {
      const int32_t active = schedule::active_workers(num_units, p.num_workers);
      const int32_t chunk = find_chunk(active);
      if (chunk > 0) {
        cut_rows(chunk);
      } else {
        cut_evenly(active);
      }
    }
    __syncthreads();
  }

  /// The worker whose range holds a unit.
  __device__ int32_t worker_of(int32_t unit) const {
    return first_above(unit, num_ranges, [&](int32_t k) { return borders[k + 1]; });
  }

  __device__ int32_t num_partials(int32_t row) const {
    return units(row) ? worker_of(end(row) - 1) - worker_of(begins[row]) + 1 : 0;
  }

  __device__ void find_partials() {
    block_exclusive_sum<kThreads>(
        p.num_rows,
        [&](int32_t r) {
          const int32_t count = num_partials(r);
          return count > 1 ? count : 0;
        },
        [&](int32_t r, int32_t before) { partials[r] = before; }, scratch);
    __syncthreads();
  }

  __device__ RowFacts facts(int32_t row) const {
    const int32_t first_worker = units(row) ? worker_of(begins[row]) : 0;
    return {begins[row],      end(row),     length(row), partials[row],
            num_partials(row), first_worker, {0, 0}};
  }

  __device__ void write_rows() const {
    const int32_t step = num_slices * kThreads;
    for (int32_t r = slice * kThreads + threadIdx.x; r < p.num_rows; r += step) rows[r] = facts(r);
  }

  /// Page of a unit, which lies in `row`.
  __device__ int32_t page_of(int32_t unit, int32_t row) const {
    const int32_t index = unit - begins[row];
    const int32_t used = schedule::ceil_div(length_before(row), p.page_size);
    return index < used ? p.block_table[row_offset(p.table_stride, row) + index]
                        : p.fresh_pages[row_offset(p.fresh_stride, row) + index - used];
  }

  __device__ int32_t row_of(int32_t unit) const {
    return first_above(unit, p.num_rows, [&](int32_t r) { return end(r); });
  }

  /// One warp writes one worker.
  __device__ void write_workers() const {
    const int32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    for (int32_t w = slice + warp * num_slices; w < p.num_workers; w += kWarps * num_slices) {
      Worker& worker = workers[w];
      const bool is_idle = w >= num_ranges;
      const int32_t begin = is_idle ? 0 : borders[w], end = is_idle ? 0 : borders[w + 1];
      for (int32_t i = lane; i < schedule::kWorkerPages; i += kWarpSize) {
        const int32_t unit = begin + i;
        worker.pages[i] = unit < end ? page_of(unit, row_of(unit)) : 0;
      }
      if (lane == 0) {
        const int32_t row = is_idle ? 0 : row_of(begin);
        worker.begin = begin;
        worker.end = end;
        worker.row = row;
        worker.unused = 0;
        worker.facts = is_idle ? RowFacts{} : facts(row);
      }
    }
  }
};

// grid: [kSlices, L]; one block: one layer's borders, and a share of its rows and workers.
__global__ void __launch_bounds__(kThreads) plan_kernel(const __grid_constant__ PlanParams p) {
  extern __shared__ int32_t shared[];  // borders [num_workers + 1], begins and partials [num_rows]
  __shared__ int32_t scratch[kWarps + 1];
  const int64_t layer = blockIdx.y;
  Worker* workers = reinterpret_cast<Worker*>(p.schedule + layer * p.schedule_stride);
  RowFacts* rows = reinterpret_cast<RowFacts*>(workers + p.num_workers);
  int32_t* after_borders = shared + p.num_workers + 1;
  const bool is_far = p.keeps_rows_in_schedule;
  const RowArray begins = is_far ? RowArray{&rows->begin, schedule::kRowInts}
                                 : RowArray{after_borders, 1};
  const RowArray partials = is_far ? RowArray{&rows->first_partial, schedule::kRowInts}
                                   : RowArray{after_borders + p.num_rows, 1};
  LayerPlan plan{p,    layer,  static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(gridDim.x),
                 workers, rows, begins, partials, shared, scratch};
  plan.find_units();
  plan.find_borders();
  plan.find_partials();
  plan.write_rows();
  plan.write_workers();
}

}  // namespace

// ------------------------------------------------------------------------------------------------

void CudaBackend::plan(const PlanArgs& args) {
  const DeviceGuard guard(args.lengths.device);
  const TensorView& lengths = args.lengths;
  PlanParams p = {};
  p.lengths = lengths.ptr<int32_t>();
  p.block_table = args.block_table.ptr<int32_t>();
  p.fresh_pages = args.fresh_pages.ptr<int32_t>();
  p.num_new = args.num_new ? args.num_new.ptr<int32_t>() : nullptr;
  p.schedule = args.schedule.ptr<int32_t>();
  std::copy_n(lengths.stride, 3, p.lengths_stride);
  std::copy_n(args.block_table.stride, 3, p.table_stride);
  std::copy_n(args.fresh_pages.stride, 3, p.fresh_stride);
  p.num_new_stride = args.num_new.stride[0];
  p.schedule_stride = args.schedule.stride[0];
  p.num_heads = static_cast<int32_t>(lengths.shape[2]);
  p.num_rows = static_cast<int32_t>(lengths.shape[1] * lengths.shape[2]);
  p.num_workers = args.num_workers;
  p.page_size = args.page_size;
  p.new_tokens = args.new_tokens;
  if (lengths.shape[0] == 0) return;

  constexpr size_t kMostShared = 48 << 10;  // what every device gives without asking
  size_t shared_ints = size_t(args.num_workers) + 1;
  p.keeps_rows_in_schedule = (shared_ints + 2 * size_t(p.num_rows)) * 4 > kMostShared;
  if (!p.keeps_rows_in_schedule) shared_ints += 2 * size_t(p.num_rows);
  const dim3 grid(p.keeps_rows_in_schedule ? 1 : kSlices, static_cast<uint32_t>(lengths.shape[0]));
  plan_kernel<<<grid, kThreads, shared_ints * 4, static_cast<cudaStream_t>(args.stream)>>>(p);
  ADAKV_CUDA_CHECK("plan", cudaGetLastError());
}

}  // namespace adakv
