// One function per verb: tensors to views, names to enums, scratch memory from torch's allocator,
// the current stream. Nothing else: checks are in cpp/ops/ops.cc, defaults in python/adakv/ops.py.
#include <pybind11/pybind11.h>

#include <cstring>
#include <initializer_list>
#include <utility>

#include "adakv/error.h"
#include "adakv/ops.h"
#include "tensor_view.h"

namespace adakv {

// A namespace of their own, so that the binding of a verb may bear its name.
namespace bindings {
namespace {

using py::handle;

template <typename Enum>
using Choices = std::initializer_list<std::pair<const char*, Enum>>;

template <typename Enum>
Enum choice(const char* name, const char* text, Choices<Enum> choices) {
  std::string known;
  for (const auto& [word, value] : choices) {
    if (std::strcmp(word, text) == 0) return value;
    known += (known.empty() ? "'" : ", '") + std::string(word) + "'";
  }
  throw InvalidArgument(detail::concat(name, " must be one of ", known, ", got '", text, "'"));
}

Reduce reduce(const char* name, const char* text) {
  return choice<Reduce>(name, text,
                        {{"mean", Reduce::kMean}, {"max", Reduce::kMax}, {"sum", Reduce::kSum}});
}

LayerView layer_of(handle pages,
                   handle page_positions,
                   handle block_table,
                   handle lengths,
                   handle seen,
                   handle fresh_pages) {
  LayerView layer;
  layer.pages = view_of("pages", pages);
  layer.page_positions = view_of("page_positions", page_positions);
  layer.block_table = view_of("block_table", block_table);
  layer.lengths = view_of("lengths", lengths);
  layer.seen = view_of("seen", seen);
  layer.fresh_pages = view_of("fresh_pages", fresh_pages);
  return layer;
}

// The CPU backend uses as many threads as torch does.
void follow_torch_threads(Device device) {
  if (device.type != DeviceType::kCpu) return;
  static const py::object* get_num_threads =
      new py::object(py::module_::import("torch").attr("get_num_threads"));
  set_num_threads((*get_num_threads)().cast<int>());
}

template <typename Args>
void run(void (*verb)(const Args&), Args& args, Device device) {
  follow_torch_threads(device);
  args.stream = current_stream(device);
  const py::gil_scoped_release release;
  verb(args);
}

// The same for verbs that need scratch memory. If the arguments are so wrong that its size can't be
// told, the verb says so.
template <typename Args>
void run_with_workspace(void (*verb)(const Args&), Args& args, Device device) {
  const Workspace workspace(workspace_bytes(args), device);
  args.workspace = workspace.view();
  run(verb, args, device);
}

void score(handle queries,
           handle keys,
           handle seq_lens,
           handle sink_logits,
           handle lse,
           float scale,
           float softcap,
           const char* window_reduce,
           const char* group_reduce,
           const char* order,
           const char* pool,
           int pool_width,
           int window,
           int stride,
           int distance,
           handle scores) {
  ScoreArgs args;
  args.queries = view_of("queries", queries);
  args.keys = view_of("keys", keys);
  args.seq_lens = view_of("seq_lens", seq_lens);
  args.sink_logits = view_of("sink_logits", sink_logits);
  args.lse = view_of("lse", lse);
  args.scale = scale;
  args.softcap = softcap;
  args.window_reduce = reduce("window_reduce", window_reduce);
  args.group_reduce = reduce("group_reduce", group_reduce);
  args.order = choice<Order>(
      "order", order, {{"group_first", Order::kGroupFirst}, {"pool_first", Order::kPoolFirst}});
  args.pool =
      choice<Pool>("pool", pool, {{"max", Pool::kMax}, {"avg", Pool::kAvg}, {"none", Pool::kNone}});
  args.pool_width = pool_width;
  args.window = window;
  args.stride = stride;
  args.distance = distance;
  args.scores = view_of("scores", scores);
  run_with_workspace(&adakv::score, args, args.keys.device);
}

void value_norm(handle values, handle w_o, handle seq_lens, const char* norm, handle norms) {
  ValueNormArgs args;
  args.values = view_of("values", values);
  args.w_o = view_of("w_o", w_o);
  args.seq_lens = view_of("seq_lens", seq_lens);
  args.norm = choice<Norm>("norm", norm, {{"l1", Norm::kL1}, {"l2_gram", Norm::kL2Gram}});
  args.norms = view_of("norms", norms);
  run_with_workspace(&adakv::value_norm, args, args.values.device);
}

void allocate(handle scores,
              int budget,
              int window,
              handle seq_lens,
              double floor,
              const char* safeguard,
              handle budgets) {
  AllocateArgs args;
  args.scores = view_of("scores", scores);
  args.budget = budget;
  args.window = window;
  args.seq_lens = view_of("seq_lens", seq_lens);
  args.floor = floor;
  args.safeguard = choice<Safeguard>("safeguard", safeguard,
                                     {{"blend", Safeguard::kBlend},
                                      {"hard_floor", Safeguard::kHardFloor},
                                      {"official_round", Safeguard::kOfficialRound},
                                      {"none", Safeguard::kNone}});
  args.budgets = view_of("budgets", budgets);
  run_with_workspace(&adakv::allocate, args, args.scores.device);
}

void select(handle scores,
            handle budgets,
            int window,
            handle seq_lens,
            handle norms,
            double first,
            float eps,
            handle positions,
            handle indptr) {
  SelectArgs args;
  args.scores = view_of("scores", scores);
  args.budgets = view_of("budgets", budgets);
  args.window = window;
  args.seq_lens = view_of("seq_lens", seq_lens);
  args.norms = view_of("norms", norms);
  args.first = first;
  args.eps = eps;
  args.positions = view_of("positions", positions);
  args.indptr = view_of("indptr", indptr);
  run_with_workspace(&adakv::select, args, args.scores.device);
}

void compact(handle keys,
             handle values,
             handle positions,
             handle indptr,
             handle pages,
             handle page_positions,
             handle block_table,
             handle lengths,
             handle seen,
             handle fresh_pages,
             handle page_ids,
             handle page_indptr,
             handle seq_lens) {
  CompactArgs args;
  args.keys = view_of("keys", keys);
  args.values = view_of("values", values);
  args.positions = view_of("positions", positions);
  args.indptr = view_of("indptr", indptr);
  args.layer = layer_of(pages, page_positions, block_table, lengths, seen, fresh_pages);
  args.page_ids = view_of("page_ids", page_ids);
  args.page_indptr = view_of("page_indptr", page_indptr);
  args.seq_lens = view_of("seq_lens", seq_lens);
  run_with_workspace(&adakv::compact, args, args.keys.device);
}

void append(handle keys,
            handle values,
            handle pages,
            handle page_positions,
            handle block_table,
            handle lengths,
            handle seen,
            handle fresh_pages,
            handle num_new) {
  AppendArgs args;
  args.keys = view_of("keys", keys);
  args.values = view_of("values", values);
  args.layer = layer_of(pages, page_positions, block_table, lengths, seen, fresh_pages);
  args.num_new = view_of("num_new", num_new);
  run(&adakv::append, args, args.keys.device);
}

void plan(handle lengths,
          handle block_table,
          handle fresh_pages,
          int new_tokens,
          handle num_new,
          int page_size,
          int num_workers,
          handle schedule) {
  PlanArgs args;
  args.lengths = view_of("lengths", lengths);
  args.block_table = view_of("block_table", block_table);
  args.fresh_pages = view_of("fresh_pages", fresh_pages);
  args.new_tokens = new_tokens;
  args.num_new = view_of("num_new", num_new);
  args.page_size = page_size;
  args.num_workers = num_workers;
  args.schedule = view_of("schedule", schedule);
  run(&adakv::plan, args, args.lengths.device);
}

void attend(handle queries,
            handle pages,
            handle page_positions,
            handle block_table,
            handle lengths,
            handle seen,
            handle fresh_pages,
            handle schedule,
            handle keys,
            handle values,
            handle num_new,
            handle sink_logits,
            float scale,
            float softcap,
            int num_workers,
            bool prefetch,
            handle out,
            handle lse) {
  AttendArgs args;
  args.queries = view_of("queries", queries);
  args.layer = layer_of(pages, page_positions, block_table, lengths, seen, fresh_pages);
  args.schedule = view_of("schedule", schedule);
  args.keys = view_of("keys", keys);
  args.values = view_of("values", values);
  args.num_new = view_of("num_new", num_new);
  args.sink_logits = view_of("sink_logits", sink_logits);
  args.scale = scale;
  args.softcap = softcap;
  args.num_workers = num_workers;
  args.prefetch = prefetch;
  args.out = view_of("out", out);
  args.lse = view_of("lse", lse);
  run_with_workspace(&adakv::attend, args, args.queries.device);
}

}  // namespace

void define(py::module_& module) {
  module.def("score", &score);
  module.def("value_norm", &value_norm);
  module.def("allocate", &allocate);
  module.def("select", &select);
  module.def("compact", &compact);
  module.def("append", &append);
  module.def("plan", &plan);
  module.def("attend", &attend);
  module.def("schedule_size", &schedule_size);
  module.def("default_num_workers", [](const char* type, int index) {
    const bool is_cpu = std::strcmp(type, "cpu") == 0;
    return default_num_workers({is_cpu ? DeviceType::kCpu : DeviceType::kCuda, is_cpu ? 0 : index});
  });
}

}  // namespace bindings

void bind_ops(py::module_& module) {
  bindings::define(module);
}

}  // namespace adakv
