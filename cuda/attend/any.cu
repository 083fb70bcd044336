// attend for any dtype, page size, head dim and address: the definition, told step by step. What
// the fast kernels (attend.cuh) don't take is done here.
//
//   z[t] = q . key[t] * scale, or softcap * tanh(that / softcap)       of the slots that q sees
//          + bias[t], if the entries have biases
//   out  = sum over t of exp(z[t]) * value[t] / total
//   lse  = log(total),  total = exp(sink) + sum over t of exp(z[t])
//
// grid: [num_rows * G * S]; one CTA: one query over its whole row. Its warps take 32 slots at a
// time, in turn, and each keeps a maximum, a sum and an output of its own until the row ends.
// Powers of e are relative to the maximum so far; when that grows, what is there is rescaled.
#include <algorithm>

#include "attend/entries.cuh"
#include "common/check.cuh"

namespace adakv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;

// Query number = token * G + q head of the group. The last of S new tokens sees the whole row, the
// one before it a slot less, and so on. Sequences with fewer than S new tokens are padded in front.
__device__ Query find_query(const AttendParams& p) {
  const int32_t num_queries = p.group.value * p.num_tokens;
  const int32_t row = blockIdx.x / num_queries, number = blockIdx.x % num_queries;
  Query query;
  query.b = p.num_heads.quotient(row);
  query.h = p.num_heads.remainder(row);
  query.head = query.h * p.group.value + p.group.remainder(number);
  query.token = p.group.quotient(number);
  const bool is_padding = query.token < p.num_tokens - p.new_tokens(query.b);
  query.length = p.rows[row].length;
  const int32_t visible = query.length - p.num_hidden(query.token);
  query.visible = is_padding ? 0 : max(0, visible);
  return query;
}

template <typename Entry>
constexpr bool kHasBias = false;
template <typename Element>
constexpr bool kHasBias<BiasedEntry<Element>> = true;

/// What a warp has found out; out[j] is column lane + 32 j.
template <int kColumns>
struct WarpResult {
  float max = -INFINITY, sum = 0;
  float out[kColumns] = {};
};

// Takes slots first_slot .. first_slot + 31 of the query's row into a warp's result. For products
// all lanes read one entry at a time, because that is what lies together, however it is aligned;
// for the softmax each lane has a slot. A branch around a load would wait for it, so lanes behind
// the width of keys or values read their last element.
template <typename Entry, int kColumns>
__device__ void add_slots(const AttendParams& p,
                          const Query& query,
                          const float* q,  // [32 kColumns], 0 from head_dim on
                          int32_t head_dim,
                          int32_t value_dim,
                          int32_t first_slot,
                          WarpResult<kColumns>& result) {
  const int32_t lane = threadIdx.x % kWarpSize, slot = first_slot + lane;
  const int32_t count = min(kWarpSize, query.visible - first_slot);
  int32_t key_columns[kColumns], value_columns[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    key_columns[j] = min(lane + j * kWarpSize, head_dim - 1);
    value_columns[j] = min(lane + j * kWarpSize, value_dim - 1);
  }

  // Where the entry of this lane's slot lies: the block table has its page.
  Entry mine;
  if (lane < count) mine = Entry(p, query, slot);

  // z of this lane's slot; -inf if it isn't seen.
  float z = -INFINITY;
#pragma unroll(Entry::kLoads / kColumns)
  for (int32_t i = 0; i < count; ++i) {
    const auto entry = mine.of_lane(i);
    float dot = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      dot += q[lane + j * kWarpSize] * entry.key(p.layer, key_columns[j]);
    }
    dot = warp_sum(dot);
    if (lane == i) z = dot * p.scale;
  }
  if (p.softcap != 0 && lane < count) z = p.softcap * tanhf(z);  // the scale is divided by it
  if constexpr (kHasBias<Entry>) z += mine.bias;

  // The maximum so far, and by what factor the sum and output so far shrink.
  const float most = fmaxf(result.max, warp_max(z));
  const float factor = expf(result.max - most), probability = expf(z - most);
  result.max = most;
  result.sum = result.sum * factor + warp_sum(probability);

  // The values, each times its slot's probability.
  float out[kColumns] = {};
