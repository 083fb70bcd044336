// Positions that each row keeps; see ops.h. One launch, a cluster of CTAs for each row:
//   1. find the key of the last of the `count` best candidates, digit by digit: each CTA makes the
//      histogram of its part, the parts are joined through the cluster's shared memory
//   2. of the candidates equal to that key the first ones get in: prefix sums over CTAs and warps
//   3. write the positions that get in, ascending, and then the window
// The second stage (norms) is step 1 and 2 again with keys that rank what stage one took above
// everything else. Below sm_90 a row's cluster is one CTA.
#include <algorithm>

#include "common/cluster.cuh"
#include "common/device_guard.h"
#include "common/launch.cuh"
#include "common/topk.cuh"
#include "cuda_backend.h"

namespace adakv {
namespace {

using top_k::kBins;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxCluster = 8;
constexpr int kGroup = kBins / kWarps;  // bins that are summed up by one warp
constexpr int kRounds = 2 * top_k::kKeyLevels;
constexpr uint32_t kTaken = 0xffffffffu;  // above every score

constexpr int kLaneBins = kGroup / kWarpSize;  // of a group, side by side

struct SelectParams {
  const float* scores;    // [B, Hkv, T]
  const float* norms;     // [B, Hkv, T] or null
  const int32_t* budgets;   // [B, Hkv]
  const int32_t* seq_lens;  // [B] or null
  int32_t* positions;       // [capacity]
  int32_t* indptr;          // [B * Hkv + 1]
  int64_t score_stride[2], norm_stride[2], budget_stride;
  int32_t capacity, num_rows, heads, length, window;
  double first;
  float eps;
  bool caches_keys;
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

// What gets in: keys above `key`, and those equal to it at positions up to `last_tie`. Each warp
// has a `last_tie` of its own, right for the positions that it works on.
struct Threshold {
  uint32_t key = kTaken;
  int32_t last_tie = -1;

  __device__ bool takes(uint32_t k, int32_t position) const {
    return k > key || (k == key && position <= last_tie);
  }
};

struct Shared {
  int32_t histogram[2][kBins];         // of rounds in turn
  int32_t groups[kRounds][kWarps];     // this CTA's histogram, summed up by groups of bins
  int32_t totals[kRounds][kWarps];     // the same over the cluster
  int32_t bins[kMaxCluster][kGroup];   // the bins of one group, of every CTA of the cluster
  int32_t above[kMaxCluster];          // keys above the digits found so far, of every CTA
  int32_t equal[kMaxCluster];          // keys that have these digits
  int32_t digit, left;
  int32_t warp_above[kWarps], warp_equal[kWarps];
  int32_t sums[kWarps];
};

// One CTA's part of a row: the positions first .. last, in equal shares for its warps.
class Part {
 public:
  __device__ Part(const SelectParams& params, const Row& row, int r, uint32_t* cache)
      : params_(params), cache_(params.caches_keys ? cache : nullptr) {
    const int64_t b = r / params.heads, h = r % params.heads;
    scores_ = params.scores + b * params.score_stride[0] + h * params.score_stride[1];
    if (params.norms) norms_ = params.norms + b * params.norm_stride[0] + h * params.norm_stride[1];
    const int warps = cluster_size() * kWarps;
    const int share = ((row.candidates + warps - 1) / warps + kWarpSize - 1) / kWarpSize * kWarpSize;
    const int warp = cluster_rank() * kWarps + threadIdx.x / kWarpSize;
    first_ = min(warp * share, row.candidates);
    last_ = min(first_ + share, row.candidates);
    if (cache_) cache_ += threadIdx.x / kWarpSize * share - first_;
  }

  // Ranks by score; or, when stage one has been decided, by both.
  __device__ uint32_t make_key(int32_t i, bool second, const Threshold& stage_one) const {
    const uint32_t key = order_key(scores_[i]);
    if (!second) return key;
    return stage_one.takes(key, i) ? kTaken : second_stage_key(scores_[i], norms_[i], params_.eps);
  }

