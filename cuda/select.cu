// Positions that each row keeps; see ops.h. One launch, a cluster of CTAs for each row:
//   1. find the key of the last of the `count` best candidates (common/cluster_search.cuh); once
//      its first digit is known, each warp lists the few candidates that have it
//   2. of the candidates equal to that key the first ones get in: prefix sums over CTAs and warps
//   3. write the positions that get in, ascending, and then the window
// The second stage (norms) is step 1 and 2 again with keys that rank what stage one took above
// everything else. Below sm_90 a row's cluster is one CTA.
#include <algorithm>

#include "common/async_copy.cuh"
#include "common/cluster_search.cuh"
#include "common/device_guard.h"
#include "common/launch.cuh"
#include "cuda_backend.h"

namespace adakv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxCluster = 8;
constexpr int kMaxShare = 65535;          // positions of a warp that has a list of them
constexpr uint32_t kTaken = 0xffffffffu;  // above every score

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
  top_k::ClusterSearch<kThreads, kMaxCluster, 2 * top_k::kKeyLevels> search;
  int32_t warp_above[kWarps], warp_equal[kWarps];
  int32_t sums[kWarps];
};

// Positions of a warp if `length` of them are dealt to a cluster.
__host__ __device__ int32_t share_of(int32_t length, int cluster) {
  const int32_t warps = cluster * kWarps, share = (length + warps - 1) / warps;
  return (share + kWarpSize - 1) / kWarpSize * kWarpSize;
}

// A warp's part of a row: positions side by side. If shared memory holds them (`cache`: the keys of
// a CTA, then the lists) its keys are made once a stage.
class Part {
 public:
  __device__ Part(const SelectParams& params, const Row& row, int r, uint32_t* cache)
      : eps_(params.eps) {
    const int64_t b = r / params.heads, h = r % params.heads;
    const int32_t share = share_of(row.candidates, cluster_size()), warp = threadIdx.x / kWarpSize;
    first_ = min((cluster_rank() * kWarps + warp) * share, row.candidates);
    count_ = min(share, row.candidates - first_);
    scores_ = params.scores + b * params.score_stride[0] + h * params.score_stride[1] + first_;
    if (params.norms) {
      norms_ = params.norms + b * params.norm_stride[0] + h * params.norm_stride[1] + first_;
    }
    if (params.caches_keys) {
      keys_ = cache + warp * share;
      list_ = reinterpret_cast<uint16_t*>(cache + kWarps * share) + warp * share;
    }
  }

  // Ranks by score; or, when stage one has been decided, by both.
  __device__ uint32_t make_key(int32_t i, bool second, const Threshold& stage_one) const {
    const uint32_t key = order_key(scores_[i]);
    if (!second) return key;
    return stage_one.takes(key, first_ + i) ? kTaken
                                            : second_stage_key(scores_[i], norms_[i], eps_);
  }

  // Makes the keys of a stage: the calls of visit(key) for this thread's.
  template <typename Visit>
  __device__ void make_keys(bool second, const Threshold& stage_one, const Visit& visit) const {
#pragma unroll 16
    for (int32_t i = threadIdx.x % kWarpSize; i < count_; i += kWarpSize) {
      const uint32_t key = make_key(i, second, stage_one);
      if (keys_) keys_[i] = key;
      visit(key);
    }
    __syncwarp();
  }

  // Calls visit(key, position, is_valid), all lanes of the warp together; lanes behind the end are
  // not valid.
  template <typename Visit>
  __device__ void for_each(bool second, const Threshold& stage_one, const Visit& visit) const {
#pragma unroll 2
    for (int32_t begin = 0; begin < count_; begin += kWarpSize) {
      const int32_t i = begin + static_cast<int32_t>(threadIdx.x % kWarpSize);
      const bool is_valid = i < count_;
      uint32_t key = 0;
      if (is_valid) key = keys_ ? keys_[i] : make_key(i, second, stage_one);
      visit(key, first_ + i, is_valid);
    }
  }

  // Lists the positions of keys with the first digit `digit`; returns how many keys are above.
  __device__ int32_t list_candidates(bool second, const Threshold& stage_one, uint32_t digit) {
    const uint32_t lower_lanes = (1u << threadIdx.x % kWarpSize) - 1;
    int32_t above = 0;
    listed_ = 0;
    for_each(second, stage_one, [&](uint32_t key, int32_t position, bool is_valid) {
      const uint32_t digit_of_key = top_k::key_digit(key, 0);
      above += __popc(__ballot_sync(kFullWarp, is_valid && digit_of_key > digit));
      const bool is_listed = is_valid && digit_of_key == digit;
      const uint32_t listed = __ballot_sync(kFullWarp, is_listed);
      if (is_listed && list_) {
        list_[listed_ + __popc(listed & lower_lanes)] = static_cast<uint16_t>(position - first_);
      }
      listed_ += __popc(listed);
    });
    __syncwarp();
    return above;
  }

  // for_each over what was listed, at least.
  template <typename Visit>
  __device__ void for_each_listed(bool second,
                                  const Threshold& stage_one,
                                  const Visit& visit) const {
    if (!list_) return for_each(second, stage_one, visit);
    for (int32_t begin = 0; begin < listed_; begin += kWarpSize) {
      const int32_t i = begin + static_cast<int32_t>(threadIdx.x % kWarpSize);
      const bool is_valid = i < listed_;
      const int32_t at = is_valid ? list_[i] : 0;
      visit(is_valid ? keys_[at] : 0, first_ + at, is_valid);
    }
  }

 private:
  float eps_;
  const float* scores_;           // [count_]
  const float* norms_ = nullptr;  // [count_]
  uint32_t* keys_ = nullptr;      // [count_] or null
  uint16_t* list_ = nullptr;      // [listed_] or null
  int32_t first_, count_, listed_ = 0;
};

