// Shares the pages of all rows out to workers, a layer at a time; the same integers as
// cpp/cpu/plan.cc. The rules and the format are in ops/schedule.h.
//
// A layer is done by several blocks. Each finds the borders of all ranges for itself, which takes
// a few prefix sums and searches over the rows, and writes its share of the rows and workers: no
// block waits for another.
#include <algorithm>

#include "common/async_copy.cuh"
#include "common/device_guard.h"
#include "common/divisor.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "cuda_backend.h"
#include "ops/listing.h"
#include "ops/schedule.h"

namespace adakv {
namespace {

using schedule::RowFacts;
using schedule::Worker;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMostSlices = 16;

struct PlanParams {
  const int32_t* lengths;      // [L, B, Hkv]
  const int32_t* block_table;  // [L, B, Hkv, M]
  const int32_t* fresh_pages;  // [L, B, Hkv, F]
  const int32_t* num_new;      // [B] or null
  int32_t* schedule;           // [L, X]
  int64_t lengths_stride[3], table_stride[3], fresh_stride[3], schedule_stride;
  int32_t num_rows, num_workers, page_size, page_shift, new_tokens;
  Divisor num_heads;
  bool lists;  // schedules are for pages that shortlist will list by the rule
  listing::Rule rule;
  bool shares_rows;  // the facts of all rows fit into shared memory
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

/// The same of two numbers, side by side.
template <typename Value>
__device__ int2 first_above(int2 wanted, int32_t count, const Value& value) {
  int2 below = {0, 0};
  for (int32_t step = 1 << (31 - __clz(count | 1)); step > 0; step /= 2) {
    const int32_t x = below.x + step, y = below.y + step;
    const int32_t at_x = value(max(min(x, count) - 1, 0)), at_y = value(max(min(y, count) - 1, 0));
    if (x <= count && at_x <= wanted.x) below.x = x;
    if (y <= count && at_y <= wanted.y) below.y = y;
  }
  return below;
}

/// One layer, as one block sees it. All its threads call each function.
struct LayerPlan {
  const PlanParams& p;
  int64_t layer;
  int32_t slice, num_slices;
  Worker* workers;   // [num_workers]
  RowFacts* rows;    // [num_rows], in shared memory, or where they go to
  int32_t* borders;  // [num_workers + 1], shared memory
  int32_t* scratch;  // [kWarps + 1], shared memory
  int32_t num_units = 0, num_ranges = 0;

  __device__ int64_t row_offset(const int64_t (&stride)[3], int32_t row) const {
    return layer * stride[0] + p.num_heads.quotient(row) * stride[1] +
           p.num_heads.remainder(row) * stride[2];
  }

  __device__ int32_t new_tokens(int32_t row) const {
    const bool is_ragged = p.num_new && p.new_tokens > 0;
    return is_ragged ? p.num_new[p.num_heads.quotient(row)] : p.new_tokens;
  }

  __device__ int32_t num_pages(int32_t length) const {
    return (length + p.page_size - 1) >> p.page_shift;
  }

  __device__ int32_t units(int32_t row) const { return rows[row].end - rows[row].begin; }

  __device__ void find_units() {
    num_units = block_exclusive_sum<kThreads>(
        p.num_rows,
        [&](int32_t r) {
          const int32_t tokens = new_tokens(r);
          const int32_t length = p.lengths[row_offset(p.lengths_stride, r)] + tokens;
          const bool asks = tokens > 0 || p.new_tokens == 0;
          rows[r].length = p.lists ? p.rule.listed_length(length, asks) : length;
          return num_pages(rows[r].length);
        },
        [&](int32_t r, int32_t before) {
          rows[r].begin = before;
          rows[r].end = before + num_pages(rows[r].length);
        },
        scratch);
    __syncthreads();
  }

  /// Chunks that all rows make, counted by one warp.
  __device__ int32_t count_chunks(int32_t chunk) const {
    int32_t chunks = 0;
#pragma unroll 1
    for (int32_t r = threadIdx.x % kWarpSize; r < p.num_rows; r += kWarpSize) {
      chunks += schedule::ceil_div(units(r), chunk);
    }
    return warp_sum(chunks);
  }

  /// Whether the rows make more than `most` chunks; asked of all threads.
  __device__ bool makes_many_chunks(int32_t chunk, int32_t most) const {
    __shared__ int32_t total;
    if (threadIdx.x == 0) total = 0;
    int32_t chunks = 0;
#pragma unroll 1
    for (int32_t r = threadIdx.x; r < p.num_rows; r += kThreads) {
      chunks += schedule::ceil_div(units(r), chunk);
    }
    chunks = warp_sum(chunks);
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) atomicAdd(&total, chunks);
    __syncthreads();
    return total > most;
  }

