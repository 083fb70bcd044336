// The ten verbs for C. Nothing is checked or computed here: that is in cpp/ops and behind it.
#include <string>
#include <type_traits>
#include <vector>

#include "capi/convert.h"
#include "ops/members.h"

namespace adakv::capi {
namespace {

static_assert(static_cast<int>(Reduce::kSum) == ADAKV_SUM);
static_assert(static_cast<int>(Order::kPoolFirst) == ADAKV_POOL_FIRST);
static_assert(static_cast<int>(Pool::kNone) == ADAKV_POOL_NONE);
static_assert(static_cast<int>(Safeguard::kNone) == ADAKV_NO_SAFEGUARD);
static_assert(static_cast<int>(Norm::kL2Gram) == ADAKV_L2_GRAM);
static_assert(static_cast<int>(Accumulate::kLast) == ADAKV_KEEP_LAST);
static_assert(static_cast<int>(PageFormat::kInt4) == ADAKV_INT4_PAGES);
static_assert(static_cast<int>(PageFormat::kInt2) == ADAKV_INT2_PAGES);

template <typename Args>
using CArgsOf = typename MembersOf<Args>::C;

// What C gives for a member becomes the member, whatever its type.
void take(const char* name, const AdakvTensor* given, TensorView& member) {
  member = view_of(name, given);
}

void take(const char*, const AdakvLayer& given, LayerView& member) {
  for_each_member<LayerView>([&](const auto& m) { take(m.name, given.*m.c, member.*m.cpp); });
}

void take(const char* name, const AdakvTiers& given, std::vector<Tier>& member);

template <typename Given, typename T>
void take(const char* name, const Given& given, T& member) {
  if constexpr (std::is_enum_v<T>) {
    member = enumerator<T>(name, given);
  } else {
    member = given;
  }
}

void take(const char* name, const AdakvTiers& given, std::vector<Tier>& member) {
  ADAKV_CHECK(given.count >= 0 && given.count <= kMostOthers, name, " must be 0 to ", kMostOthers,
              " tiers, got ", given.count);
  ADAKV_CHECK(given.count == 0 || given.tiers != nullptr, name, " must not be NULL");
  for (int32_t i = 0; i < given.count; ++i) {
    Tier& tier = member.emplace_back();
    for_each_member<Tier>([&](const auto& m) { take(m.name, given.tiers[i].*m.c, tier.*m.cpp); });
  }
}

template <typename Args>
Args arguments(const CArgsOf<Args>& c) {
  Args args;
  for_each_member<Args>([&](const auto& m) { take(m.name, c.*m.c, args.*m.cpp); });
  if constexpr (kHasWorkspace<Args>) {
    if (c.workspace != nullptr) {
      const auto ints = static_cast<int64_t>(c.workspace_bytes / sizeof(int32_t));
      args.workspace = TensorView(c.workspace, {ints}, DType::kInt32, device_of_tensors(args));
    }
  }
  args.stream = c.stream;
  return args;
}

template <typename Args>
CArgsOf<Args> defaults() {
  CArgsOf<Args> c = {};
  const Args args;
  for_each_member<Args>([&](const auto& m) {
    using Given = std::remove_reference_t<decltype(c.*m.c)>;
    if constexpr (std::is_arithmetic_v<Given> || std::is_enum_v<Given>) {
      c.*m.c = static_cast<Given>(args.*m.cpp);
    }
  });
  return c;
}

template <typename Args>
AdakvStatus run(void (*verb)(const Args&), const CArgsOf<Args>* args) noexcept {
  return guarded([&] { verb(arguments<Args>(given("args", args))); });
}

template <typename Args>
AdakvStatus workspace(const CArgsOf<Args>* args, size_t* bytes) noexcept {
  return guarded(
      [&] { given("bytes", bytes) = workspace_bytes(arguments<Args>(given("args", args))); });
}

}  // namespace
}  // namespace adakv::capi

using adakv::capi::defaults;
using adakv::capi::given;
using adakv::capi::guarded;
using adakv::capi::run;
using adakv::capi::workspace;