#pragma unroll(Entry::kLoads / kColumns)
  for (int32_t i = 0; i < count; ++i) {
    const float share = __shfl_sync(kFullWarp, probability, i);
    const auto entry = mine.of_lane(i);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) out[j] += share * entry.value(p.layer, value_columns[j]);
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) result.out[j] = result.out[j] * factor + out[j];
}

template <typename Element, typename Entry, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    attend_any_kernel(const __grid_constant__ AttendParams p, int32_t head_dim, int32_t value_dim) {
  __shared__ float q[kColumns * kWarpSize];
  __shared__ float image[kWarps][kColumns * kWarpSize], max[kWarps], sum[kWarps];
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Query query = find_query(p);

  // 1. The query comes to shared memory, as float32.
  const char* queries = p.queries.at(query.b, query.head, query.token);
  for (int32_t d = threadIdx.x; d < kColumns * kWarpSize; d += kThreads) {
    q[d] = d < head_dim ? to_float(reinterpret_cast<const Element*>(queries)[d]) : 0.f;
  }
  __syncthreads();

  // 2. Each warp takes every kWarps-th run of 32 slots, and leaves its result in shared memory.
  WarpResult<kColumns> result;
  for (int32_t first = warp * kWarpSize; first < query.visible; first += kThreads) {
    add_slots<Entry, kColumns>(p, query, q, head_dim, value_dim, first, result);
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) image[warp][lane + j * kWarpSize] = result.out[j];
  if (lane == 0) {
    max[warp] = result.max;
    sum[warp] = result.sum;
  }
  __syncthreads();

  // 3. All threads join the sums, relative to the highest maximum. A sink is one logit more,
  //    without a value, and other entries are one with what they gave. A query that sees nothing has
  //    out 0 and lse -inf, sink or not.
  const float others = p.others_of(query.b, query.head, query.token);
  const bool is_empty = query.visible == 0 && others == -INFINITY;
  const float sink = p.sink_logits && !is_empty ? p.sink_logits[query.head] : others;
  float most = sink, total = 0, factors[kWarps];
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, max[w]);
  const float base = is_empty ? 0 : most;
  for (int w = 0; w < kWarps; ++w) {
    factors[w] = expf(max[w] - base);
    total += factors[w] * sum[w];
  }
  const float share = expf(sink - base);  // of the sink, or of other entries
  total += share;

  // 4. Each thread joins a column of the outputs, and one stores the lse.
  Element* out = reinterpret_cast<Element*>(p.out.at(query.b, query.head, query.token));
  const Element* given = nullptr;
  if (others != -INFINITY) {
    given = reinterpret_cast<const Element*>(p.others_out.at(query.b, query.head, query.token));
  }
  for (int32_t d = threadIdx.x; d < value_dim; d += kThreads) {
    float x = 0;
    for (int w = 0; w < kWarps; ++w) x += factors[w] * image[w][d];
    if (given != nullptr) x += share * to_float(given[d]);
    out[d] = from_float<Element>(is_empty ? 0 : x / total);
  }
  if (threadIdx.x == 0 && p.lse.data) {
    *reinterpret_cast<float*>(p.lse.at(query.b, query.head, query.token)) =
        is_empty ? -INFINITY : most + logf(total);
  }
}

}  // namespace

void any_attend(const AttendArgs& args, const AttendParams& params) {
  const int64_t grid = int64_t{params.num_rows} * params.group.value * params.num_tokens;
  const int32_t head_dim = static_cast<int32_t>(args.queries.shape[3]);
  const int32_t value_dim = static_cast<int32_t>(args.out.shape[3]);
  const int32_t width = std::max(head_dim, value_dim);
  const auto run = [&](auto element, auto entry, auto columns) {
    attend_any_kernel<typename decltype(element)::type, typename decltype(entry)::type, columns>
        <<<static_cast<uint32_t>(grid), kThreads, 0, static_cast<cudaStream_t>(args.stream)>>>(
            params, head_dim, value_dim);
  };
  if (args.layer.page_biases) {
    dispatch_dtype(args.queries.dtype, [&](auto element) {
      using Biased = BiasedEntry<typename decltype(element)::type>;
      dispatch_columns(width, [&](auto columns) { run(element, TypeTag<Biased>{}, columns); });
    });
  } else {
    dispatch_entries(args, width, run);
  }
  ADAKV_CUDA_CHECK("attend", cudaGetLastError());
}

}  // namespace adakv
