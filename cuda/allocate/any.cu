// allocate for any device, safeguard and number of heads: the definition, told step by step, by
// ordinary launches. See ops.h for the formulas and allocate.cuh for the search. One cluster a
// sequence (cluster.cu) does it faster where it fits.
//
//   f[h] = how many of the heads * mean best entries lie in head h; then the safeguard
//
// The last entry that gets in is found digit by digit: where k entries are wanted, the next digit
// is the highest d such that at least k entries lie above the digits so far or have them and then d
// or more. Launches:
//   1. count, once per level, grid: [parts, Hkv, B]; one CTA: the histogram of the next digit, of a
//      part of one head's entries that have the digits so far; of the position only the first
//      digit, and only if it matters
//   2. finish, grid: [B]; one CTA: the budgets of one sequence. f[h] = entries of head h above the
//      last one, and those equal to it that come first
// Each launch finds the digit of the level before for itself: that costs less than one more launch.
#include "allocate/allocate.cuh"

#include <algorithm>

#include "common/async_copy.cuh"
#include "common/launch.cuh"

namespace adakv {
namespace {

using top_k::kBins;
using top_k::kKeyLevels;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPartKeys = 4096;  // of one head, counted by one CTA
constexpr int kLevels = kKeyLevels + kPositionLevels;
constexpr int kHeadBatch = 8;  // heads whose histograms are added up at a time

static_assert(kBins == 2 * kThreads, "a thread looks after two bins");

// What the levels so far have found out about a sequence.
struct State {
  uint32_t key = 0;       // digits of the key
  uint32_t position = 0;  // digits of ~position
  int32_t* above;         // [Hkv] shared; entries of each head above these digits
};

struct Shared {
  int32_t warp_sums[kHeadBatch][kWarps];
  int32_t digit, contested, num_contested;
};

__device__ int32_t* histogram_of(const AllocateParams& params, int b, int level, int h) {
  return params.histograms +
         ((static_cast<int64_t>(b) * kLevels + level) * params.heads + h) * kBins;
}

__device__ int32_t* state_of(const AllocateParams& params, int b, int level) {
  return params.states + (static_cast<int64_t>(b) * kLevels + level) * (2 + params.heads);
}

// What is known before a level that an earlier launch has written.
__device__ void read_state(const AllocateParams& params, int b, int level, State& state) {
  const int32_t* stored = state_of(params, b, level);
  if (level > 0) {
    state.key = stored[0];
    state.position = stored[1];
  }
  for (int h = threadIdx.x; h < params.heads; h += kThreads) {
    state.above[h] = level > 0 ? stored[2 + h] : 0;
  }
  __syncthreads();
}

__device__ void write_state(const AllocateParams& params, int b, int level, const State& state) {
  int32_t* stored = state_of(params, b, level);
  if (threadIdx.x == 0) {
    stored[0] = static_cast<int32_t>(state.key);
    stored[1] = static_cast<int32_t>(state.position);
  }
  for (int h = threadIdx.x; h < params.heads; h += kThreads) stored[2 + h] = state.above[h];
}

// The next digit: the highest d with
//   sum over heads of max(own, entries above the digits so far or with digits >= d) >= k.
__device__ int find_digit(
    const AllocateParams& params, Shared& shared, int b, int level, const State& state) {
  const Sequence sequence(params, b);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int bin = 2 * threadIdx.x;            // a thread looks after this one and the next
  int64_t reached_low = 0, reached_high = 0;  // the sum for d = bin and bin + 1
  if (threadIdx.x == 0) shared.digit = 0;
  for (int begin = 0; begin < params.heads; begin += kHeadBatch) {
    // 1. The counts of this thread's bins, of some heads.
    int2 counts[kHeadBatch];
    int32_t suffix[kHeadBatch];  // of this thread's bins and the higher ones of its warp
#pragma unroll
    for (int j = 0; j < kHeadBatch; ++j) {
      counts[j] = make_int2(0, 0);
      if (begin + j < params.heads) {
        const int32_t* histogram = histogram_of(params, b, level, begin + j);
        counts[j] = __ldcg(reinterpret_cast<const int2*>(histogram + bin));
      }
    }
    // 2. Added up from the highest bin down: within a warp, then over the warps.
#pragma unroll
    for (int j = 0; j < kHeadBatch; ++j) {
      suffix[j] = top_k::warp_suffix_sum(counts[j].x + counts[j].y);
      if (lane == 0) shared.warp_sums[j][warp] = suffix[j];
    }
    __syncthreads();
    if (warp < kHeadBatch) {
      const int32_t sum = shared.warp_sums[warp][lane];
      shared.warp_sums[warp][lane] = top_k::warp_suffix_sum(sum) - sum;
    }
    __syncthreads();
    // 3. What the heads reach together with either bin as the digit.
#pragma unroll
    for (int j = 0; j < kHeadBatch; ++j) {
      if (begin + j < params.heads) {
        const int32_t low = state.above[begin + j] + suffix[j] + shared.warp_sums[j][warp];
        reached_low += max(sequence.own, low);
        reached_high += max(sequence.own, low - counts[j].x);
      }
    }
    __syncthreads();
  }
  // 4. The highest bin that reaches k.
  const int mine = reached_high >= sequence.k ? bin + 1 : reached_low >= sequence.k ? bin : 0;
  const int best = __reduce_max_sync(kFullWarp, mine);
  if (lane == 0 && best > 0) atomicMax(&shared.digit, best);
  __syncthreads();
  return shared.digit;
}

// Finds the digit of a level and takes it into the state.
__device__ void refine(
    const AllocateParams& params, Shared& shared, int b, int level, State& state) {
  const int digit = find_digit(params, shared, b, level, state);
  // Entries with a higher digit are above the last one: a warp adds up a head's.
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int h = warp; h < params.heads; h += kWarps) {
    const int32_t* histogram = histogram_of(params, b, level, h);
    int32_t higher = 0;
    for (int i = digit + 1 + lane; i < kBins; i += kWarpSize) higher += __ldcg(histogram + i);
    higher = warp_sum(higher);
    if (lane == 0) state.above[h] += higher;
  }
  if (level < kKeyLevels) {
    state.key |= static_cast<uint32_t>(digit) << top_k::key_shift(level);
  } else {
    state.position |= static_cast<uint32_t>(digit) << position_shift(params, level);
  }
  __syncthreads();
}

// Entries of head h that have all digits so far (`level` was the last) and are not its own anyway.
__device__ int32_t
contested(const AllocateParams& params, int b, int h, int level, int32_t own, const State& state) {
  const uint32_t digit = level < kKeyLevels
                             ? top_k::key_digit(state.key, level)
                             : state.position >> position_shift(params, level) & (kBins - 1);
  const int32_t above = state.above[h];
  const int32_t equal = __ldcg(histogram_of(params, b, level, h) + digit);
  return max(own, above + equal) - max(own, above);
}

// Whether it is known how many entries each head gets, although not which.
__device__ bool is_settled(
    const AllocateParams& params, Shared& shared, int b, int level, const State& state) {
  const Sequence sequence(params, b);
  int32_t sure = 0, open = 0, num_open = 0;
  if (threadIdx.x < kWarpSize) {
    for (int h = threadIdx.x; h < params.heads; h += kWarpSize) {
      const int32_t here = contested(params, b, h, level, sequence.own, state);
      sure += max(sequence.own, state.above[h]);
      open += here;
      num_open += here > 0;
    }
    sure = warp_sum(sure);
    open = warp_sum(open);
    num_open = warp_sum(num_open);
    if (threadIdx.x == 0) {
      shared.contested = sure + open - static_cast<int32_t>(sequence.k);  // left over
      shared.num_contested = num_open;
    }
  }
  __syncthreads();
  const bool settled = shared.contested == 0 || shared.num_contested <= 1;
  __syncthreads();
  return settled;
}

// Adds to a histogram the next digits of head h's entries begin .. end - 1 with the digits so far.
template <typename Add>
__device__ void count_digits(const AllocateParams& params,
                             int b,
                             int h,
                             int32_t begin,
                             int32_t end,
                             int level,
                             const State& state,
                             const Add& add) {
  const float* row = params.scores + b * params.score_stride[0] + h * params.score_stride[1];
#pragma unroll 4
  for (int32_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const uint32_t key = order_key(row[i]);
    if (level < kKeyLevels) {
      if (top_k::has_prefix(key, state.key, level)) add(top_k::key_digit(key, level));
    } else if (key == state.key) {
      const int shift = position_shift(params, level), above = position_shift(params, level - 1);
      const uint32_t position = inverted(params, i);
      if (level == kKeyLevels || position >> above == state.position >> above) {
        add(position >> shift & (kBins - 1));
      }
    }
  }
}

// Launch 1. grid: [parts, Hkv, B]; one CTA: a level's digits of a part of one head's entries.
__global__ void __launch_bounds__(kThreads)
    allocate_count_kernel(const __grid_constant__ AllocateParams params, int level) {
  extern __shared__ int32_t above[];  // [Hkv]
  __shared__ Shared shared;
  __shared__ int32_t histogram[kBins];
  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
  let_next_kernel_begin();
  wait_for_previous_kernel();
  const int h = blockIdx.y, b = blockIdx.z;
  const Sequence sequence(params, b);
  if (sequence.keeps_all(params.mean) || sequence.k == 0) return;

  // 1. The digit of the level before, which its histograms have; one CTA of a sequence writes it
  //    down for the next level. Where scores alone tell all heads' shares, positions don't matter.
  State state;
  state.above = above;
  read_state(params, b, max(level - 1, 0), state);
  if (level > 0) {
    refine(params, shared, b, level - 1, state);
    if (blockIdx.x == 0 && h == 0) write_state(params, b, level, state);
    if (level == kKeyLevels && is_settled(params, shared, b, level - 1, state)) return;
  }

  // 2. The histogram of this CTA's part.
  const int32_t share = (sequence.length + params.num_parts - 1) / params.num_parts;
  const int32_t begin = min(static_cast<int32_t>(blockIdx.x) * share, sequence.length);
  const int32_t end = min(begin + share, sequence.length);
  count_digits(params, b, h, begin, end, level, state,
               [&](uint32_t digit) { atomicAdd(&histogram[digit], 1); });
  __syncthreads();

  // 3. Added to the head's, in memory.
  int32_t* joined = histogram_of(params, b, level, h);
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (histogram[i]) atomicAdd(&joined[i], histogram[i]);
  }
}

