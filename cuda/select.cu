// Positions that each row keeps; see ops.h. One launch, a cluster of CTAs for each row finds the last
// candidate that gets in (common/cluster_search.cuh); the warps, which have positions side by side,
// write those that are not after it, ascending. The second stage (norms) is the same again with keys
// that rank what stage one took above everything else. Below sm_90 a row's cluster is one CTA.
#include <algorithm>

#include "common/async_copy.cuh"
#include "common/cluster_search.cuh"
#include "common/device_guard.h"
#include "common/launch.cuh"
#include "common/share.cuh"
#include "cuda_backend.h"

namespace adakv {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxCluster = 8;
constexpr uint32_t kTaken = 0xffffffffu;  // above every score

using Search = ClusterSearch<kThreads>;

struct SelectParams {
  const float* scores;      // [B, Hkv, T]
  const float* norms;       // [B, Hkv, T] or null
  const int32_t* budgets;   // [B, Hkv]
  const int32_t* seq_lens;  // [B] or null
  int32_t* positions;       // [capacity]
  int32_t* indptr;          // [B * Hkv + 1]
  int64_t score_stride[2], norm_stride[2], budget_stride;
  int32_t capacity, num_rows, heads, length, window;
  double first;
  float eps;
  int32_t num_cached;  // keys of a thread in shared memory, in fours
};

struct Row {
  int32_t seq_len, candidates, window, count;  // count: candidates that are kept
};

__device__ Row row_of(const SelectParams& params, int r) {
  const int b = r / params.heads;
  Row row;
  row.seq_len = params.seq_lens ? params.seq_lens[b] : params.length;
  row.candidates = max(row.seq_len - params.window, 0);
  row.window = row.seq_len - row.candidates;
  const int32_t budget = params.budgets[b * params.budget_stride + r % params.heads];
  row.count = min(max(budget, row.window), row.seq_len) - row.window;
  return row;
}

struct Shared {
  Search::Shared search;
  int32_t rows_before[kWarps];  // entries of the rows before this one, in parts
  int32_t taken[kWarps];        // candidates of each warp
};

// Keys of a stage: of the scores; or, with norms, of both, where what stage one took is above all.
template <bool kTwoStages>
struct StageKeys {
  const float* scores;  // [length]
  const float* norms;   // [length] or null
  EntryOrder order;
  float eps;
  uint64_t last;  // of what stage one took

  static constexpr int kBatch = kTwoStages ? 1 : 4;
  struct Loaded {
    float4 scores, norms;
  };
  __device__ Loaded load(int32_t position, int32_t length) const {
    Loaded loaded = {load_four(scores, position, length), {}};
    if (kTwoStages && norms) loaded.norms = load_four(norms, position, length);
    return loaded;
  }
  __device__ uint4 make(const Loaded& loaded, int32_t position) const {
    const float4 &s = loaded.scores, &n = loaded.norms;
    return make_uint4(key(s.x, n.x, position), key(s.y, n.y, position + 1),
                      key(s.z, n.z, position + 2), key(s.w, n.w, position + 3));
  }

 private:
  __device__ uint32_t key(float score, float norm, int32_t position) const {
    const uint32_t key = order_key(score);
    if (!kTwoStages || !norms) return key;
    return order(key, position) >= last ? kTaken : second_stage_key(score, norm, eps);
  }
};

// A warp's candidates.
template <bool kTwoStages>
struct Entries {
  EntryOrder order;
  StageKeys<kTwoStages> keys;
  Share<kThreads> share;

  __device__ int kind() const { return 0; }

  template <typename Visit>
  __device__ void make(const Visit& visit) const {
    share.make(keys, visit);
  }

