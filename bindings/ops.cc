// One function per verb: what Python gives becomes the members of its arguments (ops/members.h), with
// scratch memory from torch's allocator and the current stream. Nothing else: checks are in
// cpp/ops/ops.cc, defaults in python/adakv/ops.py.
#include <pybind11/pybind11.h>

#include <tuple>
#include <type_traits>

#include "adakv/error.h"
#include "adakv/ops.h"
#include "given.h"
#include "ops/members.h"
#include "tensor_view.h"

namespace adakv {
namespace {

// The CPU backend uses as many threads as torch does.
void follow_torch_threads(Device device) {
  if (device.type != DeviceType::kCpu) return;
  static const py::object* get_num_threads =
      new py::object(py::module_::import("torch").attr("get_num_threads"));
  set_num_threads((*get_num_threads)().cast<int>());
}

// If the arguments are so wrong that the size of the scratch memory can't be told, the verb says so.
template <typename Args>
void run(void (*verb)(const Args&), Args& args) {
  const Device device = device_of_tensors(args);
  follow_torch_threads(device);
  args.stream = current_stream(device);
  if constexpr (kHasWorkspace<Args>) {
    const Workspace workspace(workspace_bytes(args), device);
    args.workspace = workspace.view();
    const py::gil_scoped_release release;
    verb(args);
  } else {
    const py::gil_scoped_release release;
    verb(args);
  }
}

// A step has no time to ask every tensor: there the only public way to a negated view, x.imag, is
// refused for its strides.
template <typename Args>
constexpr bool kIsOfStep = std::is_same_v<Args, AppendArgs> || std::is_same_v<Args, PlanArgs> ||
                           std::is_same_v<Args, AttendArgs> || std::is_same_v<Args, ShortlistArgs>;

/// What was given becomes a member; score has a layer or keys.
template <typename Args, typename T>
void take_for(const char* name, py::handle given, T& to) {
  constexpr bool kMayLack = std::is_same_v<Args, ScoreArgs> && std::is_same_v<T, LayerView>;
  if (kMayLack && given.is_none()) return;
  take(name, given, to);
}

template <typename T>
void check_given_signs(const char* name, Given<T> given, const T& taken) {
  if constexpr (std::is_same_v<T, TensorView>) {
    if (taken) check_signs(name, given.object);
  }
}

template <typename CMember, typename Args, typename T>
Given<T> given_for(const Member<T Args::*, CMember>&);

template <typename Args>
void define(py::module_& module, const char* name, void (*verb)(const Args&)) {
  const auto define_with = [&](const auto&... members) {
    const auto call = [=](decltype(given_for(members))... given) {
      Args args;
      (take_for<Args>(members.name, given.object, args.*members.cpp), ...);
      if constexpr (!kIsOfStep<Args>) {
        (check_given_signs(members.name, given, args.*members.cpp), ...);
      }
      run(verb, args);
    };
    module.def(name, call, py::arg(members.name)..., py::pos_only());
  };
  std::apply(define_with, MembersOf<Args>::kAll);
}

}  // namespace

void bind_ops(py::module_& module) {
  define(module, "score", &score);
  define(module, "value_norm", &value_norm);
  define(module, "allocate", &allocate);
  define(module, "select", &select);
  define(module, "compact", &compact);
  define(module, "append", &append);
  define(module, "fork", &fork);
  define(module, "plan", &plan);
  define(module, "attend", &attend);
  define(module, "shortlist", &shortlist);
  module.def(
      "schedule_size",
      [](Given<int64_t> num_rows, Given<int32_t> num_workers) {
        return schedule_size(take("num_rows", num_rows), take("num_workers", num_workers));
      },
      py::arg("num_rows"), py::arg("num_workers"), py::pos_only());
  module.def(
      "default_num_workers",
      [](Given<const char*> device_type, Given<int32_t> index) {
        return default_num_workers(
            named_device(take("device_type", device_type), take("index", index)));
      },
      py::arg("device_type"), py::arg("index"), py::pos_only());
}

}  // namespace adakv
