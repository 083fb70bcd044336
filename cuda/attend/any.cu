// attend: the launcher, and the plain kernel for what the fast ones (attend.cuh) don't take:
// float32, pages of 8, head dims other than 64, 80, 96, 128 and 256, queries at odd addresses.
#include <cmath>

#include "attend/attend.h"
#include "common/check.cuh"
#include "common/device_guard.h"
#include "common/dispatch.cuh"
#include "common/dtype.cuh"
#include "cuda_backend.h"

namespace adakv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLoads = 16;  // of a lane on their way at a time

/// One query of a row; all threads of a block work on it.
struct Query {
  int32_t b, h, head, token;
  int32_t visible;  // slots before this are seen; 0 for padding
};

__device__ Query find_query(const AttendParams& p) {
  const int32_t num_queries = p.group.value * p.num_tokens;
  const int32_t row = blockIdx.x / num_queries, number = blockIdx.x % num_queries;
  Query query;
  query.b = p.num_heads.quotient(row);
  query.h = p.num_heads.remainder(row);
  query.head = query.h * p.group.value + p.group.remainder(number);
  query.token = p.group.quotient(number);
  const bool is_padding = query.token < p.num_tokens - p.new_tokens(query.b);
  const int32_t visible = p.rows[row].length - p.num_tokens + query.token + 1;
  query.visible = is_padding ? 0 : max(0, visible);
  return query;
}

/// What a warp has found out; out[j] is column lane + 32 j.
template <int kColumns>
struct PlainState {
  float max = -INFINITY, sum = 0;
  float out[kColumns] = {};
};

/// Slots first_slot .. first_slot + 31 of the query's row: their keys in turn, the softmax with a
/// lane for each, their values in turn. All lanes read one entry at a time, because that is what
/// lies together, however it is aligned. A branch around a load would wait for it, so lanes behind
/// the head dim read its last element.
template <typename Element, int kColumns>
__device__ void add_slots(const AttendParams& p,
                          const Query& query,
                          const float* q,  // [32 kColumns], 0 from head_dim on
                          int32_t head_dim,
                          int32_t first_slot,
                          PlainState<kColumns>& state) {
  const int32_t lane = threadIdx.x % kWarpSize, slot = first_slot + lane;
  const int32_t count = min(kWarpSize, query.visible - first_slot);
  int32_t columns[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) columns[j] = min(lane + j * kWarpSize, head_dim - 1);
  const char* key = nullptr;  // of this lane's slot
  if (lane < count) {
    const int32_t* table = p.layer.block_table.at(query.b, query.h);
    key = p.layer.key(table[slot / p.layer.page_size], slot % p.layer.page_size);
  }
  const auto key_of = [&](int32_t i) {
    return reinterpret_cast<const char*>(
        __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(key), i));
  };

  float z = -INFINITY;
#pragma unroll(kLoads / kColumns)
  for (int32_t i = 0; i < count; ++i) {
    const Element* elements = reinterpret_cast<const Element*>(key_of(i));
    float dot = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      dot += q[lane + j * kWarpSize] * to_float(elements[columns[j]]);
    }
    dot = warp_sum(dot);
    if (lane == i) z = dot * p.scale;
  }
  if (p.softcap != 0 && lane < count) z = p.softcap * tanhf(z);

  const float most = fmaxf(state.max, warp_max(z));
  const float factor = expf(state.max - most), probability = expf(z - most);
  state.max = most;
  state.sum = state.sum * factor + warp_sum(probability);
  float out[kColumns] = {};
#pragma unroll(kLoads / kColumns)
  for (int32_t i = 0; i < count; ++i) {
    const float share = __shfl_sync(kFullWarp, probability, i);
    const Element* value = reinterpret_cast<const Element*>(key_of(i) + p.layer.half_page_bytes());
#pragma unroll
    for (int j = 0; j < kColumns; ++j) out[j] += share * to_float(value[columns[j]]);
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) state.out[j] = state.out[j] * factor + out[j];
}

// grid: [num_rows * G * S]; one block: one query over its whole row, 32 slots a warp at a time.
template <typename Element, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    attend_plain_kernel(const __grid_constant__ AttendParams p, int32_t head_dim) {
  __shared__ float q[kColumns * kWarpSize];
  __shared__ float image[kWarps][kColumns * kWarpSize], max[kWarps], sum[kWarps];
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Query query = find_query(p);
  const char* queries = p.queries.at(query.b, query.head, query.token);
  for (int32_t d = threadIdx.x; d < kColumns * kWarpSize; d += kThreads) {
    q[d] = d < head_dim ? to_float(reinterpret_cast<const Element*>(queries)[d]) : 0.f;
  }
  __syncthreads();

  PlainState<kColumns> state;
  for (int32_t first = warp * kWarpSize; first < query.visible; first += kThreads) {
    add_slots<Element, kColumns>(p, query, q, head_dim, first, state);
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) image[warp][lane + j * kWarpSize] = state.out[j];
  if (lane == 0) {
    max[warp] = state.max;
    sum[warp] = state.sum;
  }
  __syncthreads();

  const bool is_empty = query.visible == 0;
  const float sink = p.sink_logits && !is_empty ? p.sink_logits[query.head] : -INFINITY;
  float most = sink, total = 0, factors[kWarps];
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, max[w]);
  const float base = is_empty ? 0 : most;
  for (int w = 0; w < kWarps; ++w) {
    factors[w] = expf(max[w] - base);
    total += factors[w] * sum[w];
  }
  total += expf(sink - base);
  Element* out = reinterpret_cast<Element*>(p.out.at(query.b, query.head, query.token));
  for (int32_t d = threadIdx.x; d < head_dim; d += kThreads) {
    float x = 0;
    for (int w = 0; w < kWarps; ++w) x += factors[w] * image[w][d];
    out[d] = from_float<Element>(is_empty ? 0 : x / total);
  }
  if (threadIdx.x == 0 && p.lse.data) {
    *reinterpret_cast<float*>(p.lse.at(query.b, query.head, query.token)) =
        is_empty ? -INFINITY : most + logf(total);
  }
}

