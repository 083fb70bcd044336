// The members of each verb's arguments, in the order of their struct: what the bindings for Python and
// the C face go through, so that an option which stands here is known to both. Scratch memory and the
// stream are not among them: each of the two finds those by itself.
#pragma once

#include <array>
#include <tuple>
#include <type_traits>

#include "adakv/c.h"
#include "adakv/ops.h"

namespace adakv {

/// What an enumeration's values are called, in their order.
template <typename Enum>
inline constexpr std::array<const char*, 0> kWords = {};
template <>
inline constexpr std::array<const char*, 3> kWords<Reduce> = {"mean", "max", "sum"};
template <>
inline constexpr std::array<const char*, 3> kWords<Pool> = {"max", "avg", "none"};
template <>
inline constexpr std::array<const char*, 2> kWords<Order> = {"group_first", "pool_first"};
template <>
inline constexpr std::array<const char*, 4> kWords<Safeguard> = {"blend", "hard_floor",
                                                                 "official_round", "none"};
template <>
inline constexpr std::array<const char*, 2> kWords<Norm> = {"l1", "l2_gram"};
template <>
inline constexpr std::array<const char*, 3> kWords<Accumulate> = {"sum", "max", "last"};
template <>
inline constexpr std::array<const char*, 5> kWords<PageFormat> = {"auto", "int8", "fp8", "int4",
                                                                  "int2"};

/// A member's name and place, in the struct of C++ and in that of C.
template <typename CppMember, typename CMember>
struct Member {
  const char* name;
  CppMember cpp;
  CMember c;
};

/// What C calls a struct, and a std::tuple of its members.
template <typename Args>
struct MembersOf;

#define ADAKV_MEMBER(name)                           \
  Member<decltype(&Cpp::name), decltype(&C::name)> { \
    #name, &Cpp::name, &C::name                      \
  }

template <>
struct MembersOf<LayerView> {
  using Cpp = LayerView;
  using C = AdakvLayer;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(pages),       ADAKV_MEMBER(page_positions), ADAKV_MEMBER(block_table),
      ADAKV_MEMBER(lengths),     ADAKV_MEMBER(seen),           ADAKV_MEMBER(fresh_pages),
      ADAKV_MEMBER(key_scales),  ADAKV_MEMBER(value_scales),   ADAKV_MEMBER(tails),
      ADAKV_MEMBER(page_biases), ADAKV_MEMBER(value_pages),
  };
};

template <>
struct MembersOf<ScoreArgs> {
  using Cpp = ScoreArgs;
  using C = AdakvScoreArgs;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(queries),      ADAKV_MEMBER(keys),        ADAKV_MEMBER(layer),
      ADAKV_MEMBER(seq_lens),     ADAKV_MEMBER(sink_logits), ADAKV_MEMBER(lse),
      ADAKV_MEMBER(scale),        ADAKV_MEMBER(softcap),     ADAKV_MEMBER(window_reduce),
      ADAKV_MEMBER(group_reduce), ADAKV_MEMBER(order),       ADAKV_MEMBER(pool),
      ADAKV_MEMBER(pool_width),   ADAKV_MEMBER(window),      ADAKV_MEMBER(stride),
      ADAKV_MEMBER(distance),     ADAKV_MEMBER(scores),
  };
};

template <>
struct MembersOf<ValueNormArgs> {
  using Cpp = ValueNormArgs;
  using C = AdakvValueNormArgs;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(values), ADAKV_MEMBER(w_o),   ADAKV_MEMBER(seq_lens),
      ADAKV_MEMBER(norm),   ADAKV_MEMBER(norms),
  };
};

template <>
struct MembersOf<AllocateArgs> {
  using Cpp = AllocateArgs;
  using C = AdakvAllocateArgs;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(scores), ADAKV_MEMBER(seq_lens),  ADAKV_MEMBER(budget),  ADAKV_MEMBER(window),
      ADAKV_MEMBER(floor),  ADAKV_MEMBER(safeguard), ADAKV_MEMBER(budgets),
  };
};

template <>
struct MembersOf<SelectArgs> {
  using Cpp = SelectArgs;
  using C = AdakvSelectArgs;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(scores),   ADAKV_MEMBER(budgets),   ADAKV_MEMBER(norms),
      ADAKV_MEMBER(seq_lens), ADAKV_MEMBER(window),    ADAKV_MEMBER(first),
      ADAKV_MEMBER(eps),      ADAKV_MEMBER(positions), ADAKV_MEMBER(indptr),
  };
};