AdakvScoreArgs adakv_score_defaults(void) {
  return defaults<adakv::ScoreArgs>();
}
AdakvValueNormArgs adakv_value_norm_defaults(void) {
  return defaults<adakv::ValueNormArgs>();
}
AdakvAllocateArgs adakv_allocate_defaults(void) {
  return defaults<adakv::AllocateArgs>();
}
AdakvSelectArgs adakv_select_defaults(void) {
  return defaults<adakv::SelectArgs>();
}
AdakvCompactArgs adakv_compact_defaults(void) {
  return defaults<adakv::CompactArgs>();
}
AdakvAppendArgs adakv_append_defaults(void) {
  return defaults<adakv::AppendArgs>();
}
AdakvForkArgs adakv_fork_defaults(void) {
  return defaults<adakv::ForkArgs>();
}
AdakvPlanArgs adakv_plan_defaults(void) {
  return defaults<adakv::PlanArgs>();
}
AdakvAttendArgs adakv_attend_defaults(void) {
  return defaults<adakv::AttendArgs>();
}
AdakvShortlistArgs adakv_shortlist_defaults(void) {
  return defaults<adakv::ShortlistArgs>();
}

AdakvStatus adakv_score(const AdakvScoreArgs* args) {
  return run(&adakv::score, args);
}
AdakvStatus adakv_value_norm(const AdakvValueNormArgs* args) {
  return run(&adakv::value_norm, args);
}
AdakvStatus adakv_allocate(const AdakvAllocateArgs* args) {
  return run(&adakv::allocate, args);
}
AdakvStatus adakv_select(const AdakvSelectArgs* args) {
  return run(&adakv::select, args);
}
AdakvStatus adakv_compact(const AdakvCompactArgs* args) {
  return run(&adakv::compact, args);
}
AdakvStatus adakv_append(const AdakvAppendArgs* args) {
  return run(&adakv::append, args);
}
AdakvStatus adakv_fork(const AdakvForkArgs* args) {
  return run(&adakv::fork, args);
}
AdakvStatus adakv_plan(const AdakvPlanArgs* args) {
  return run(&adakv::plan, args);
}
AdakvStatus adakv_attend(const AdakvAttendArgs* args) {
  return run(&adakv::attend, args);
}
AdakvStatus adakv_shortlist(const AdakvShortlistArgs* args) {
  return run(&adakv::shortlist, args);
}

AdakvStatus adakv_score_workspace(const AdakvScoreArgs* args, size_t* bytes) {
  return workspace<adakv::ScoreArgs>(args, bytes);
}
AdakvStatus adakv_value_norm_workspace(const AdakvValueNormArgs* args, size_t* bytes) {
  return workspace<adakv::ValueNormArgs>(args, bytes);
}
AdakvStatus adakv_allocate_workspace(const AdakvAllocateArgs* args, size_t* bytes) {
  return workspace<adakv::AllocateArgs>(args, bytes);
}
AdakvStatus adakv_select_workspace(const AdakvSelectArgs* args, size_t* bytes) {
  return workspace<adakv::SelectArgs>(args, bytes);
}
AdakvStatus adakv_compact_workspace(const AdakvCompactArgs* args, size_t* bytes) {
  return workspace<adakv::CompactArgs>(args, bytes);
}
AdakvStatus adakv_attend_workspace(const AdakvAttendArgs* args, size_t* bytes) {
  return workspace<adakv::AttendArgs>(args, bytes);
}
AdakvStatus adakv_shortlist_workspace(const AdakvShortlistArgs* args, size_t* bytes) {
  return workspace<adakv::ShortlistArgs>(args, bytes);
}

int64_t adakv_schedule_size(int64_t num_rows, int32_t num_workers) {
  int64_t size = -1;
  guarded([&] { size = adakv::schedule_size(num_rows, num_workers); });
  return size;
}

AdakvStatus adakv_default_num_workers(AdakvDevice device, int32_t* num_workers) {
  return guarded([&] {
    given("num_workers", num_workers) =
        adakv::default_num_workers(adakv::capi::device_of("device", device));
  });
}

AdakvStatus adakv_set_num_threads(int32_t num_threads) {
  return guarded([&] { adakv::set_num_threads(num_threads); });
}

AdakvStatus adakv_cuda_available(void) {
  return guarded([] {
    std::string reason;
    if (!adakv::cuda_available(&reason)) throw adakv::Error(reason);
  });
}
