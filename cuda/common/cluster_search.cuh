// The k-th best of entries that are spread over the CTAs of a cluster, without sorting them.
//   1. histogram: every CTA counts its entries by bins of the range in which the k-th best is, the
//      cluster adds up, and the range narrows to one bin; until that holds few entries
//   2. these are gathered in every CTA, which goes on alone: a histogram of them, and when no more
//      than a warp's are left each is compared with all others
// With scores that are not made to be hostile, step 1 is done once.
#pragma once

#include "common/cluster.cuh"
#include "common/entry_order.cuh"
#include "common/topk.cuh"

namespace adakv {

/// Entries between two places of the order, both included.
struct OrderRange {
  static constexpr int kBinBits = 11;

  uint64_t first = 0, last = ~uint64_t{0};

  __device__ bool has(uint64_t order) const { return order - first <= last - first; }
  __device__ uint32_t bin(uint64_t order) const {
    return static_cast<uint32_t>((order - first) >> bin_shift());
  }
  __device__ OrderRange narrowed(uint32_t bin) const {
    const uint64_t from = first + (uint64_t{bin} << bin_shift());
    const uint64_t to = from + ((uint64_t{1} << bin_shift()) - 1);
    return {from, to < last ? to : last};
  }

 private:
  __device__ int bin_shift() const { return max(64 - kBinBits - __clzll(last - first), 0); }
};

template <int kThreads>
struct ClusterSearch {
  static constexpr int kBins = 1 << OrderRange::kBinBits;
  static constexpr int kGroup = 64;  // bins
  static constexpr int kGroups = kBins / kGroup;
  static constexpr int kMaxCluster = 16;
  static constexpr int kMaxListed = kThreads;  // entries that are gathered
  static constexpr int kMaxCounts = 64;
  static_assert(kThreads == kGroups * kWarpSize && kGroups == kWarpSize && kGroup == 2 * kWarpSize);

  /// The same in every CTA.
  struct alignas(16) Shared {
    int32_t bins[kBins];                           // of this CTA
    int32_t group_sums[kGroups];                   // the same, added up
    int32_t all_group_sums[kMaxCluster][kGroups];  // of every CTA
    int32_t group[kMaxCluster][kGroup];            // the bins of one group, of every CTA
    int32_t above[kMaxCluster][kMaxCounts];        // entries above the list, of every CTA
    uint64_t list[kMaxListed];                     // gathered entries, CTA after CTA
    uint64_t few[kWarpSize];
    int32_t bin, rank_in_bin, num_in_bin;
    int32_t list_end, few_end;
    Exchange exchange;
  };

  Shared& shared;
  int turn = 0;
  OrderRange range;
  int32_t rank;                    // the k-th best is the rank-th best of the range
  int32_t num_inside;              // entries in the range
  int32_t num_listed, list_begin;  // list_begin: of what this CTA listed

  __device__ explicit ClusterSearch(Shared& s) : shared(s) {}

  /// The k-th best entry, 1 <= k; the CTA's own are `entries`:
  ///   make(visit)      calls visit(key) for each, the first time that they are gone through
  ///   for_each(visit)  calls visit(order) for each
  ///   kind()           which of the `num_counts` counters of `above` this warp's belong to
  /// Afterwards `list` holds those near it and `above` what was above the list.
  template <typename Entries>
  __device__ uint64_t find(const Entries& entries, int num_counts, int32_t k) {
    const int cluster = cluster_size();
    rank = k;
    if (threadIdx.x == 0) shared.list_end = shared.few_end = 0;
    if (threadIdx.x < kMaxCounts) shared.above[cluster_rank()][threadIdx.x] = 0;
    narrow(cluster, [&] { entries.make([&](uint32_t key) { count(first_bin(key)); }); });
    range = first_range(shared.bin);
    while (num_inside > kMaxListed) {
      narrow(cluster, [&] {
        entries.for_each([&](uint64_t order) {
          if (range.has(order)) count(range.bin(order));
        });
      });
      range = range.narrowed(shared.bin);
    }
    gather(entries, num_counts);
    num_listed = num_inside;
    const bool is_listed = threadIdx.x < num_listed;
    const uint64_t mine = is_listed ? shared.list[threadIdx.x] : 0;
    while (num_inside > kWarpSize) {
      narrow(1, [&] {
        if (is_listed && range.has(mine)) count(range.bin(mine));
      });
      range = range.narrowed(shared.bin);
    }
    return pick(is_listed && range.has(mine), mine);
  }

 private:
  // The bins of the first round: 64 for each power of two from 2^-31 to 2.
  static constexpr int kFirstShift = 17;
  static constexpr int32_t kFirstKey = (0x80000000u + 0x30000000u) >> kFirstShift;

  __device__ static uint32_t first_bin(uint32_t key) {
    return max(min(static_cast<int32_t>(key >> kFirstShift) - kFirstKey, kBins - 1), 0);
  }
  __device__ static OrderRange first_range(uint32_t bin) {
    const uint64_t from = uint64_t{bin + kFirstKey} << (32 + kFirstShift);
    OrderRange range;
    if (bin > 0) range.first = from;
    if (bin < kBins - 1) range.last = from + ((uint64_t{1} << (32 + kFirstShift)) - 1);
    return range;
  }

