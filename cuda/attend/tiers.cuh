// The fast attend kernel over rows whose entries lie in several tiers, in one launch: each block does
// what a worker of one tier does, by the code of its format, and the block that is done with a row last
// adds up the partial results of all tiers.
#pragma once

#include "attend/attend.cuh"

namespace adakv {

/// The partial results of a row in all tiers: tier by tier, in the order of the workers. kNarrow: they
/// have some columns of out, or others than those of the first tier.
template <int kFirstDim, bool kNarrow>
class SeveralTiers {
 public:
  static constexpr bool kGoesOn = false;
  static constexpr bool kHasParts = kNarrow;
  static constexpr int kAtOnce = 1;     // registers are short
  static constexpr int kMostWarps = 7;  // blocks of all formats have so many

  __device__ SeveralTiers(const AttendTiersParams& all, int32_t tier, int32_t row)
      : all_(all), tier_(tier), row_(row) {
#pragma unroll
    for (int t = 0; t < kMostFastTiers; ++t) {
      num_[t] = first_[t] = 0;
      if (t >= all.num_tiers) continue;
      const schedule::RowFacts& facts = all.tiers[t].rows[row];
      num_[t] = __ldg(&facts.num_partials);
      first_[t] = __ldg(&facts.first_partial);
    }
  }

  __device__ int32_t count() const {
    int32_t count = 0;
#pragma unroll
    for (int t = 0; t < kMostFastTiers; ++t) count += num_[t];
    return count;
  }

  __device__ int32_t mine(const schedule::RowFacts& facts, int32_t worker) const {
    return first_slot(tier_, facts.num_partials, facts.first_partial) + worker - facts.first_worker;
  }

  template <int kQuads>
  static constexpr int kPartQuads = kFirstDim / 4;

  __device__ int32_t num_quads(int32_t of_tier) const { return kNarrow ? all_.width / 4 : of_tier; }

  __device__ PartPlace place(int32_t i) const {
    int32_t slot = 0, tier = 0;
#pragma unroll
    for (int t = 0; t < kMostFastTiers; ++t) {
      if (i >= 0 && i < num_[t]) {
        slot = first_slot(t, num_[t], first_[t]) + i;
        tier = t;
      }
      i -= num_[t];
    }
    if (!kNarrow) return {slot, 0, 0};
    return {slot, all_.columns[tier] / 4, all_.tiers[tier].layer.head_dim / 4};
  }

  __device__ int64_t num_slots() const { return all_.num_tiers * all_.partials_of_tier(); }

  __device__ int32_t* arrived() const { return &all_.tiers[0].rows[row_].arrived; }

 private:
  /// Rows that no workers of a tier share have a place of their own behind those that some do.
  __device__ int32_t first_slot(int32_t tier, int32_t num, int32_t first) const {
    const int32_t in_tier = num > 1 ? first : all_.tiers[0].max_partials + row_;
    return static_cast<int32_t>(tier * all_.partials_of_tier()) + in_tier;
  }

  const AttendTiersParams& all_;
  int32_t tier_, row_, num_[kMostFastTiers], first_[kMostFastTiers];
};

template <int kFirstDim, bool kNarrow>
struct PartsOfTiers {
  using Parts = SeveralTiers<kFirstDim, kNarrow>;
  const AttendTiersParams& all;
  int32_t tier;