template <>
struct MembersOf<CompactArgs> {
  using Cpp = CompactArgs;
  using C = AdakvCompactArgs;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(keys),     ADAKV_MEMBER(values),      ADAKV_MEMBER(positions),
      ADAKV_MEMBER(indptr),   ADAKV_MEMBER(places),      ADAKV_MEMBER(seq_lens),
      ADAKV_MEMBER(page_ids), ADAKV_MEMBER(page_indptr), ADAKV_MEMBER(biases),
      ADAKV_MEMBER(layer),
  };
};

template <>
struct MembersOf<AppendArgs> {
  using Cpp = AppendArgs;
  using C = AdakvAppendArgs;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(keys),
      ADAKV_MEMBER(values),
      ADAKV_MEMBER(num_new),
      ADAKV_MEMBER(layer),
  };
};

template <>
struct MembersOf<ForkArgs> {
  using Cpp = ForkArgs;
  using C = AdakvForkArgs;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(source_table), ADAKV_MEMBER(source_lengths), ADAKV_MEMBER(source_seen),
      ADAKV_MEMBER(source_tails), ADAKV_MEMBER(sources),        ADAKV_MEMBER(stretch),
      ADAKV_MEMBER(back),         ADAKV_MEMBER(page_ids),       ADAKV_MEMBER(page_indptr),
      ADAKV_MEMBER(whole),        ADAKV_MEMBER(layer),
  };
};

template <>
struct MembersOf<PlanArgs> {
  using Cpp = PlanArgs;
  using C = AdakvPlanArgs;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(lengths),     ADAKV_MEMBER(block_table), ADAKV_MEMBER(fresh_pages),
      ADAKV_MEMBER(num_new),     ADAKV_MEMBER(new_tokens),  ADAKV_MEMBER(page_size),
      ADAKV_MEMBER(num_workers), ADAKV_MEMBER(share),       ADAKV_MEMBER(least),
      ADAKV_MEMBER(newest),      ADAKV_MEMBER(schedule),
  };
};

template <>
struct MembersOf<ShortlistArgs> {
  using Cpp = ShortlistArgs;
  using C = AdakvShortlistArgs;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(queries),     ADAKV_MEMBER(bounds),    ADAKV_MEMBER(lengths),
      ADAKV_MEMBER(block_table), ADAKV_MEMBER(num_new),   ADAKV_MEMBER(scale),
      ADAKV_MEMBER(softcap),     ADAKV_MEMBER(page_size), ADAKV_MEMBER(share),
      ADAKV_MEMBER(mass),        ADAKV_MEMBER(least),     ADAKV_MEMBER(newest),
      ADAKV_MEMBER(prefetch),    ADAKV_MEMBER(listed),    ADAKV_MEMBER(listed_lengths),
  };
};

template <>
struct MembersOf<Tier> {
  using Cpp = Tier;
  using C = AdakvTier;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(layer),
      ADAKV_MEMBER(schedule),
      ADAKV_MEMBER(queries),
      ADAKV_MEMBER(column),
  };
};

template <>
struct MembersOf<AttendArgs> {
  using Cpp = AttendArgs;
  using C = AdakvAttendArgs;
  static constexpr std::tuple kAll = {
      ADAKV_MEMBER(queries),     ADAKV_MEMBER(layer),        ADAKV_MEMBER(schedule),
      ADAKV_MEMBER(keys),        ADAKV_MEMBER(values),       ADAKV_MEMBER(num_new),
      ADAKV_MEMBER(sink_logits), ADAKV_MEMBER(others),       ADAKV_MEMBER(scale),
      ADAKV_MEMBER(softcap),     ADAKV_MEMBER(num_workers),  ADAKV_MEMBER(prefetch),
      ADAKV_MEMBER(accumulate),  ADAKV_MEMBER(group_reduce), ADAKV_MEMBER(decay),
      ADAKV_MEMBER(threshold),   ADAKV_MEMBER(out),          ADAKV_MEMBER(lse),
      ADAKV_MEMBER(accumulated),
  };
};

#undef ADAKV_MEMBER

/// Calls `visit` with every member of a struct.
template <typename Args, typename Visit>
void for_each_member(const Visit& visit) {
  std::apply([&](const auto&... members) { (visit(members), ...); }, MembersOf<Args>::kAll);
}

/// Whether a verb needs scratch memory.
template <typename Args, typename = void>
inline constexpr bool kHasWorkspace = false;
template <typename Args>
inline constexpr bool kHasWorkspace<Args, std::void_t<decltype(Args::workspace)>> = true;

/// The device that a verb's tensors should be on: that of the first one.
template <typename Args>
Device device_of_tensors(const Args& args) {
  return (args.*std::get<0>(MembersOf<Args>::kAll).cpp).device;
}
template <>
inline Device device_of_tensors(const CompactArgs& args) {  // its keys may be left out
  return args.positions.device;
}

}  // namespace adakv