  __device__ void count(uint32_t bin) { atomicAdd(&shared.bins[bin], 1); }

  // Finds the bin of the rank-th best among those that count_all counts, in `cluster` CTAs.
  template <typename CountAll>
  __device__ void narrow(int cluster, const CountAll& count_all) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    int2& bins = reinterpret_cast<int2*>(shared.bins)[threadIdx.x];
    bins = make_int2(0, 0);
    __syncthreads();
    count_all();
    __syncthreads();
    const int32_t sum = __reduce_add_sync(kFullWarp, bins.x + bins.y);
    if (lane == 0) shared.group_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) find_bin(cluster);
    __syncthreads();
    if (cluster > 1) turn += 2;
    rank = shared.rank_in_bin;
    num_inside = shared.num_in_bin;
  }

  // Puts every CTA's `values` in its row of `all`, [cluster, kCount], in all CTAs; returns `all`, or
  // a single CTA's own values.
  template <int kCount>
  __device__ const int32_t* share(int cluster,
                                  int the_turn,
                                  const int32_t* values,
                                  int32_t (*all)[kCount]) {
    if (cluster == 1) return values;
    constexpr int kFours = kCount / 4;
    for (int i = threadIdx.x; i < cluster * kFours; i += kWarpSize) {
      const int j = i % kFours;
      shared.exchange.send(the_turn, i / kFours, reinterpret_cast<int4*>(all[cluster_rank()]) + j,
                           reinterpret_cast<const int4*>(values)[j]);
    }
    shared.exchange.wait(the_turn, cluster * kCount * sizeof(int32_t));
    return all[0];
  }

  // One warp: the bin, from the group of bins that it is in.
  __device__ void find_bin(int cluster) {
    const int lane = threadIdx.x;
    const int32_t* sums = share(cluster, turn, shared.group_sums, shared.all_group_sums);
    int32_t sum = 0;
    for (int c = 0; c < cluster; ++c) sum += sums[c * kGroups + lane];
    int32_t reached = top_k::warp_suffix_sum(sum);
    const int group = 31 - __clz(__ballot_sync(kFullWarp, reached >= rank) | 1);
    int32_t left = rank - __shfl_sync(kFullWarp, reached - sum, group);

    const int32_t* group_bins =
        share(cluster, turn + 1, &shared.bins[group * kGroup], shared.group);
    int2 bins = make_int2(0, 0);
    for (int c = 0; c < cluster; ++c) {
      const int2 more = reinterpret_cast<const int2*>(group_bins + c * kGroup)[lane];
      bins.x += more.x;
      bins.y += more.y;
    }
    sum = bins.x + bins.y;
    reached = top_k::warp_suffix_sum(sum);
    if (lane == 31 - __clz(__ballot_sync(kFullWarp, reached >= left) | 1)) {
      left -= reached - sum;
      const bool is_upper = bins.y >= left;
      shared.bin = group * kGroup + 2 * lane + is_upper;
      shared.rank_in_bin = is_upper ? left : left - bins.y;
      shared.num_in_bin = is_upper ? bins.y : bins.x;
    }
  }

  // Lists the entries of the range in all CTAs, and counts those above.
  template <typename Entries>
  __device__ void gather(const Entries& entries, int num_counts) {
    const int cluster = cluster_size(), own = cluster_rank(), lane = threadIdx.x % kWarpSize;
    list_begin =
        __reduce_add_sync(kFullWarp, lane < own ? shared.group[lane][shared.bin % kGroup] : 0);
    uint64_t* list = shared.list + list_begin;
    int32_t above = 0;
    entries.for_each([&](uint64_t order) {
      if (order < range.first) return;
      if (order > range.last) {
        ++above;
      } else {
        list[atomicAdd(&shared.list_end, 1)] = order;
      }
    });
    above = __reduce_add_sync(kFullWarp, above);
    if (lane == 0 && above > 0) atomicAdd(&shared.above[own][entries.kind()], above);
    __syncthreads();
    if (cluster == 1) return;
    for (int i = threadIdx.x; i < shared.list_end * cluster; i += kThreads) {
      shared.exchange.send(turn, i % cluster, &list[i / cluster], list[i / cluster]);
    }
    const int fours = (num_counts + 3) / 4;
    for (int i = threadIdx.x; i < fours * cluster; i += kThreads) {
      int4* four = reinterpret_cast<int4*>(shared.above[own]) + i / cluster;
      shared.exchange.send(turn, i % cluster, four, *four);
    }
    shared.exchange.wait(turn, num_inside * sizeof(uint64_t) + cluster * fours * sizeof(int4));
    ++turn;
  }

  // The rank-th best of those that are left, one a thread.
  __device__ uint64_t pick(bool is_left, uint64_t mine) {
    const int lane = threadIdx.x % kWarpSize;
    if (is_left) shared.few[atomicAdd(&shared.few_end, 1)] = mine;
    __syncthreads();
    const uint64_t candidate = lane < num_inside ? shared.few[lane] : 0;
    int32_t better = 0;
    for (int i = 0; i < num_inside; ++i) better += shared.few[i] > candidate;
    const uint32_t found = __ballot_sync(kFullWarp, lane < num_inside && better == rank - 1);
    return __shfl_sync(kFullWarp, candidate, __ffs(found) - 1);
  }
};

}  // namespace adakv
