// The fast attend kernel over rows whose entries lie in several tiers, in one launch: each block does
// what a worker of one tier does, by the code of its format, and the block that is done with a row last
// adds up the partial results of all tiers.
#pragma once

#include "attend/attend.cuh"

namespace adakv {

/// The partial results of a row in all tiers: tier by tier, in the order of the workers.
class SeveralTiers {
 public:
  static constexpr bool kGoesOn = false;
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

  __device__ int32_t slot(int32_t i) const {
    int32_t slot = 0;
#pragma unroll
    for (int t = 0; t < kMostFastTiers; ++t) {
      if (i >= 0 && i < num_[t]) slot = first_slot(t, num_[t], first_[t]) + i;
      i -= num_[t];
    }
    return slot;
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

struct PartsOfTiers {
  using Parts = SeveralTiers;
  const AttendTiersParams& all;
  int32_t tier;

  __device__ SeveralTiers operator()(int32_t row, const schedule::RowFacts&) const {
    return SeveralTiers(all, tier, row);
  }
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

/// An instance for each format; a block has the warps of the largest.
template <typename Element, int kHeadDim, int kQueries>
struct TiersConfig {
  using OfPlain = AttendConfig<Element, Plain, kHeadDim, kQueries, true>;
  using OfInt8 = AttendConfig<Element, Int8, kHeadDim, kQueries, true>;
  using OfInt4 = AttendConfig<Element, Int4, kHeadDim, kQueries, true>;
  static_assert(std::min({OfPlain::kAllWarps, OfInt8::kAllWarps, OfInt4::kAllWarps}) >=
                SeveralTiers::kMostWarps);
  static constexpr int kThreads =
      std::max({OfPlain::kThreads, OfInt8::kThreads, OfInt4::kThreads}) + kWarpSize;
  static constexpr size_t kSharedBytes = std::max(
      {sizeof(AttendShared<OfPlain>), sizeof(AttendShared<OfInt8>), sizeof(AttendShared<OfInt4>)});
};

// grid: [num_tiers * num_workers]
template <typename Element, int kHeadDim, int kQueries>
__global__ void __launch_bounds__((TiersConfig<Element, kHeadDim, kQueries>::kThreads), 1)
    attend_tiers_kernel(const __grid_constant__ AttendTiersParams all) {
  extern __shared__ __align__(1024) uint8_t memory[];
  using Configs = TiersConfig<Element, kHeadDim, kQueries>;
  const int32_t num_workers = all.tiers[0].num_workers;
  const int32_t tier = blockIdx.x / num_workers, worker = blockIdx.x - tier * num_workers;
  const auto run = [&](auto config) {
    using Config = typename decltype(config)::type;
    if (threadIdx.x >= Config::kThreads + kWarpSize) return;
    const PartsOfTiers parts_of = {all, tier};
    attend_block<Config>(all.tiers[tier], worker, num_workers, true, parts_of, memory);
  };
  const PageFormat format = all.formats[tier];
  if (format == PageFormat::kInt4) return run(TypeTag<typename Configs::OfInt4>{});
  if (format == PageFormat::kInt8) return run(TypeTag<typename Configs::OfInt8>{});
  run(TypeTag<typename Configs::OfPlain>{});
}

template <typename Element, int kHeadDim, int kQueries>
void launch_tiers_instance(const AttendTiersParams& p, cudaStream_t stream) {
  using Configs = TiersConfig<Element, kHeadDim, kQueries>;
  LaunchShape shape;
  shape.grid = dim3(p.num_tiers * p.tiers[0].num_workers);
  shape.threads = Configs::kThreads;
  shape.shared_bytes = Configs::kSharedBytes;
  shape.early = true;
  launch("attend", attend_tiers_kernel<Element, kHeadDim, kQueries>, shape, stream, p);
}

template <typename Element, int kHeadDim>
void launch_attend_tiers(const AttendTiersParams& params,
                         const int64_t* num_pages,
                         cudaStream_t stream) {
  AttendTiersParams p = params;
  for (int t = 0; t < p.num_tiers; ++t) {
    dispatch_format(p.formats[t], [&](auto format) {
      using Format = typename decltype(format)::type;
      if constexpr (has_tiers_kernel(Format::kFormat, kHeadDim, 1)) {
        encode_pages<Element, Format, kHeadDim>(p.tiers[t], num_pages[t]);
      }
    });
  }
  const AttendParams& first = p.tiers[0];
  if (padded_queries(int64_t{first.group.value} * first.num_tokens) == 4) {
    launch_tiers_instance<Element, kHeadDim, 4>(p, stream);
  } else {
    launch_tiers_instance<Element, kHeadDim, 8>(p, stream);
  }
}

}  // namespace adakv