  template <typename Visit>
  __device__ void for_each(const Visit& visit) const {
    share.for_each_four(keys, [&](const uint4& four, int32_t position) {
      visit(order(four.x, position));
      visit(order(four.y, position + 1));
      visit(order(four.z, position + 2));
      visit(order(four.w, position + 3));
    });
  }
};

template <bool kTwoStages>
__device__ Entries<kTwoStages> entries_of(const SelectParams& params,
                                          const Row& row,
                                          int r,
                                          uint4* cache) {
  const int64_t b = r / params.heads, h = r % params.heads;
  const float* scores = params.scores + b * params.score_stride[0] + h * params.score_stride[1];
  const int warp = cluster_rank() * kWarps + threadIdx.x / kWarpSize;
  const EntryOrder order(1, row.candidates);
  return {order,
          {scores, nullptr, order, params.eps, 0},
          Share<kThreads>(scores, row.candidates, warp, cluster_size() * kWarps, cache,
                          params.num_cached)};
}

// The last candidate that is kept, in the order of the last stage; 0 < row.count.
template <bool kTwoStages>
__device__ uint64_t find_last(const SelectParams& params,
                              const Row& row,
                              int r,
                              Search& search,
                              Entries<kTwoStages>& entries) {
  if constexpr (!kTwoStages) return search.find(entries, 1, row.count);
  const int32_t first = static_cast<int32_t>(params.first * row.count);
  uint64_t last = ~uint64_t{0};
  for (int32_t wanted = first; true; wanted = row.count) {
    if (wanted > 0) last = search.find(entries, 1, wanted);
    if (wanted == row.count) return last;
    const int64_t b = r / params.heads, h = r % params.heads;
    entries.keys.norms = params.norms + b * params.norm_stride[0] + h * params.norm_stride[1];
    entries.keys.last = last;
  }
}

// Sum of x over the CTA.
__device__ int32_t block_sum(int32_t (&sums)[kWarps], int32_t x) {
  x = __reduce_add_sync(kFullWarp, x);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  return __reduce_add_sync(kFullWarp, sums[threadIdx.x % kWarpSize]);
}

// Calls write(i, position) for the candidates that are not after `last`: the i-th of the row, by
// position.
template <typename Entries, typename Write>
__device__ void write_best(Shared& shared,
                           const Search& search,
                           const Entries& entries,
                           uint64_t last,
                           const Write& write) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int32_t taken = 0;
  entries.for_each([&](uint64_t order) { taken += order >= last; });
  taken = __reduce_add_sync(kFullWarp, taken);
  if (lane == 0) shared.taken[warp] = taken;
  // Before this warp's come those that the CTAs before this one have, listed or not, and those of
  // its warps before this one.
  const int32_t listed = __syncthreads_count(threadIdx.x < search.list_begin &&
                                             shared.search.list[threadIdx.x] >= last);
  int32_t before = lane < warp ? shared.taken[lane] : 0;
  if (lane < cluster_rank()) before += shared.search.above[lane][0];
  int32_t at = listed + __reduce_add_sync(kFullWarp, before);
  const uint32_t lower_lanes = (1u << lane) - 1;
  entries.share.for_each_four(entries.keys, [&](const uint4& four, int32_t position) {
    const uint32_t keys[4] = {four.x, four.y, four.z, four.w};
    int32_t mine = at;
    bool takes[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      takes[j] = entries.order(keys[j], position + j) >= last;
      const uint32_t taken_lanes = __ballot_sync(kFullWarp, takes[j]);
      mine += __popc(taken_lanes & lower_lanes);
      at += __popc(taken_lanes);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (takes[j]) write(mine++, position + j);
    }
  });
}

