// Budgets from one top-k over the heads of a layer, in one launch (sm_90 and up): a cluster of CTAs
// for each sequence finds the last entry that gets in (common/cluster_search.cuh); f[h] is how many
// entries of head h are not after it.
#include "allocate/allocate.cuh"

#include "common/async_copy.cuh"
#include "common/cluster_search.cuh"
#include "common/launch.cuh"
#include "common/share.cuh"

namespace adakv {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;

using Search = ClusterSearch<kThreads>;
constexpr int kMaxHeads = Search::kMaxCounts;

struct Shared {
  Search::Shared search;
  int32_t counts[kMaxHeads];
  BudgetScratch scratch[kMaxHeads];
};

// A warp's entries: all of one head.
struct Entries {
  EntryOrder order;
  int32_t head;
  ScoreKeys keys;
  Share<kThreads> share;

  __device__ int kind() const { return head; }

  template <typename Visit>
  __device__ void make(const Visit& visit) const {
    share.make(keys, visit);
  }

  template <typename Visit>
  __device__ void for_each(const Visit& visit) const {
    share.for_each_four(keys, [&](const uint4& four, int32_t position) {
      visit(order(four.x, position, head));
      visit(order(four.y, position + 1, head));
      visit(order(four.z, position + 2, head));
      visit(order(four.w, position + 3, head));
    });
  }
};

__device__ Entries entries_of(const AllocateParams& params,
                              const Sequence& sequence,
                              int b,
                              uint4* cache) {
  const int parts = cluster_size() * kWarps / params.heads;  // of a head
  const int warp = cluster_rank() * kWarps + threadIdx.x / kWarpSize;
  const int head = min(warp / parts, params.heads - 1);
  const float* row = params.scores + b * params.score_stride[0] + head * params.score_stride[1];
  return {
      EntryOrder(params.heads, sequence.length), head, ScoreKeys{row},
      Share<kThreads>(row, sequence.length, warp - head * parts, parts, cache, params.num_cached)};
}

// Counts the entries of each head that are among the best `k`.
__device__ void count_best(
    const AllocateParams& params, const Sequence& sequence, int b, Shared& shared, uint4* cache) {
  const Entries entries = entries_of(params, sequence, b, cache);
  Search search(shared.search);
  const uint64_t last = search.find(entries, params.heads, static_cast<int32_t>(sequence.k));
  if (cluster_rank() > 0) return;
  for (int h = threadIdx.x; h < params.heads; h += kThreads) {
    int32_t above = 0;
    for (int c = 0; c < cluster_size(); ++c) above += shared.search.above[c][h];
    shared.counts[h] = above;
  }
  __syncthreads();
  if (threadIdx.x < search.num_listed) {
    const uint64_t listed = shared.search.list[threadIdx.x];
    if (listed >= last) atomicAdd(&shared.counts[entries.order.place_of(listed) % params.heads], 1);
  }
}

// grid: [B * cluster]; one cluster: the budgets of one sequence.
__global__ void __launch_bounds__(kThreads, 1)
    allocate_cluster_kernel(const __grid_constant__ AllocateParams params) {
  extern __shared__ uint4 cache[];  // [num_cached, kThreads]
  __shared__ Shared shared;
  const int b = blockIdx.x / cluster_size();
  if (threadIdx.x == 0) shared.search.exchange.init();
  cluster_arrive();
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const Sequence sequence(params, b);
  cluster_wait();  // all CTAs run: their memory may be written
  if (sequence.keeps_all(params.mean)) {
    if (cluster_rank() == 0) store_lengths(params, b, sequence.seq_len);
    return;
  }
  if (sequence.k > 0) {
    count_best(params, sequence, b, shared, cache);
  } else {
    for (int h = threadIdx.x; h < params.heads; h += kThreads) shared.counts[h] = 0;
  }
  __syncthreads();
  if (cluster_rank() == 0) store_budgets(params, b, shared.counts, shared.scratch);
}

int choose_cluster(const AllocateArgs& args) {
  // More than eight CTAs are only promised by 9.0; 4096 entries each keep them busy.
  const int most = has_wgmma("allocate", args.scores.device.index) ? Search::kMaxCluster : 8;
  const int64_t heads = args.scores.shape[1], entries = heads * args.scores.shape[2];
  int cluster = heads > kWarps ? 2 : 1;  // a warp has entries of one head only
  while (cluster < most && entries > 4096 * cluster) cluster *= 2;
  return cluster;
}

}  // namespace

bool cluster_allocate_fits(const AllocateArgs& args) {
  return args.safeguard != Safeguard::kHardFloor && args.scores.shape[1] <= kMaxHeads &&
         args.scores.shape[1] * args.scores.shape[2] < int64_t{1} << 31 &&
         has_sm90("allocate", args.scores.device.index);
}

void cluster_allocate(const AllocateArgs& args, AllocateParams params) {
  const int device = args.scores.device.index, cluster = choose_cluster(args);
  params.num_cached = choose_num_cached("allocate", device, kThreads, sizeof(Shared), params.length,
                                        cluster * kWarps / params.heads);
  launch("allocate", allocate_cluster_kernel,
         {dim3(static_cast<unsigned>(args.scores.shape[0] * cluster)), kThreads,
          params.num_cached * kThreads * sizeof(uint4), true, cluster},
         args.stream, params);
}

}  // namespace adakv