  // Calls visit(key, position) for this thread's positions, all lanes of a warp together; lanes
  // behind the end get is_valid = false.
  template <typename Visit>
  __device__ void for_each(bool second, const Threshold& stage_one, const Visit& visit) const {
#pragma unroll 2
    for (int32_t begin = first_; begin < last_; begin += kWarpSize) {
      const int32_t i = begin + static_cast<int32_t>(threadIdx.x % kWarpSize);
      const bool is_valid = i < last_;
      uint32_t key = 0;
      if (is_valid) key = cache_ ? cache_[i] : make_key(i, second, stage_one);
      visit(key, i, is_valid);
    }
  }

  // Keeps the keys of a stage in shared memory.
  __device__ void cache_keys(bool second, const Threshold& stage_one) const {
    if (!cache_) return;
#pragma unroll 4
    for (int32_t i = first_ + threadIdx.x % kWarpSize; i < last_; i += kWarpSize) {
      cache_[i] = make_key(i, second, stage_one);
    }
    __syncwarp();
  }

 private:
  const SelectParams& params_;
  const float* scores_;
  const float* norms_ = nullptr;
  uint32_t* cache_;  // cache_[i]: key of position i; or null
  int32_t first_, last_;
};

// Joins the histograms of the cluster and finds the highest digit that `left` keys reach; `left`
// becomes what is still to be taken of the keys with this digit.
__device__ uint32_t find_digit(Shared& shared, int round, int32_t& left) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int size = cluster_size();
  const int32_t* histogram = shared.histogram[round % 2];
  __syncthreads();
  int32_t sum = 0;
#pragma unroll
  for (int j = 0; j < kLaneBins; ++j) sum += histogram[warp * kGroup + lane + j * kWarpSize];
  sum = warp_sum(sum);
  if (lane == 0) shared.groups[round][warp] = sum;
  if (lane < size && sum) cluster_add(&shared.totals[round][warp], lane, sum);
  cluster_arrive();
  cluster_wait();
  // Nobody reads the histogram of the round before any more.
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.histogram[(round + 1) % 2][i] = 0;

  // The group of bins: every warp finds it for itself.
  const int32_t total = lane < kWarps ? shared.totals[round][lane] : 0;
  const int32_t reached = top_k::warp_suffix_sum(total);
  const int group = 31 - __clz(__ballot_sync(kFullWarp, reached >= left) | 1);
  left -= __shfl_sync(kFullWarp, reached - total, group);
  int32_t bins[kLaneBins] = {}, groups = 0;  // of the CTA that this warp cares for
  if (warp < size) {
#pragma unroll
    for (int j = 0; j < kLaneBins; ++j) {
      bins[j] = cluster_load(&histogram[group * kGroup + lane * kLaneBins + j], warp);
      shared.bins[warp][lane * kLaneBins + j] = bins[j];
    }
    if (lane < kWarps) groups = cluster_load(&shared.groups[round][lane], warp);
  }
  __syncthreads();
  // The bin within the group.
  if (warp == 0) {
    int32_t joined[kLaneBins] = {}, here = 0;
    for (int c = 0; c < size; ++c) {
#pragma unroll
      for (int j = 0; j < kLaneBins; ++j) joined[j] += shared.bins[c][lane * kLaneBins + j];
    }
#pragma unroll
    for (int j = 0; j < kLaneBins; ++j) here += joined[j];
    const int32_t reached_here = top_k::warp_suffix_sum(here);
    const int winner = 31 - __clz(__ballot_sync(kFullWarp, reached_here >= left) | 1);
    if (lane == winner) {
      left -= reached_here - here;
      int j = kLaneBins - 1;
      for (; j > 0 && joined[j] < left; --j) left -= joined[j];
      shared.digit = lane * kLaneBins + j;
      shared.left = left;
    }
  }
  __syncthreads();
  const int digit = shared.digit;
  left = shared.left;
  if (warp < size) {
    int32_t higher = lane > group ? groups : 0, equal = 0;
#pragma unroll
    for (int j = 0; j < kLaneBins; ++j) {
      if (lane * kLaneBins + j > digit) higher += bins[j];
      if (lane * kLaneBins + j == digit) equal = bins[j];
    }
    higher = warp_sum(higher);
    equal = warp_sum(equal);
    if (lane == 0) {
      shared.above[warp] += higher;
      shared.equal[warp] = equal;
    }
  }
  return group * kGroup + digit;
}

// Where this warp's part of what gets in begins, counted from the row's first.
struct Place {
  Threshold threshold;
  int32_t offset;
};

// The threshold of the `count` best, as it holds for this warp's positions. 1 <= count.
__device__ Place find_threshold(Shared& shared,
                                const Part& part,
                                bool second,
                                const Threshold& stage_one,
                                int32_t count) {
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x < kMaxCluster) shared.above[threadIdx.x] = 0;
  uint32_t key = 0;
  int32_t left = count;
  for (int level = 0; level < top_k::kKeyLevels; ++level) {
    const int round = level + (second ? top_k::kKeyLevels : 0);
    int32_t* histogram = shared.histogram[round % 2];
    part.for_each(second, stage_one, [&](uint32_t k, int32_t, bool is_valid) {
      if (is_valid && top_k::has_prefix(k, key, level)) {
        atomicAdd(&histogram[top_k::key_digit(k, level)], 1);
      }
    });
    key |= find_digit(shared, round, left) << top_k::key_shift(level);
  }

