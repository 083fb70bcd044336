// The cluster's way to find the k best keys of a list that is spread over its CTAs: the digits of
// the last key that gets in, from histograms that are joined through distributed shared memory.
#pragma once

#include "common/cluster.cuh"
#include "common/topk.cuh"

namespace adakv::top_k {

/// In shared memory, the same in every CTA. Rounds follow each other: count() the digits of round
/// i, then find_digit(i).
template <int kThreads, int kMaxCluster, int kRounds>
struct ClusterSearch {
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kGroup = kBins / kWarps;         // bins that one warp adds up
  static constexpr int kLaneBins = kGroup / kWarpSize;  // of a group, side by side
  static_assert(kMaxCluster <= kWarps && kRounds * kWarps <= kThreads);

  int32_t histograms[2][kBins];       // of this CTA, for rounds in turn
  int32_t groups[kRounds][kWarps];    // the same, added up by groups of bins
  int32_t totals[kRounds][kWarps];    // groups of the whole cluster
  int32_t bins[kMaxCluster][kGroup];  // the bins of one group, of every CTA
  int32_t above[kMaxCluster];         // keys of every CTA above the digits found so far
  int32_t equal[kMaxCluster];         // keys of every CTA that have these digits
  int32_t digit, left;

  /// Before a barrier of the cluster.
  __device__ void init() {
    for (int i = threadIdx.x; i < 2 * kBins; i += kThreads) (&histograms[0][0])[i] = 0;
    if (threadIdx.x < kRounds * kWarps) (&totals[0][0])[threadIdx.x] = 0;
  }

  __device__ void count(int round, uint32_t digit_of_key) {
    atomicAdd(&histograms[round % 2][digit_of_key], 1);
  }

  /// All threads of the cluster: the highest digit that `rest` keys reach. `rest` becomes how many
  /// of the keys with this digit still get in.
  __device__ uint32_t find_digit(int round, int32_t& rest) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int size = cluster_size();
    const int32_t* histogram = histograms[round % 2];
    __syncthreads();
    int32_t sum = 0;
#pragma unroll
    for (int j = 0; j < kLaneBins; ++j) sum += histogram[warp * kGroup + lane + j * kWarpSize];
    sum = __reduce_add_sync(kFullWarp, sum);
    if (lane == 0) groups[round][warp] = sum;
    if (lane < size && sum) cluster_add(&totals[round][warp], lane, sum);
    cluster_arrive();
    cluster_wait();
    // Nobody reads the histogram of the round before any more.
    for (int i = threadIdx.x; i < kBins; i += kThreads) histograms[(round + 1) % 2][i] = 0;

    // The group of bins: every warp finds it for itself.
    const int32_t total = lane < kWarps ? totals[round][lane] : 0;
    const int32_t reached = warp_suffix_sum(total);
    const int group = 31 - __clz(__ballot_sync(kFullWarp, reached >= rest) | 1);
    rest -= __shfl_sync(kFullWarp, reached - total, group);
    int32_t mine[kLaneBins] = {}, my_groups = 0;  // of the CTA that this warp cares for
    if (warp < size) {
#pragma unroll
      for (int j = 0; j < kLaneBins; ++j) {
        mine[j] = cluster_load(&histogram[group * kGroup + lane * kLaneBins + j], warp);
        bins[warp][lane * kLaneBins + j] = mine[j];
      }
      if (lane < kWarps) my_groups = cluster_load(&groups[round][lane], warp);
    }
    __syncthreads();
    if (warp == 0) find_bin(size, rest);
    __syncthreads();
    rest = left;
    if (warp < size) {
      int32_t higher = lane > group ? my_groups : 0, same = 0;
#pragma unroll
      for (int j = 0; j < kLaneBins; ++j) {
        if (lane * kLaneBins + j > digit) higher += mine[j];
        if (lane * kLaneBins + j == digit) same = mine[j];
      }
      higher = __reduce_add_sync(kFullWarp, higher);
      same = __reduce_add_sync(kFullWarp, same);
      if (lane == 0) {
        above[warp] += higher;
        equal[warp] = same;
      }
    }
    return group * kGroup + digit;
  }

 private:
  // One warp: the bin within the group.
  __device__ void find_bin(int size, int32_t rest) {
    const int lane = threadIdx.x % kWarpSize;
    int32_t joined[kLaneBins] = {}, here = 0;
    for (int c = 0; c < size; ++c) {
#pragma unroll
      for (int j = 0; j < kLaneBins; ++j) joined[j] += bins[c][lane * kLaneBins + j];
    }
#pragma unroll
    for (int j = 0; j < kLaneBins; ++j) here += joined[j];
    const int32_t reached = warp_suffix_sum(here);
    const int winner = 31 - __clz(__ballot_sync(kFullWarp, reached >= rest) | 1);
    if (lane == winner) {
      rest -= reached - here;
      int j = kLaneBins - 1;
      for (; j > 0 && joined[j] < rest; --j) rest -= joined[j];
      digit = lane * kLaneBins + j;
      left = rest;
    }
  }
};

}  // namespace adakv::top_k