// Gives every head what is surely its own, and what is left in the order of heads.
__device__ void count_best(
    const AllocateParams& params, Shared& shared, int b, State& state, int32_t* counts) {
  const Sequence sequence(params, b);

  // 1. The digits that are still open: those of the position, if scores alone don't settle it.
  read_state(params, b, kKeyLevels, state);
  int level = kKeyLevels - 1;
  if (!is_settled(params, shared, b, level, state)) {
    refine(params, shared, b, ++level, state);
    while (level + 1 < num_levels(params)) {  // few have the same key: one CTA counts them all
      ++level;
      for (int h = 0; h < params.heads; ++h) {
        int32_t* histogram = histogram_of(params, b, level, h);
        count_digits(params, b, h, 0, sequence.length, level, state,
                     [&](uint32_t digit) { atomicAdd(&histogram[digit], 1); });
      }
      __threadfence();
      __syncthreads();
      refine(params, shared, b, level, state);
    }
  }

  // 2. What lies above the last entry is in.
  for (int h = threadIdx.x; h < params.heads; h += kThreads) {
    counts[h] = max(sequence.own, state.above[h]);
  }
  __syncthreads();

  // 3. The rest is of those that are equal to it.
  if (threadIdx.x == 0) {
    int64_t rest = sequence.k;
    for (int h = 0; h < params.heads; ++h) rest -= counts[h];
    for (int h = 0; h < params.heads && rest > 0; ++h) {
      const int64_t open = contested(params, b, h, level, sequence.own, state);
      const int64_t given = open < rest ? open : rest;
      counts[h] += static_cast<int32_t>(given);
      rest -= given;
    }
  }
  __syncthreads();
}

