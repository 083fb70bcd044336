// Budgets from one top-k over the heads of a layer, in one launch (sm_90 and up): a cluster of CTAs
// for each sequence, with a joint histogram of all heads; see allocate.cuh.
//   1. the first digit, of all entries
//   2. the entries that have it are listed in shared memory, those above are counted per head
//   3. the other digits, of the listed entries; if several heads have entries equal to the last
//      one, digits of the position too
//   4. f[h] from the counts per head, and the safeguard, by one CTA
#include "allocate.cuh"

#include <algorithm>

#include "common/async_copy.cuh"
#include "common/cluster_search.cuh"
#include "common/launch.cuh"

namespace adakv {
namespace {

using top_k::kKeyLevels;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxCluster = 16;
constexpr int kMaxHeads = 64;
constexpr int kBatch = 24;               // scores that a lane loads at a time
constexpr int kMaxCapacity = 24 * 1024;  // entries that a CTA lists

struct Entry {
  uint32_t key;
  int32_t head, position;
};

struct Shared {
  top_k::ClusterSearch<kThreads, kMaxCluster, kKeyLevels + kPositionLevels> search;
  int32_t above[kMaxHeads], equal[kMaxHeads];  // entries of this CTA
  int32_t total_above[2][kMaxHeads],
      total_equal[2][kMaxHeads];  // of the cluster; by score, by both
  int32_t counts[kMaxHeads];
  int64_t shares[kMaxHeads];
  int32_t num_listed;
};

// A CTA's share of a sequence's entries: units of positions of one head, one warp each.
class Part {
 public:
  __device__ Part(const AllocateParams& params, const Sequence& sequence, int b, uint32_t* listed)
      : params_(params), listed_(listed) {
    scores_ = params.scores + b * params.score_stride[0];
    length_ = sequence.length;
    const int32_t warps = cluster_size() * kWarps;
    const int32_t wanted = max(warps / params.heads, 1);  // units of a head
    const int32_t unit = (length_ + wanted - 1) / wanted;
    unit_ = (unit + kWarpSize - 1) / kWarpSize * kWarpSize;
  }

  // Calls visit(scores, head, first, end) for batches of this thread's entries: scores[j] is that
  // of position first + 32 j, if that is below the end. All lanes of a warp come together.
  template <typename Visit>
  __device__ void for_each_batch(const Visit& visit) const {
    const int32_t head_units = (length_ + unit_ - 1) / unit_;
    const int32_t warps = cluster_size() * kWarps;
    const int32_t warp = cluster_rank() * kWarps + threadIdx.x / kWarpSize;
    for (int32_t unit = warp; unit < head_units * params_.heads; unit += warps) {
      const int32_t head = unit / head_units, begin = unit % head_units * unit_;
      const int32_t end = min(begin + unit_, length_);
      const float* row = scores_ + head * params_.score_stride[1];
      for (int32_t i = begin; i < end; i += kBatch * kWarpSize) {
        const int32_t first = i + threadIdx.x % kWarpSize;
        float scores[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          scores[j] = first + j * kWarpSize < end ? row[first + j * kWarpSize] : 0.f;
        }
        visit(scores, head, first, end);
      }
    }
  }

  // Calls visit(entry) for all of this thread's.
  template <typename Visit>
  __device__ void for_each(const Visit& visit) const {
    for_each_batch([&](const float(&scores)[kBatch], int32_t head, int32_t first, int32_t end) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int32_t position = first + j * kWarpSize;
        if (position < end) visit(Entry{order_key(scores[j]), head, position});
      }
    });
  }

