// The eight verbs for C. Nothing is checked or computed here: that is in cpp/ops and behind it.
#include <cstring>
#include <string>

#include "capi/convert.h"

namespace adakv::capi {
namespace {

// An enumeration of C, whose values are those of C++ in the same order; `last` is its highest. C may
// pass any integer, which C++ must not read as an enumerator before it is checked.
template <typename Enum, typename CEnum>
Enum choice(const char* name, const CEnum& given, CEnum last) {
  int value;
  static_assert(sizeof(value) == sizeof(given));
  std::memcpy(&value, &given, sizeof(value));
  ADAKV_CHECK(value >= 0 && value <= static_cast<int>(last), name, " must be 0 to ",
              static_cast<int>(last), ", got ", value);
  return static_cast<Enum>(value);
}
static_assert(static_cast<int>(Reduce::kSum) == ADAKV_SUM);
static_assert(static_cast<int>(Order::kPoolFirst) == ADAKV_POOL_FIRST);
static_assert(static_cast<int>(Pool::kNone) == ADAKV_POOL_NONE);
static_assert(static_cast<int>(Safeguard::kNone) == ADAKV_NO_SAFEGUARD);
static_assert(static_cast<int>(Norm::kL2Gram) == ADAKV_L2_GRAM);

LayerView layer_of(const AdakvLayer& layer) {
  LayerView view;
  view.pages = view_of("pages", layer.pages);
  view.page_positions = view_of("page_positions", layer.page_positions);
  view.block_table = view_of("block_table", layer.block_table);
  view.lengths = view_of("lengths", layer.lengths);
  view.seen = view_of("seen", layer.seen);
  view.fresh_pages = view_of("fresh_pages", layer.fresh_pages);
  return view;
}

// Scratch memory lies where the tensors do.
template <typename Args>
TensorView workspace_of(const Args& args, Device device) {
  if (args.workspace == nullptr) return {};
  return TensorView(args.workspace, {static_cast<int64_t>(args.workspace_bytes / sizeof(int32_t))},
                    DType::kInt32, device);
}

ScoreArgs arguments(const AdakvScoreArgs& c) {
  ScoreArgs args;
  args.queries = view_of("queries", c.queries);
  args.keys = view_of("keys", c.keys);
  args.seq_lens = view_of("seq_lens", c.seq_lens);
  args.sink_logits = view_of("sink_logits", c.sink_logits);
  args.lse = view_of("lse", c.lse);
  args.scale = c.scale;
  args.softcap = c.softcap;
  args.window_reduce = choice<Reduce>("window_reduce", c.window_reduce, ADAKV_SUM);
  args.group_reduce = choice<Reduce>("group_reduce", c.group_reduce, ADAKV_SUM);
  args.order = choice<Order>("order", c.order, ADAKV_POOL_FIRST);
  args.pool = choice<Pool>("pool", c.pool, ADAKV_POOL_NONE);
  args.pool_width = c.pool_width;
  args.window = c.window;
  args.stride = c.stride;
  args.distance = c.distance;
  args.scores = view_of("scores", c.scores);
  args.workspace = workspace_of(c, args.keys.device);
  args.stream = c.stream;
  return args;
}

ValueNormArgs arguments(const AdakvValueNormArgs& c) {
  ValueNormArgs args;
  args.values = view_of("values", c.values);
  args.w_o = view_of("w_o", c.w_o);
  args.seq_lens = view_of("seq_lens", c.seq_lens);
  args.norm = choice<Norm>("norm", c.norm, ADAKV_L2_GRAM);
  args.norms = view_of("norms", c.norms);
  args.workspace = workspace_of(c, args.values.device);
  args.stream = c.stream;
  return args;
}

AllocateArgs arguments(const AdakvAllocateArgs& c) {
  AllocateArgs args;
  args.scores = view_of("scores", c.scores);
  args.seq_lens = view_of("seq_lens", c.seq_lens);
  args.budget = c.budget;
  args.window = c.window;
  args.floor = c.floor;
  args.safeguard = choice<Safeguard>("safeguard", c.safeguard, ADAKV_NO_SAFEGUARD);
  args.budgets = view_of("budgets", c.budgets);
  args.workspace = workspace_of(c, args.scores.device);
  args.stream = c.stream;
  return args;
}

SelectArgs arguments(const AdakvSelectArgs& c) {
  SelectArgs args;
  args.scores = view_of("scores", c.scores);
  args.budgets = view_of("budgets", c.budgets);
  args.norms = view_of("norms", c.norms);
  args.seq_lens = view_of("seq_lens", c.seq_lens);
  args.window = c.window;
  args.first = c.first;
  args.eps = c.eps;
  args.positions = view_of("positions", c.positions);
  args.indptr = view_of("indptr", c.indptr);
  args.workspace = workspace_of(c, args.scores.device);
  args.stream = c.stream;
  return args;
}

CompactArgs arguments(const AdakvCompactArgs& c) {
  CompactArgs args;
  args.keys = view_of("keys", c.keys);
  args.values = view_of("values", c.values);
  args.positions = view_of("positions", c.positions);
  args.indptr = view_of("indptr", c.indptr);
  args.seq_lens = view_of("seq_lens", c.seq_lens);
  args.page_ids = view_of("page_ids", c.page_ids);
  args.page_indptr = view_of("page_indptr", c.page_indptr);
  args.layer = layer_of(c.layer);
  args.workspace = workspace_of(c, args.keys.device);
  args.stream = c.stream;
  return args;
}

AppendArgs arguments(const AdakvAppendArgs& c) {
  AppendArgs args;
  args.keys = view_of("keys", c.keys);
  args.values = view_of("values", c.values);
  args.num_new = view_of("num_new", c.num_new);
  args.layer = layer_of(c.layer);
  args.stream = c.stream;
  return args;
}

PlanArgs arguments(const AdakvPlanArgs& c) {
  PlanArgs args;
  args.lengths = view_of("lengths", c.lengths);
  args.block_table = view_of("block_table", c.block_table);
  args.fresh_pages = view_of("fresh_pages", c.fresh_pages);
  args.num_new = view_of("num_new", c.num_new);
  args.new_tokens = c.new_tokens;
  args.page_size = c.page_size;
  args.schedule = view_of("schedule", c.schedule);
  args.num_workers = c.num_workers;
  args.stream = c.stream;
  return args;
}

AttendArgs arguments(const AdakvAttendArgs& c) {
  AttendArgs args;
  args.queries = view_of("queries", c.queries);
  args.layer = layer_of(c.layer);
  args.schedule = view_of("schedule", c.schedule);
  args.keys = view_of("keys", c.keys);
  args.values = view_of("values", c.values);
  args.num_new = view_of("num_new", c.num_new);
  args.sink_logits = view_of("sink_logits", c.sink_logits);
  args.scale = c.scale;
  args.softcap = c.softcap;
  args.num_workers = c.num_workers;
  args.prefetch = c.prefetch != 0;
  args.out = view_of("out", c.out);
  args.lse = view_of("lse", c.lse);
  args.workspace = workspace_of(c, args.queries.device);
  args.stream = c.stream;
  return args;
}

template <typename Args, typename CArgs>
AdakvStatus run(void (*verb)(const Args&), const CArgs* args) noexcept {
  return guarded([&] { verb(arguments(given("args", args))); });
}

template <typename CArgs>
AdakvStatus workspace(const CArgs* args, size_t* bytes) noexcept {
  return guarded([&] { given("bytes", bytes) = workspace_bytes(arguments(given("args", args))); });
}

}  // namespace
}  // namespace adakv::capi