// grid: [rows * cluster]; one cluster: one row, its candidates in equal parts.
template <bool kTwoStages>
__global__ void __launch_bounds__(kThreads, 1)
    select_kernel(const __grid_constant__ SelectParams params) {
  extern __shared__ uint4 cache[];  // [num_cached, kThreads]
  __shared__ Shared shared;
  const int r = blockIdx.x / cluster_size();
  const int32_t thread = cluster_rank() * kThreads + threadIdx.x;
  const int32_t num_threads = cluster_size() * kThreads;
  if (threadIdx.x == 0) shared.search.exchange.init();
  cluster_arrive();
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const Row row = row_of(params, r);
  int32_t offset = 0;  // of the row
  for (int32_t i = threadIdx.x; i < r; i += kThreads) {
    const Row before = row_of(params, i);
    offset += before.count + before.window;
  }
  cluster_wait();  // all CTAs run: their memory may be written
  Search search(shared.search);
  auto entries = entries_of<kTwoStages>(params, row, r, cache);
  const bool chooses = row.count > 0 && row.count < row.candidates;
  const uint64_t last = chooses ? find_last(params, row, r, search, entries) : 0;
  offset = block_sum(shared.rows_before, offset);
  const auto write = [&](int32_t i, int32_t position) {
    if (offset + i < params.capacity) params.positions[offset + i] = position;
  };
  if (chooses) {
    write_best(shared, search, entries, last, write);
  } else {
    for (int32_t i = thread; i < row.count; i += num_threads) write(i, i);
  }
  for (int32_t i = thread; i < row.window; i += num_threads) {
    write(row.count + i, row.candidates + i);
  }
  const int32_t end = offset + row.count + row.window;
  if (thread == 0) params.indptr[r + 1] = end;
  if (thread == 0 && r == 0) params.indptr[0] = 0;
  if (r == params.num_rows - 1) {
    for (int32_t i = end + thread; i < params.capacity; i += num_threads) params.positions[i] = -1;
  }
}

// CTAs per row: 4096 keys each, and no more than two waves of them.
int choose_cluster(const SelectParams& params, int device) {
  if (!has_sm90("select", device)) return 1;
  const int sms = device_attribute("select", device, cudaDevAttrMultiProcessorCount);
  int cluster = 1;
  while (cluster < kMaxCluster && params.length > 4096 * cluster &&
         params.num_rows * cluster < 2 * sms) {
    cluster *= 2;
  }
  return cluster;
}

}  // namespace

void CudaBackend::select(const SelectArgs& args) {
  const DeviceGuard guard(args.scores.device);
  const TensorView& scores = args.scores;
  SelectParams params = {};
  params.scores = scores.ptr<float>();
  params.norms = args.norms ? args.norms.ptr<float>() : nullptr;
  params.budgets = args.budgets.ptr<int32_t>();
  params.seq_lens = args.seq_lens ? args.seq_lens.ptr<int32_t>() : nullptr;
  params.positions = args.positions.ptr<int32_t>();
  params.indptr = args.indptr.ptr<int32_t>();
  std::copy_n(scores.stride, 2, params.score_stride);
  std::copy_n(args.norms.stride, 2, params.norm_stride);
  params.budget_stride = args.budgets.stride[0];
  params.capacity = static_cast<int32_t>(args.positions.shape[0]);
  params.num_rows = static_cast<int32_t>(scores.shape[0] * scores.shape[1]);
  params.heads = static_cast<int32_t>(scores.shape[1]);
  params.length = static_cast<int32_t>(scores.shape[2]);
  params.window = args.window;
  params.first = args.first;
  params.eps = args.eps;
  cudaStream_t stream = static_cast<cudaStream_t>(args.stream);
  if (params.num_rows == 0) {
    ADAKV_CUDA_CHECK("select", cudaMemsetAsync(params.indptr, 0, sizeof(int32_t), stream));
    ADAKV_CUDA_CHECK("select", cudaMemsetAsync(params.positions, 0xff,
                                               params.capacity * sizeof(int32_t), stream));
    return;
  }
  const int device = scores.device.index, cluster = choose_cluster(params, device);
  params.num_cached = choose_num_cached("select", device, kThreads, sizeof(Shared), params.length,
                                        cluster * kWarps);
  launch("select", params.norms ? select_kernel<true> : select_kernel<false>,
         {dim3(params.num_rows * cluster), kThreads, params.num_cached * kThreads * sizeof(uint4),
          has_sm90("select", device), cluster},
         stream, params);
}

size_t CudaBackend::workspace_bytes(const SelectArgs&) const {
  return 0;
}

}  // namespace adakv