// Where this warp's part of what gets in begins, counted from the row's first.
struct Place {
  Threshold threshold;
  int32_t offset;
};

// The threshold of the `count` best, as it holds for this warp's positions. 1 <= count.
__device__ Place
find_threshold(Shared& shared, Part& part, bool second, const Threshold& stage_one, int32_t count) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first_round = second ? top_k::kKeyLevels : 0;
  if (threadIdx.x < kMaxCluster) shared.search.above[threadIdx.x] = 0;
  int32_t left = count;
  part.make_keys(second, stage_one,
                 [&](uint32_t key) { shared.search.count(first_round, top_k::key_digit(key, 0)); });
  uint32_t key = shared.search.find_digit(first_round, left);
  int32_t above = part.list_candidates(second, stage_one, key);
  key <<= top_k::key_shift(0);
  for (int level = 1; level < top_k::kKeyLevels; ++level) {
    part.for_each_listed(second, stage_one, [&](uint32_t k, int32_t, bool is_valid) {
      if (is_valid && top_k::has_prefix(k, key, level)) {
        shared.search.count(first_round + level, top_k::key_digit(k, level));
      }
    });
    key |= shared.search.find_digit(first_round + level, left) << top_k::key_shift(level);
  }

  int32_t equal = 0;
  const uint32_t first_digit = top_k::key_digit(key, 0);
  part.for_each_listed(second, stage_one, [&](uint32_t k, int32_t, bool is_valid) {
    const bool is_above = is_valid && k > key && top_k::key_digit(k, 0) == first_digit;
    above += __popc(__ballot_sync(kFullWarp, is_above));
    equal += __popc(__ballot_sync(kFullWarp, is_valid && k == key));
  });
  shared.warp_above[warp] = above;
  shared.warp_equal[warp] = equal;
  __syncthreads();
  // What the CTAs and the warps before this one take.
  int32_t above_before = lane < warp ? shared.warp_above[lane] : 0;
  int32_t equal_before = lane < warp ? shared.warp_equal[lane] : 0;
  if (lane < cluster_rank()) {
    above_before += shared.search.above[lane];
    equal_before += shared.search.equal[lane];
  }
  const int32_t ties_before = min(__reduce_add_sync(kFullWarp, equal_before), left);
  Place place{{key, -1}, __reduce_add_sync(kFullWarp, above_before) + ties_before};
  left -= ties_before;
  if (left >= equal) {
    place.threshold.last_tie = 0x7fffffff;
  } else if (left > 0) {
    int32_t passed = 0;
    part.for_each_listed(second, stage_one, [&](uint32_t k, int32_t i, bool is_valid) {
      const uint32_t ties = __ballot_sync(kFullWarp, is_valid && k == key);
      const int32_t wanted = left - passed;  // the last tie is the wanted-th one from here on
      if (wanted >= 1 && wanted <= __popc(ties)) {
        place.threshold.last_tie = __shfl_sync(kFullWarp, i, __fns(ties, 0, wanted));
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
  sum = __reduce_add_sync(kFullWarp, sum);
  if (threadIdx.x % kWarpSize == 0) shared.sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  return __reduce_add_sync(kFullWarp, lane < kWarps ? shared.sums[lane] : 0);
}

// Writes the positions of the candidates that are kept, ascending. Arrives at the cluster's last
// barrier as soon as nobody else's memory is read.
__device__ void write_candidates(
    const SelectParams& params, Shared& shared, Part& part, const Row& row, int32_t offset) {
  const auto write = [&](int32_t at, int32_t position) {
    if (at < params.capacity) params.positions[at] = position;
  };
  if (row.count == 0 || row.count == row.candidates) {
    cluster_arrive();
    const int32_t step = cluster_size() * kThreads;
    for (int32_t i = cluster_rank() * kThreads + threadIdx.x; i < row.count; i += step) {
      write(offset + i, i);
    }
    return;
  }
  Threshold stage_one;
  const int32_t first = params.norms ? static_cast<int32_t>(params.first * row.count) : row.count;
  bool second = first == 0;
  Place place;
  while (true) {
    place = find_threshold(shared, part, second, stage_one, second ? row.count : first);
    if (second || !params.norms) break;
    stage_one = place.threshold;
    second = true;
  }
  cluster_arrive();
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
  extern __shared__ uint32_t cache[];  // keys and lists of this CTA's part
  __shared__ Shared shared;
  const int r = blockIdx.x / cluster_size(), rank = cluster_rank();
  shared.search.init();
  __syncthreads();
  cluster_arrive();
  wait_for_previous_kernel();
  let_next_kernel_begin();
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
  Part part(params, row, r, cache);
  write_candidates(params, shared, part, row, offset);
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
    ADAKV_CUDA_CHECK("select", cudaMemsetAsync(params.positions, 0xff,
                                               params.capacity * sizeof(int32_t), stream));
    return;
  }
  const int device = scores.device.index, cluster = choose_cluster(params, device);
  const int64_t share = share_of(params.length, cluster);
  const int64_t cache_bytes = share * kWarps * (sizeof(uint32_t) + sizeof(uint16_t));
  const int limit = device_attribute("select", device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  params.caches_keys = share <= kMaxShare && cache_bytes + int64_t{sizeof(Shared)} <= limit;
  const size_t shared_bytes = params.caches_keys ? cache_bytes : 0;
  launch("select", select_kernel,
         {dim3(params.num_rows * cluster), kThreads, shared_bytes, has_sm90("select", device),
          cluster},
         stream, params);
}

size_t CudaBackend::workspace_bytes(const SelectArgs&) const {
  return 0;
}

}  // namespace adakv
