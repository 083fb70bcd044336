// What the kernels of allocate share: those of ordinary launches (any.cu) and that of one cluster
// (cluster.cu).
//
// The last of the Hkv * b best entries is found digit by digit of a long key, (order_key(score),
// ~position): 11 + 11 + 10 bits of the score, then 11 at a time of the position. Most often the
// score is enough: how many entries of each head get in is known, although not which.
#pragma once

#include "adakv/ops.h"
#include "common/reduce.cuh"
#include "common/topk.cuh"
#include "ops/budgets.h"

namespace adakv {

struct AllocateParams {
  const float* scores;      // [B, Hkv, T]
  const int32_t* seq_lens;  // [B] or null
  int32_t* budgets;         // [B, Hkv]
  int64_t score_stride[2], budget_stride;
  double floor;
  Safeguard safeguard;
  int32_t heads, length, window, mean;
  int32_t position_bits;  // of positions below T
  // any.cu only:
  int32_t* histograms;  // [B, levels, Hkv, bins], zeros at first
  int32_t* states;      // [B, levels, 2 + Hkv]: what is known before each level
  int32_t num_parts;
  // cluster.cu only:
  int32_t num_cached;  // keys of a thread in shared memory, in fours
};

constexpr int kPositionLevels = 3;  // at most

/// Whether one cluster a sequence does it, with a joint histogram of all heads.
bool cluster_allocate_fits(const AllocateArgs& args);
void cluster_allocate(const AllocateArgs& args, AllocateParams params);

/// The kernels for everything else (any.cu): below sm_90, Safeguard::kHardFloor, many heads.
void any_allocate(const AllocateArgs& args, AllocateParams params);
size_t any_allocate_workspace_bytes(const AllocateArgs& args);

struct Sequence {
  int32_t seq_len, length;  // length: candidates of a head
  int32_t own;              // every head counts for so many at least
  int64_t k;                // entries to give away

  __device__ Sequence(const AllocateParams& params, int b) {
    seq_len = params.seq_lens ? params.seq_lens[b] : params.length;
    length = seq_len - params.window;
    own = params.safeguard == Safeguard::kHardFloor
              ? static_cast<int32_t>(whole_floor(params.floor, params.mean))
              : 0;
    k = static_cast<int64_t>(params.heads) * params.mean;
  }

  __device__ bool keeps_all(int32_t mean) const { return length <= 0 || length <= mean; }
};

/// Bits of ~position below the digit of a level.
__device__ inline int position_shift(const AllocateParams& params, int level) {
  return max(params.position_bits - 11 * (level - top_k::kKeyLevels + 1), 0);
}

__device__ inline uint32_t inverted(const AllocateParams& params, int32_t position) {
  return (1u << params.position_bits) - 1 - static_cast<uint32_t>(position);
}

/// Levels that tell all entries of a head apart.
__device__ inline int num_levels(const AllocateParams& params) {
  return top_k::kKeyLevels + max(1, (params.position_bits + 10) / 11);
}

struct BudgetScratch {
  int32_t whole, nanos;  // of a head's share
};

/// Budgets of a sequence from counts[h], how many of the best entries lie in head h. By all threads
/// of the CTA; counts and scratch are shared memory, [Hkv].
__device__ inline void store_budgets(const AllocateParams& params,
                                     int b,
                                     int32_t* counts,
                                     BudgetScratch* scratch) {
  const int thread = threadIdx.x, num_threads = blockDim.x;
  const double mean = static_cast<double>(params.mean);
  if (params.safeguard == Safeguard::kBlend) {
    // (1 - floor) * counts[h] + floor * mean, rounded so that the sum is heads * mean.
    for (int h = thread; h < params.heads; h += num_threads) {
      const int64_t share = share_nanos(params.floor, counts[h], params.floor * mean);
      scratch[h].whole = static_cast<int32_t>(share / kNano);
      scratch[h].nanos = static_cast<int32_t>(share % kNano);
    }
    __syncthreads();
    for (int h = thread; h < params.heads; h += num_threads) {
      int64_t left = static_cast<int64_t>(params.heads) * params.mean;
      int32_t before = 0;
      for (int i = 0; i < params.heads; ++i) {
        left -= scratch[i].whole;
        before += rounds_up_before(scratch[i].nanos, i, scratch[h].nanos, h);
      }
      counts[h] = scratch[h].whole + (before < left);
    }
  } else if (params.safeguard == Safeguard::kOfficialRound) {
    const double own = static_cast<double>(whole_floor(params.floor, params.mean));
    for (int h = thread; h < params.heads; h += num_threads) {
      const int64_t nanos = share_nanos(params.floor, counts[h], own);
      counts[h] = static_cast<int32_t>(round_half_even(nanos));
    }
  }
  for (int h = thread; h < params.heads; h += num_threads) {
    params.budgets[b * params.budget_stride + h] = counts[h] + params.window;
  }
}

/// Budgets of a sequence that keeps everything.
__device__ inline void store_lengths(const AllocateParams& params, int b, int32_t seq_len) {
  for (int h = threadIdx.x; h < params.heads; h += blockDim.x) {
    params.budgets[b * params.budget_stride + h] = seq_len;
  }
}

}  // namespace adakv