  // Lists the entries with the first digit `digit` and counts those above.
  __device__ void list(Shared& shared, uint32_t digit) {
    const int lane = threadIdx.x % kWarpSize;
    for_each_batch([&](const float(&scores)[kBatch], int32_t head, int32_t first, int32_t end) {
      int32_t above = 0;
      uint32_t listed = 0;  // bit j: entry j is
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const uint32_t digit_of_entry = top_k::key_digit(order_key(scores[j]), 0);
        const bool is_valid = first + j * kWarpSize < end;
        above += is_valid && digit_of_entry > digit;
        listed |= (is_valid && digit_of_entry == digit ? 1u : 0u) << j;
      }
      above = __reduce_add_sync(kFullWarp, above);
      if (lane == 0 && above) atomicAdd(&shared.above[head], above);
      const int32_t count = __popc(listed), reached = warp_inclusive_sum(count);
      int32_t at = 0;
      if (lane == kWarpSize - 1 && reached) at = atomicAdd(&shared.num_listed, reached);
      at = __shfl_sync(kFullWarp, at, kWarpSize - 1) + reached - count;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if ((listed >> j & 1) == 0) continue;
        if (at < params_.capacity) {
          listed_[2 * at] = order_key(scores[j]);
          listed_[2 * at + 1] = static_cast<uint32_t>(head) * length_ + first + j * kWarpSize;
        }
        ++at;
      }
    });
    __syncthreads();
    first_digit_ = digit;
    num_listed_ = shared.num_listed;
  }

  // Calls visit(entry) for the entries with the first digit. The few of most calls are in shared
  // memory; if they are too many there, all entries are gone through again.
  template <typename Visit>
  __device__ void for_each_listed(const Visit& visit) const {
    if (num_listed_ > params_.capacity) {
      for_each([&](const Entry& entry) {
        if (top_k::key_digit(entry.key, 0) == first_digit_) visit(entry);
      });
      return;
    }
    for (int32_t i = threadIdx.x; i < num_listed_; i += kThreads) {
      const uint32_t place = listed_[2 * i + 1], head = place / length_;
      visit(Entry{listed_[2 * i], static_cast<int32_t>(head),
                  static_cast<int32_t>(place - head * length_)});
    }
  }

 private:
  const AllocateParams& params_;
  uint32_t* listed_;  // [capacity, 2] shared: key, head * length + position
  const float* scores_;
  int32_t length_, unit_;
  int32_t num_listed_ = 0;
  uint32_t first_digit_ = 0;
};

// Adds this CTA's counts per head up over the cluster, in every CTA.
__device__ void join_counts(Shared& shared, int which, int heads) {
  __syncthreads();
  for (int i = threadIdx.x; i < heads * cluster_size(); i += kThreads) {
    const int head = i / cluster_size(), rank = i % cluster_size();
    if (shared.above[head]) cluster_add(&shared.total_above[which][head], rank, shared.above[head]);
    if (shared.equal[head]) cluster_add(&shared.total_equal[which][head], rank, shared.equal[head]);
  }
  cluster_arrive();
  cluster_wait();
  for (int h = threadIdx.x; h < heads; h += kThreads) shared.above[h] = shared.equal[h] = 0;
  __syncthreads();
}

// Whether it is known how many entries each head gets: all that are equal, or those of one head.
__device__ bool is_settled(const Shared& shared, int heads, int32_t left) {
  int32_t equal = 0, heads_with_equal = 0;
  for (int h = 0; h < heads; ++h) {
    equal += shared.total_equal[0][h];
    heads_with_equal += shared.total_equal[0][h] > 0;
  }
  return equal == left || heads_with_equal == 1;
}

