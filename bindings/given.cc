#include "given.h"

#include <cmath>

#include "adakv/error.h"

namespace adakv {
namespace {

template <typename Integer>
void take_integer(const char* name, py::handle given, Integer& to) {
  const auto wrong = [&](const std::string& got) {
    const int bits = 8 * sizeof(Integer);
    throw InvalidArgument(
        detail::concat(name, " must be an integer of ", bits, " bits, got ", got));
  };
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(given.ptr()));
  if (!index) {
    PyErr_Clear();
    wrong(description(given));
  }
  int is_beyond = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &is_beyond);
  if (is_beyond || value < std::numeric_limits<Integer>::min() ||
      value > std::numeric_limits<Integer>::max()) {
    wrong(is_beyond ? "one beyond 64 bits" : std::to_string(value));
  }
  to = static_cast<Integer>(value);
}

}  // namespace

void take(const char* name, py::handle given, int32_t& to) {
  take_integer(name, given, to);
}

void take(const char* name, py::handle given, int64_t& to) {
  take_integer(name, given, to);
}

void take(const char* name, py::handle given, double& to) {
  to = PyFloat_AsDouble(given.ptr());
  if (to == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    throw InvalidArgument(detail::concat(name, " must be a number, got ", description(given)));
  }
}

void take(const char* name, py::handle given, float& to) {
  double value;
  take(name, given, value);
  to = static_cast<float>(value);
  if (std::isinf(to) && !std::isinf(value)) {
    throw InvalidArgument(detail::concat(name, " must be a number of float32, got ", value));
  }
}

void take(const char* name, py::handle given, bool& to) {
  if (!PyBool_Check(given.ptr())) {
    throw InvalidArgument(detail::concat(name, " must be True or False, got ", description(given)));
  }
  to = given.ptr() == Py_True;
}

void take(const char* name, py::handle given, const char*& to) {
  to = PyUnicode_Check(given.ptr()) ? PyUnicode_AsUTF8(given.ptr()) : nullptr;
  if (to == nullptr) {
    PyErr_Clear();
    throw InvalidArgument(detail::concat(name, " must be a text, got ", description(given)));
  }
}

void take(const char* name, py::handle given, LayerView& to) {
  constexpr size_t kNumTensors = std::tuple_size_v<decltype(MembersOf<LayerView>::kAll)>;
  if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != kNumTensors) {
    throw InvalidArgument(detail::concat(name, " must be an adakv.ops.Layer, a tuple of ",
                                         kNumTensors, " tensors, got ", description(given)));
  }
  Py_ssize_t i = 0;
  for_each_member<LayerView>([&](const auto& member) {
    to.*member.cpp = view_of(member.name, PyTuple_GET_ITEM(given.ptr(), i++));
  });
}

void take(const char* name, py::handle given, std::vector<Tier>& to) {
  constexpr size_t kNumMembers = std::tuple_size_v<decltype(MembersOf<Tier>::kAll)>;
  const auto is_list = [](py::handle x) { return PyTuple_Check(x.ptr()) || PyList_Check(x.ptr()); };
  if (!is_list(given)) {
    throw InvalidArgument(
        detail::concat(name, " must be a sequence of adakv.ops.Tier, got ", description(given)));
  }
  for (const py::handle tuple : py::reinterpret_borrow<py::sequence>(given)) {
    if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != kNumMembers) {
      throw InvalidArgument(detail::concat(name,
                                           " must be a sequence of adakv.ops.Tier, tuples of ",
                                           kNumMembers, ", got one of ", description(tuple)));
    }
    Tier& tier = to.emplace_back();
    Py_ssize_t i = 0;
    for_each_member<Tier>([&](const auto& member) {
      take(member.name, py::handle(PyTuple_GET_ITEM(tuple.ptr(), i++)), tier.*member.cpp);
    });
  }
}

}  // namespace adakv