  int32_t above = 0, equal = 0;
  part.for_each(second, stage_one, [&](uint32_t k, int32_t, bool is_valid) {
    above += __popc(__ballot_sync(kFullWarp, is_valid && k > key));
    equal += __popc(__ballot_sync(kFullWarp, is_valid && k == key));
  });
  shared.warp_above[warp] = above;
  shared.warp_equal[warp] = equal;
  __syncthreads();
  // What the CTAs and the warps before this one take.
  const int lane = threadIdx.x % kWarpSize, rank = cluster_rank();
  int32_t above_before = lane < warp ? shared.warp_above[lane] : 0;
  int32_t equal_before = lane < warp ? shared.warp_equal[lane] : 0;
  if (lane < rank) {
    above_before += shared.above[lane];
    equal_before += shared.equal[lane];
  }
  const int32_t ties_before = min(warp_sum(equal_before), left);
  Place place{{key, -1}, warp_sum(above_before) + ties_before};
  left -= ties_before;
  if (left >= equal) {
    place.threshold.last_tie = 0x7fffffff;
  } else if (left > 0) {
    int32_t passed = 0;
    part.for_each(second, stage_one, [&](uint32_t k, int32_t i, bool is_valid) {
      const uint32_t ties = __ballot_sync(kFullWarp, is_valid && k == key);
      const int32_t wanted = left - passed;  // the last tie is the wanted-th one from here on
      if (wanted >= 1 && wanted <= __popc(ties)) {
        place.threshold.last_tie = i - lane + static_cast<int32_t>(__fns(ties, 0, wanted));
      }
      passed += __popc(ties);
    });
  }
  __syncthreads();
  return place;
}

// Sum of value(0 .. count - 1) over the CTA.
template <typename Value>
__device__ int32_t block_sum(Shared& shared, int32_t count, const Value& value) {
  int32_t sum = 0;
  for (int32_t i = threadIdx.x; i < count; i += kThreads) sum += value(i);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) shared.sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  return warp_sum(lane < kWarps ? shared.sums[lane] : 0);
}

