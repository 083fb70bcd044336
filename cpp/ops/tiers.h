// The tiers of a call of attend, each as a call over that tier alone.
#pragma once

#include <cstddef>
#include <type_traits>
#include <vector>

#include "adakv/ops.h"
#include "ops/members.h"
#include "ops/scale.h"

namespace adakv {

inline size_t num_tiers(const AttendArgs& args) {
  return 1 + args.others.size();
}

/// First column of out for the values of a tier.
inline int tier_column(const AttendArgs& args, size_t tier) {
  return tier == 0 ? 0 : args.others[tier - 1].column;
}

/// A call that attends to one tier, the first one included, without others. Its out is that of all
/// tiers.
inline AttendArgs tier_args(const AttendArgs& args, size_t tier) {
  AttendArgs of_tier;
  for_each_member<AttendArgs>([&](const auto& m) {
    using T = std::decay_t<decltype(args.*m.cpp)>;
    if constexpr (!std::is_same_v<T, std::vector<Tier>>) of_tier.*m.cpp = args.*m.cpp;
  });
  of_tier.workspace = args.workspace;
  of_tier.stream = args.stream;
  of_tier.scale = scale_of(args);
  if (tier == 0) return of_tier;
  const Tier& other = args.others[tier - 1];
  of_tier.layer = other.layer;
  of_tier.schedule = other.schedule;
  if (other.queries) of_tier.queries = other.queries;
  of_tier.keys = of_tier.values = TensorView();
  return of_tier;
}

/// Those of all tiers.
inline std::vector<AttendArgs> tiers_of(const AttendArgs& args) {
  std::vector<AttendArgs> tiers;
  tiers.reserve(num_tiers(args));
  for (size_t i = 0; i < num_tiers(args); ++i) tiers.push_back(tier_args(args, i));
  return tiers;
}

}  // namespace adakv
