// What Python gives, by the type that C++ wants: functions take Given<T>, whose type is in their
// signature for Python, and make a T of it where they can name the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "adakv/error.h"
#include "ops/members.h"
#include "tensor_view.h"

namespace adakv {

template <typename T>
struct Given {
  py::handle object;
};

/// Make a T of what was given. Throw InvalidArgument, with `name`, for anything else.
inline void take(const char* name, py::handle given, TensorView& to) {
  to = view_of(name, given);
}
/// The same for integers of 32 or 64 bits: anything that Python takes for an index.
void take(const char* name, py::handle given, int32_t& to);
void take(const char* name, py::handle given, int64_t& to);
/// The same for numbers.
void take(const char* name, py::handle given, double& to);
void take(const char* name, py::handle given, float& to);
/// The same for True and False.
void take(const char* name, py::handle given, bool& to);
/// The same for texts. The text belongs to `given`.
void take(const char* name, py::handle given, const char*& to);
/// The same for a layer, a tuple of its tensors.
void take(const char* name, py::handle given, LayerView& to);
/// The same for tiers, each a tuple of its members.
void take(const char* name, py::handle given, std::vector<Tier>& to);

/// The same for words of an enumeration.
template <typename Enum>
std::enable_if_t<std::is_enum_v<Enum>> take(const char* name, py::handle given, Enum& to) {
  const char* text;
  take(name, given, text);
  std::string known;
  for (size_t i = 0; i < kWords<Enum>.size(); ++i) {
    to = static_cast<Enum>(i);
    if (std::string(text) == kWords<Enum>[i]) return;
    known += (i ? ", '" : "'") + std::string(kWords<Enum>[i]) + "'";
  }
  throw InvalidArgument(detail::concat(name, " must be one of ", known, ", got '", text, "'"));
}

/// The same for a sequence of integers.
template <typename Integer>
void take(const char* name, py::handle given, std::vector<Integer>& to) {
  if (!PySequence_Check(given.ptr()) || PyUnicode_Check(given.ptr()) ||
      PyBytes_Check(given.ptr())) {
    throw InvalidArgument(
        detail::concat(name, " must be a sequence of integers, got ", description(given)));
  }
  to.clear();
  for (const py::handle number : py::reinterpret_borrow<py::sequence>(given)) {
    take(name, number, to.emplace_back());
  }
}

/// What was given, as a value.
template <typename T>
T take(const char* name, Given<T> given) {
  T value;
  take(name, given.object, value);
  return value;
}

/// The name of a type in Python.
template <typename T>
constexpr auto python_name() {
  using py::detail::const_name;
  if constexpr (std::is_same_v<T, TensorView>) {
    return const_name("torch.Tensor | None");
  } else if constexpr (std::is_same_v<T, LayerView>) {
    return const_name("tuple[torch.Tensor | None, ...] | None");
  } else if constexpr (std::is_same_v<T, std::vector<Tier>>) {
    return const_name("collections.abc.Sequence[tuple[object, ...]]");
  } else if constexpr (std::is_same_v<T, bool>) {
    return const_name("bool");
  } else if constexpr (std::is_integral_v<T>) {
    return const_name("int");
  } else if constexpr (std::is_floating_point_v<T>) {
    return const_name("float");
  } else if constexpr (std::is_enum_v<T> || std::is_same_v<T, const char*>) {
    return const_name("str");
  } else if constexpr (std::is_same_v<T, std::vector<std::vector<int64_t>>>) {
    return const_name("collections.abc.Sequence[collections.abc.Sequence[int]]");
  } else {
    return const_name("collections.abc.Sequence[int]");
  }
}

}  // namespace adakv

template <typename T>
struct pybind11::detail::type_caster<adakv::Given<T>> {
  static constexpr auto name = adakv::python_name<T>();
  template <typename>
  using cast_op_type = adakv::Given<T>;
  bool load(handle source, bool) {
    object = source;
    return true;
  }
  operator adakv::Given<T>() { return {object}; }

  handle object;
};