// Writes the positions of the candidates that are kept, ascending.
__device__ void write_candidates(const SelectParams& params,
                                 Shared& shared,
                                 const Part& part,
                                 const Row& row,
                                 int32_t offset) {
  const auto write = [&](int32_t at, int32_t position) {
    if (at < params.capacity) params.positions[at] = position;
  };
  if (row.count == row.candidates) {
    part.for_each(false, {}, [&](uint32_t, int32_t i, bool is_valid) {
      if (is_valid) write(offset + i, i);
    });
    return;
  }
  if (row.count == 0) return;
  Threshold stage_one;
  const int32_t first = params.norms ? static_cast<int32_t>(params.first * row.count) : row.count;
  bool second = first == 0;
  Place place;
  while (true) {
    part.cache_keys(second, stage_one);
    place = find_threshold(shared, part, second, stage_one, second ? row.count : first);
    if (second || !params.norms) break;
    stage_one = place.threshold;
    second = true;
  }
  const uint32_t lower_lanes = (1u << threadIdx.x % kWarpSize) - 1;
  int32_t at = offset + place.offset;
  part.for_each(second, stage_one, [&](uint32_t k, int32_t i, bool is_valid) {
    const bool is_taken = is_valid && place.threshold.takes(k, i);
    const uint32_t taken = __ballot_sync(kFullWarp, is_taken);
    if (is_taken) write(at + __popc(taken & lower_lanes), i);
    at += __popc(taken);
  });
}

// grid: [rows * cluster]; one cluster: one row, its candidates in equal parts.
__global__ void __launch_bounds__(kThreads, 1)
    select_kernel(const __grid_constant__ SelectParams params) {
  extern __shared__ uint32_t cache[];  // [keys of this CTA's part]
  __shared__ Shared shared;
  const int r = blockIdx.x / cluster_size(), rank = cluster_rank();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    shared.histogram[0][i] = shared.histogram[1][i] = 0;
  }
  if (threadIdx.x < kRounds * kWarps) (&shared.totals[0][0])[threadIdx.x] = 0;
  __syncthreads();
  cluster_arrive();
  const Row row = row_of(params, r);
  const int32_t offset = block_sum(shared, r, [&](int32_t i) {
    const Row before = row_of(params, i);
    return before.count + before.window;
  });
  const int32_t end = offset + row.count + row.window;
  if (rank == 0) {
    if (threadIdx.x == 0) params.indptr[r + 1] = end;
    if (threadIdx.x == 0 && r == 0) params.indptr[0] = 0;
    for (int32_t i = threadIdx.x; i < row.window; i += kThreads) {
      if (offset + row.count + i < params.capacity) {
        params.positions[offset + row.count + i] = row.candidates + i;
      }
    }
  }
  if (r == params.num_rows - 1) {
    for (int32_t i = end + rank * kThreads + static_cast<int32_t>(threadIdx.x); i < params.capacity;
         i += cluster_size() * kThreads) {
      params.positions[i] = -1;
    }
  }
  cluster_wait();  // all CTAs run: their memory may be written
  const Part part(params, row, r, cache);
  write_candidates(params, shared, part, row, offset);
  cluster_arrive();
  cluster_wait();  // nobody reads this CTA's memory any more
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
    ADAKV_CUDA_CHECK("select",
                     cudaMemsetAsync(params.positions, 0xff,
                                     params.capacity * sizeof(int32_t), stream));
    return;
  }
  const int device = scores.device.index, cluster = choose_cluster(params, device);
  const int warps = cluster * kWarps;
  const int share = ((params.length + warps - 1) / warps + kWarpSize - 1) / kWarpSize * kWarpSize;
  const int64_t keys = static_cast<int64_t>(share) * kWarps;
  const int limit =
      device_attribute("select", device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  params.caches_keys = keys * 4 + static_cast<int64_t>(sizeof(Shared)) <= limit;
  const size_t shared_bytes = params.caches_keys ? keys * 4 : 0;
  launch("select", select_kernel,
         {dim3(params.num_rows * cluster), kThreads, shared_bytes, false, cluster}, stream, params);
}

size_t CudaBackend::workspace_bytes(const SelectArgs&) const {
  return 0;
}

}  // namespace adakv