  /// The smallest chunk that makes at most `active` chunks, if it is even enough, else 0: with many
  /// rows none is. Chunks below P / N make too many, so a few sizes are left to try, one warp each.
  __device__ int32_t find_chunk(int32_t active) {
    __shared__ int32_t smallest_good, largest_bad;
    const int32_t largest = schedule::largest_even_chunk(num_units, active, p.page_size);
    if (makes_many_chunks(largest, active)) return 0;
    int32_t low = schedule::ceil_div(num_units, active), high = largest;
    while (low < high) {
      const int32_t step = schedule::ceil_div(high - low, kWarps);
      const int32_t warp = threadIdx.x / kWarpSize;
      const int32_t chunk = min(low + (warp + 1) * step, high) - 1;
      if (threadIdx.x == 0) {
        smallest_good = high;
        largest_bad = low - 1;
      }
      __syncthreads();
      if (low + warp * step < high) {
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
    return high;
  }

  /// A row's parts, and the ranges before it, are known already when borders are sought.
  __device__ void cut_rows(int32_t chunk) {
    num_ranges = block_exclusive_sum<kThreads>(
        p.num_rows,
        [&](int32_t r) { return rows[r].num_partials = schedule::ceil_div(units(r), chunk); },
        [&](int32_t r, int32_t before) { rows[r].first_worker = before; }, scratch);
    for (int32_t k = threadIdx.x; k < num_ranges; k += kThreads) {
      const int32_t r = first_above(
          k, p.num_rows, [&](int32_t i) { return rows[i].first_worker + rows[i].num_partials; });
      const int32_t parts = rows[r].num_partials, part = k + 1 - rows[r].first_worker;
      borders[k + 1] = rows[r].begin + schedule::even_border(part, units(r), parts);
    }
  }

  /// Whole rows that a worker does, if all have the same units and that is even enough, else 0.
  __device__ int32_t rows_of_a_worker(int32_t active) const {
    bool is_same = true;
#pragma unroll 1
    for (int32_t r = threadIdx.x; r < p.num_rows; r += kThreads) is_same &= units(r) == units(0);
    if (!__syncthreads_and(is_same)) return 0;
    return schedule::whole_rows(p.num_rows, units(0), active, p.page_size);
  }

  __device__ void cut_after_rows(int32_t whole) {
    num_ranges = schedule::ceil_div(p.num_rows, whole);
    for (int32_t k = threadIdx.x; k < num_ranges; k += kThreads) {
      borders[k + 1] = rows[min((k + 1) * whole, p.num_rows) - 1].end;
    }
  }

  __device__ void cut_evenly(int32_t active) {
    num_ranges = active;
    const int32_t row_end = schedule::row_end_units(num_units, active, p.page_size);
    const auto counted = [&](int32_t r) { return units(r) > 0 ? units(r) + row_end : 0; };
    // Where rows end in units and row ends is kept as first_worker until rows are shared.
    const int32_t total = block_exclusive_sum<kThreads>(
        p.num_rows, counted,
        [&](int32_t r, int32_t before) { rows[r].first_worker = before + counted(r); }, scratch);
    for (int32_t k = threadIdx.x + 1; k <= active; k += kThreads) {
      const int32_t border = schedule::even_border(k, total, active);
      const int32_t r =
          first_above(border - 1, p.num_rows, [&](int32_t i) { return rows[i].first_worker; });
      const RowFacts& row = rows[r];
      const int32_t before = row.first_worker - counted(r);
      const int32_t even = min(row.end, row.begin + border - before);
      borders[k] =
          schedule::snapped_border(even, row.begin, row.end, num_units, active, p.page_size);
    }
  }

  __device__ void find_borders() {
    if (threadIdx.x == 0) borders[0] = 0;
    if (num_units > 0) {
      const int32_t active = schedule::active_workers(num_units, p.num_workers);
      const int32_t chunk = find_chunk(active);
      if (chunk > 0) {
        cut_rows(chunk);
      } else if (const int32_t whole = rows_of_a_worker(active)) {
        cut_after_rows(whole);
      } else {
        cut_evenly(active);
      }
    }
    __syncthreads();
  }

  __device__ void share_rows() {
    block_exclusive_sum<kThreads>(
        p.num_rows,
        [&](int32_t r) {
          RowFacts& row = rows[r];
          const bool is_empty = row.begin == row.end;
          const int2 workers = first_above(make_int2(row.begin, row.end - 1), num_ranges,
                                           [&](int32_t k) { return borders[k + 1]; });
          row.first_worker = is_empty ? 0 : workers.x;
          row.num_partials = is_empty ? 0 : workers.y - workers.x + 1;
          row.arrived = row.unused = 0;
          return row.num_partials > 1 ? row.num_partials : 0;
        },
        [&](int32_t r, int32_t before) { rows[r].first_partial = before; }, scratch);
    __syncthreads();
  }

  __device__ void write_rows(RowFacts* to) const {
    const int32_t step = num_slices * kThreads;
    for (int32_t r = slice * kThreads + threadIdx.x; r < p.num_rows; r += step) to[r] = rows[r];
  }

  /// Page of a unit of a row.
  __device__ int32_t page_of(int32_t unit, int32_t row) const {
    const int32_t index = unit - rows[row].begin;
    const int32_t used = num_pages(rows[row].length - new_tokens(row));
    const int32_t* pages = index < used
                               ? p.block_table + row_offset(p.table_stride, row) + index
                               : p.fresh_pages + row_offset(p.fresh_stride, row) + index - used;
    return *pages;
  }

  /// One warp writes one worker.
  __device__ void write_workers() const {
    const int32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    for (int32_t w = slice + warp * num_slices; w < p.num_workers; w += kWarps * num_slices) {
      Worker& worker = workers[w];
      const bool is_idle = w >= num_ranges;
      const int32_t begin = is_idle ? 0 : borders[w], end = is_idle ? 0 : borders[w + 1];
      constexpr int kPerLane = (schedule::kWorkerPages + kWarpSize - 1) / kWarpSize;
      int32_t pages[kPerLane];  // all on their way before the first is written
      static_assert(kPerLane == 2);
      const int2 unit = make_int2(begin + lane, begin + kWarpSize + lane);
      const int2 row_of_unit =
          first_above(unit, p.num_rows, [&](int32_t r) { return rows[r].end; });
      pages[0] = unit.x < end && !p.lists ? page_of(unit.x, row_of_unit.x) : 0;
      pages[1] = unit.y < end && !p.lists ? page_of(unit.y, row_of_unit.y) : 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int32_t k = i * kWarpSize + lane;
        if (k < schedule::kWorkerPages) worker.pages[k] = pages[i];
      }
      if (lane == 0) {
        const int32_t row = is_idle ? 0 : row_of_unit.x;
        worker.begin = begin;
        worker.end = end;
        worker.row = row;
        worker.looks_up = p.lists && !is_idle;
        worker.facts = is_idle ? RowFacts{} : rows[row];
      }
    }
  }
};

// grid: [slices, L]; one block: one layer's borders, and a share of its rows and workers.
__global__ void __launch_bounds__(kThreads) plan_kernel(const __grid_constant__ PlanParams p) {
  extern __shared__ int4 shared[];  // rows [num_rows] if they are shared, borders [num_workers + 1]
  __shared__ int32_t scratch[kWarps + 1];
  const int64_t layer = blockIdx.y;
  Worker* workers = reinterpret_cast<Worker*>(p.schedule + layer * p.schedule_stride);
  RowFacts* written_rows = reinterpret_cast<RowFacts*>(workers + p.num_workers);
  RowFacts* shared_rows = reinterpret_cast<RowFacts*>(shared);
  RowFacts* rows = p.shares_rows ? shared_rows : written_rows;
  int32_t* borders = reinterpret_cast<int32_t*>(shared_rows + (p.shares_rows ? p.num_rows : 0));
  LayerPlan plan{p,
                 layer,
                 static_cast<int32_t>(blockIdx.x),
                 static_cast<int32_t>(gridDim.x),
                 workers,
                 rows,
                 borders,
                 scratch};
  wait_for_previous_kernel();
  let_next_kernel_begin();
  plan.find_units();
  plan.find_borders();
  plan.share_rows();
  if (p.shares_rows) plan.write_rows(written_rows);
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
  p.schedule_stride = args.schedule.stride[0];
  p.num_rows = static_cast<int32_t>(lengths.shape[1] * lengths.shape[2]);
  p.num_heads = Divisor::of(std::max<int64_t>(lengths.shape[2], 1));
  p.num_workers = args.num_workers;
  p.page_size = args.page_size;
  while (1 << p.page_shift < p.page_size) ++p.page_shift;
  p.new_tokens = args.new_tokens;
  p.lists = args.share > 0;
  p.rule = listing::Rule(args);
  if (lengths.shape[0] == 0) return;

  // Beside what the kernel itself declares.
  const int most_shared =
      device_attribute("plan", lengths.device.index, cudaDevAttrMaxSharedMemoryPerBlockOptin) -
      1024;
  LaunchShape shape;
  shape.shared_bytes = (size_t(args.num_workers) + 1) * sizeof(int32_t);
  const size_t with_rows = shape.shared_bytes + size_t(p.num_rows) * sizeof(RowFacts);
  p.shares_rows = with_rows <= size_t(most_shared);
  if (p.shares_rows) shape.shared_bytes = with_rows;
  const int slices = std::min(schedule::ceil_div(args.num_workers, kWarps), kMostSlices);
  shape.grid = dim3(p.shares_rows ? slices : 1, static_cast<uint32_t>(lengths.shape[0]));
  shape.threads = kThreads;
  shape.early = has_sm90("plan", lengths.device.index);
  launch("plan", plan_kernel, shape, args.stream, p);
}

}  // namespace adakv