// Launch 2. grid: [B]; one CTA: the budgets of one sequence.
__global__ void __launch_bounds__(kThreads)
    allocate_finish_kernel(const __grid_constant__ AllocateParams params) {
  extern __shared__ BudgetScratch scratch[];                             // [Hkv]
  int32_t* counts = reinterpret_cast<int32_t*>(scratch + params.heads);  // [Hkv]
  int32_t* above = counts + params.heads;                                // [Hkv]
  __shared__ Shared shared;
  wait_for_previous_kernel();
  const int b = blockIdx.x;
  const Sequence sequence(params, b);
  if (sequence.keeps_all(params.mean)) return store_lengths(params, b, sequence.seq_len);

  // 1. How many of the best entries each head has.
  State state;
  state.above = above;
  if (sequence.k > 0) {
    count_best(params, shared, b, state, counts);
  } else {
    for (int h = threadIdx.x; h < params.heads; h += kThreads) counts[h] = 0;
    __syncthreads();
  }

  // 2. The safeguard makes budgets of them.
  store_budgets(params, b, counts, scratch);
}

int64_t histogram_ints(const TensorView& scores) {
  return scores.shape[0] * scores.shape[1] * kLevels * kBins;
}

}  // namespace

void any_allocate(const AllocateArgs& args, AllocateParams params) {
  const TensorView& scores = args.scores;
  const unsigned batch = static_cast<unsigned>(scores.shape[0]);
  const unsigned heads = static_cast<unsigned>(scores.shape[1]);
  params.histograms = args.workspace.ptr<int32_t>();
  params.states = params.histograms + histogram_ints(scores);
  params.num_parts = std::max(1, (params.length + kPartKeys - 1) / kPartKeys);
  const bool early = has_sm90("allocate", scores.device.index);
  ADAKV_CUDA_CHECK("allocate",
                   cudaMemsetAsync(params.histograms, 0, histogram_ints(scores) * sizeof(int32_t),
                                   static_cast<cudaStream_t>(args.stream)));
  const dim3 grid(params.num_parts, heads, batch);
  for (int level = 0; level <= kKeyLevels; ++level) {
    launch("allocate", allocate_count_kernel,
           {grid, kThreads, heads * sizeof(int32_t), early && level > 0}, args.stream, params,
           level);
  }
  launch("allocate", allocate_finish_kernel,
         {dim3(batch), kThreads, heads * (sizeof(BudgetScratch) + 2 * sizeof(int32_t)), early},
         args.stream, params);
}

size_t any_allocate_workspace_bytes(const AllocateArgs& args) {
  const int64_t states = args.scores.shape[0] * kLevels * (2 + args.scores.shape[1]);
  return (histogram_ints(args.scores) + states) * sizeof(int32_t);
}

}  // namespace adakv