// Counts the entries of each head that are the best `k`; in rank 0's shared.counts.
__device__ void count_best(const AllocateParams& params, Shared& shared, Part& part, int32_t k) {
  int32_t left = k;
  part.for_each(
      [&](const Entry& entry) { shared.search.count(0, top_k::key_digit(entry.key, 0)); });
  const uint32_t first_digit = shared.search.find_digit(0, left);
  part.list(shared, first_digit);
  uint32_t key = first_digit << top_k::key_shift(0);
  for (int level = 1; level < kKeyLevels; ++level) {
    part.for_each_listed([&](const Entry& entry) {
      if (top_k::has_prefix(entry.key, key, level)) {
        shared.search.count(level, top_k::key_digit(entry.key, level));
      }
    });
    key |= shared.search.find_digit(level, left) << top_k::key_shift(level);
  }
  part.for_each_listed([&](const Entry& entry) {
    if (entry.key > key) atomicAdd(&shared.above[entry.head], 1);
    if (entry.key == key) atomicAdd(&shared.equal[entry.head], 1);
  });
  join_counts(shared, 0, params.heads);

  const bool settled = is_settled(shared, params.heads, left);
  if (!settled) {
    uint32_t last = 0;  // of ~position
    const int levels = num_levels(params);
    for (int level = kKeyLevels; level < levels; ++level) {
      const int shift = position_shift(params, level);
      const int known = level > kKeyLevels ? position_shift(params, level - 1) : 31;
      part.for_each_listed([&](const Entry& entry) {
        const uint32_t position = inverted(params, entry.position);
        if (entry.key == key && position >> known == last >> known) {
          shared.search.count(level, position >> shift & (top_k::kBins - 1));
        }
      });
      last |= shared.search.find_digit(level, left) << shift;
    }
    part.for_each_listed([&](const Entry& entry) {
      const uint32_t position = inverted(params, entry.position);
      if (entry.key == key && position > last) atomicAdd(&shared.above[entry.head], 1);
      if (entry.key == key && position == last) atomicAdd(&shared.equal[entry.head], 1);
    });
    join_counts(shared, 1, params.heads);
  }
  if (threadIdx.x != 0) return;
  for (int h = 0; h < params.heads; ++h) {  // what is left, in the order of heads
    const int32_t given = min(shared.total_equal[settled ? 0 : 1][h], left);
    shared.counts[h] = shared.total_above[0][h] + shared.total_above[1][h] + given;
    left -= given;
  }
}

// grid: [B * cluster]; one cluster: the budgets of one sequence.
__global__ void __launch_bounds__(kThreads, 1)
    allocate_cluster_kernel(const __grid_constant__ AllocateParams params) {
  extern __shared__ uint32_t listed[];  // [capacity, 2]
  __shared__ Shared shared;
  const int b = blockIdx.x / cluster_size();
  shared.search.init();
  for (int h = threadIdx.x; h < kMaxHeads; h += kThreads) {
    shared.above[h] = shared.equal[h] = shared.counts[h] = 0;
    for (int i = 0; i < 2; ++i) shared.total_above[i][h] = shared.total_equal[i][h] = 0;
  }
  if (threadIdx.x == 0) shared.num_listed = 0;
  __syncthreads();
  cluster_arrive();
  wait_for_previous_kernel();
  let_next_kernel_begin();
  cluster_wait();  // all CTAs run: their memory may be written
  const Sequence sequence(params, b);
  if (sequence.keeps_all(params.mean)) {
    if (cluster_rank() == 0) store_lengths(params, b, sequence.seq_len);
    return;
  }
  Part part(params, sequence, b, listed);
  if (sequence.k > 0) count_best(params, shared, part, static_cast<int32_t>(sequence.k));
  __syncthreads();
  // Nobody reads another CTA's memory after the last barrier of the cluster.
  if (cluster_rank() == 0) store_budgets(params, b, shared.counts, shared.shares);
}

int choose_cluster(const AllocateArgs& args) {
  // More than eight CTAs are only promised by 9.0; 4096 entries each keep them busy.
  const int most = has_wgmma("allocate", args.scores.device.index) ? kMaxCluster : 8;
  const int64_t entries = args.scores.shape[1] * args.scores.shape[2];
  int cluster = 1;
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
  const int cluster = choose_cluster(args);
  const int64_t entries = args.scores.shape[1] * args.scores.shape[2] / cluster + kThreads;
  params.capacity = static_cast<int32_t>(std::min<int64_t>(entries, kMaxCapacity));
  launch("allocate", allocate_cluster_kernel,
         {dim3(static_cast<unsigned>(args.scores.shape[0] * cluster)), kThreads,
          params.capacity * 2 * sizeof(uint32_t), true, cluster},
         args.stream, params);
}

}  // namespace adakv