/// Calls the body with the columns of a head dim that a lane of the plain kernel holds.
template <typename Body>
void dispatch_columns(int64_t head_dim, const Body& body) {
  if (head_dim <= 1 * kWarpSize) return body(IntTag<1>{});
  if (head_dim <= 2 * kWarpSize) return body(IntTag<2>{});
  if (head_dim <= 4 * kWarpSize) return body(IntTag<4>{});
  body(IntTag<8>{});
}

bool has_fast_kernel(const AttendArgs& args) {
  const bool fits_tiles = args.layer.pages.shape[2] % 16 == 0 &&
                          args.queries.dtype != DType::kFloat32 &&
                          dispatch_head_dim(args.queries.shape[3], [](auto) {});
  return fits_tiles && rows_are_aligned(args.layer.pages, 16) &&
         rows_are_aligned(args.queries, 4) && rows_are_aligned(args.out, 8);
}

int64_t num_queries(const AttendArgs& args) {
  const int64_t heads = args.layer.lengths.shape[1];
  return heads == 0 ? 0 : args.queries.shape[1] / heads * args.queries.shape[2];
}

/// Whether the rows' ranges are those of the schedule; else each row is done in one piece.
bool cuts_rows(const AttendArgs& args) {
  return has_fast_kernel(args) && num_queries(args) <= kMostQueries;
}

AttendParams attend_params(const AttendArgs& args) {
  AttendParams p = {};
  p.workers = args.schedule.ptr<const schedule::Worker>();
  p.rows = reinterpret_cast<schedule::RowFacts*>(args.schedule.ptr<schedule::Worker>() +
                                                 args.num_workers);
  p.layer = layer_rows(args.layer);
  p.queries = entry_rows(args.queries);
  p.out = entry_rows(args.out);
  p.lse = entry_rows(args.lse);
  p.num_new = args.num_new ? args.num_new.ptr<int32_t>() : nullptr;
  p.sink_logits = args.sink_logits ? args.sink_logits.ptr<float>() : nullptr;
  p.partials = args.workspace.ptr<float>();
  p.num_rows = static_cast<int32_t>(args.layer.lengths.shape[0]) * p.layer.num_heads;
  p.num_workers = args.num_workers;
  p.max_partials = static_cast<int32_t>(schedule::max_partials(args.num_workers));
  p.num_tokens = static_cast<int32_t>(args.queries.shape[2]);
  p.prefetches = args.prefetch && cuts_rows(args);
  p.group = Divisor::of(args.queries.shape[1] / p.layer.num_heads);
  p.num_heads = Divisor::of(p.layer.num_heads);
  p.scale = args.scale != 0 ? args.scale : 1 / std::sqrt(static_cast<float>(args.queries.shape[3]));
  if (args.softcap != 0) p.scale /= args.softcap;
  p.softcap = args.softcap;
  return p;
}

}  // namespace

// ------------------------------------------------------------------------------------------------

void CudaBackend::attend(const AttendArgs& args) {
  if (args.queries.size() == 0) return;
  const DeviceGuard guard(args.queries.device);
  AttendParams p = attend_params(args);
  const cudaStream_t stream = static_cast<cudaStream_t>(args.stream);
  const bool appends_along = args.keys && cuts_rows(args) && rows_are_aligned(args.keys, 16) &&
                             rows_are_aligned(args.values, 16);
  if (appends_along) {
    p.append = append_params(args.layer, args.keys, args.values, args.num_new);
  } else if (args.keys) {
    append({args.keys, args.values, args.num_new, args.layer, args.stream});
  }
  dispatch_dtype(args.queries.dtype, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<Element, float>) {
      const auto run = [&](auto head_dim) {
        launch_attend<Element, head_dim>(p, args.layer.pages.shape[0], stream);
      };
      if (has_fast_kernel(args)) return (void)dispatch_head_dim(args.queries.shape[3], run);
    }
    const int64_t grid = num_queries(args) * p.num_rows;
    const int32_t head_dim = static_cast<int32_t>(args.queries.shape[3]);
    dispatch_columns(head_dim, [&](auto columns) {
      attend_plain_kernel<Element, columns>
          <<<static_cast<uint32_t>(grid), kThreads, 0, stream>>>(p, head_dim);
    });
    ADAKV_CUDA_CHECK("attend", cudaGetLastError());
  });
}

size_t CudaBackend::workspace_bytes(const AttendArgs& args) const {
  if (!cuts_rows(args)) return 0;
  const size_t floats_per_query = args.queries.shape[3] + 2;
  return schedule::max_partials(args.num_workers) * padded_queries(num_queries(args)) *
         floats_per_query * sizeof(float);
}

}  // namespace adakv