using adakv::capi::given;
using adakv::capi::guarded;
using adakv::capi::run;
using adakv::capi::workspace;

AdakvScoreArgs adakv_score_defaults(void) {
  AdakvScoreArgs args = {};
  const adakv::ScoreArgs defaults;
  args.pool_width = defaults.pool_width;
  args.window = defaults.window;
  args.stride = defaults.stride;
  return args;
}
AdakvValueNormArgs adakv_value_norm_defaults(void) {
  return {};
}
AdakvAllocateArgs adakv_allocate_defaults(void) {
  AdakvAllocateArgs args = {};
  args.floor = adakv::AllocateArgs().floor;
  return args;
}
AdakvSelectArgs adakv_select_defaults(void) {
  AdakvSelectArgs args = {};
  args.first = adakv::SelectArgs().first;
  args.eps = adakv::SelectArgs().eps;
  return args;
}
AdakvCompactArgs adakv_compact_defaults(void) {
  return {};
}
AdakvAppendArgs adakv_append_defaults(void) {
  return {};
}
AdakvPlanArgs adakv_plan_defaults(void) {
  AdakvPlanArgs args = {};
  args.new_tokens = adakv::PlanArgs().new_tokens;
  args.page_size = adakv::PlanArgs().page_size;
  return args;
}
AdakvAttendArgs adakv_attend_defaults(void) {
  return {};
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
AdakvStatus adakv_plan(const AdakvPlanArgs* args) {
  return run(&adakv::plan, args);
}
AdakvStatus adakv_attend(const AdakvAttendArgs* args) {
  return run(&adakv::attend, args);
}

AdakvStatus adakv_score_workspace(const AdakvScoreArgs* args, size_t* bytes) {
  return workspace(args, bytes);
}
AdakvStatus adakv_value_norm_workspace(const AdakvValueNormArgs* args, size_t* bytes) {
  return workspace(args, bytes);
}
AdakvStatus adakv_allocate_workspace(const AdakvAllocateArgs* args, size_t* bytes) {
  return workspace(args, bytes);
}
AdakvStatus adakv_select_workspace(const AdakvSelectArgs* args, size_t* bytes) {
  return workspace(args, bytes);
}
AdakvStatus adakv_compact_workspace(const AdakvCompactArgs* args, size_t* bytes) {
  return workspace(args, bytes);
}
AdakvStatus adakv_attend_workspace(const AdakvAttendArgs* args, size_t* bytes) {
  return workspace(args, bytes);
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