  __device__ Parts operator()(int32_t row, const schedule::RowFacts&) const {
    return Parts(all, tier, row);
  }
  __device__ int32_t width(int32_t of_tier) const { return kNarrow ? all.width : of_tier; }
  __device__ bool clears_rows() const { return tier == 0; }
  __device__ bool is_empty(int32_t row) const {
    bool is_empty = true;
#pragma unroll 1
    for (int32_t t = 0; t < all.num_tiers; ++t) {
      const schedule::RowFacts& facts = all.tiers[t].rows[row];
      is_empty = is_empty && facts.begin >= facts.end;
    }
    return is_empty;
  }
};

/// An instance for each kind of a set of tiers; a block has the warps of the largest.
template <typename Element, int kHeadDim, int kQueries, int kSet>
struct TiersConfig {
  template <int kKind>
  using Of = AttendConfig<Element,
                          FormatFor<kTierSets[kSet][kKind].format>,
                          kHeadDim / kTierSets[kSet][kKind].divisor,
                          kQueries,
                          true>;
  using PartsOf = PartsOfTiers<kHeadDim, has_narrow_tiers(kSet)>;
  static_assert(kTierKinds == 3);
  static_assert(std::min({Of<0>::kAllWarps, Of<1>::kAllWarps, Of<2>::kAllWarps}) >=
                PartsOf::Parts::kMostWarps);
  static constexpr int kThreads =
      std::max({Of<0>::kThreads, Of<1>::kThreads, Of<2>::kThreads}) + kWarpSize;
  static constexpr size_t kSharedBytes = std::max(
      {sizeof(AttendShared<Of<0>>), sizeof(AttendShared<Of<1>>), sizeof(AttendShared<Of<2>>)});
};

// grid: [num_tiers * num_workers]
template <typename Element, int kHeadDim, int kQueries, int kSet>
__global__ void __launch_bounds__((TiersConfig<Element, kHeadDim, kQueries, kSet>::kThreads), 1)
    attend_tiers_kernel(const __grid_constant__ AttendTiersParams all) {
  extern __shared__ __align__(1024) uint8_t memory[];
  using Configs = TiersConfig<Element, kHeadDim, kQueries, kSet>;
  const int32_t num_workers = all.tiers[0].num_workers;
  const int32_t tier = blockIdx.x / num_workers, worker = blockIdx.x - tier * num_workers;
  const auto run = [&](auto config) {
    using Config = typename decltype(config)::type;
    if (threadIdx.x >= Config::kThreads + kWarpSize) return;
    const typename Configs::PartsOf parts_of = {all, tier};
    attend_block<Config>(all.tiers[tier], worker, num_workers, true, parts_of, memory);
  };
  const int32_t kind = all.kinds[tier];
  if (kind == 2) return run(TypeTag<typename Configs::template Of<2>>{});
  if (kind == 1) return run(TypeTag<typename Configs::template Of<1>>{});
  run(TypeTag<typename Configs::template Of<0>>{});
}

template <typename Element, int kHeadDim, int kQueries, int kSet>
void launch_tiers_instance(const AttendTiersParams& p, cudaStream_t stream) {
  using Configs = TiersConfig<Element, kHeadDim, kQueries, kSet>;
  LaunchShape shape;
  shape.grid = dim3(p.num_tiers * p.tiers[0].num_workers);
  shape.threads = Configs::kThreads;
  shape.shared_bytes = Configs::kSharedBytes;
  shape.early = true;
  launch("attend", attend_tiers_kernel<Element, kHeadDim, kQueries, kSet>, shape, stream, p);
}

/// A launch of the kernel of a set.
template <typename Element, int kHeadDim, int kSet>
void launch_tiers_set(AttendTiersParams p, const int64_t* num_pages, cudaStream_t stream) {
  for (int t = 0; t < p.num_tiers; ++t) {
    const auto encode = [&](auto kind) {
      constexpr TierKind kKind = kTierSets[kSet][kind];
      if (p.kinds[t] != kind) return;
      encode_pages<Element, FormatFor<kKind.format>, kHeadDim / kKind.divisor>(p.tiers[t],
                                                                               num_pages[t]);
    };
    encode(IntTag<0>{});
    encode(IntTag<1>{});
    encode(IntTag<2>{});
  }
  const AttendParams& first = p.tiers[0];
  if (padded_queries(int64_t{first.group.value} * first.num_tokens) == 4) {
    launch_tiers_instance<Element, kHeadDim, 4, kSet>(p, stream);
  } else {
    launch_tiers_instance<Element, kHeadDim, 8, kSet>(p, stream);
  }
}

template <typename Element, int kHeadDim>
void launch_attend_tiers(const AttendTiersParams& params,
                         const int64_t* num_pages,
                         cudaStream_t stream) {
  static_assert(kNumTierSets == 3);
  if (params.set == 0) return launch_tiers_set<Element, kHeadDim, 0>(params, num_pages, stream);
  if (params.set == 1) return launch_tiers_set<Element, kHeadDim, 1>(params, num_pages, stream);
  launch_tiers_set<Element, kHeadDim, 2>(params, num_pages, stream);
}

}  // namespace adakv
