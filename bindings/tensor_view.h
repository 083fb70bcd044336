// Python tensors to TensorViews and back, through the DLPack exchange API that torch >= 2.10
// offers: no torch header, no Python calls, a few tens of nanoseconds each.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "adakv/types.h"
#include "dlpack.h"

namespace adakv {

namespace py = pybind11;

/// View of a Python tensor, which must outlive the view. None gives an empty view. Throws
/// InvalidArgument (with `name`) for anything that is no tensor, or of a dtype, device or rank that
/// adakv doesn't know.
TensorView view_of(const char* name, py::handle tensor);

/// Throws InvalidArgument (with `name`) for a tensor that torch negates whenever it reads it (its
/// negative bit, as x.imag of a conjugated x has it): the memory holds the other signs, and DLPack
/// doesn't say so. It is a Python call, 0.1 us.
void check_signs(const char* name, py::handle tensor);

/// What messages say about an object: its type.
std::string description(py::handle object);

/// A device by torch's name for its type, "cpu" or "cuda". Throws InvalidArgument for others.
Device named_device(const char* type, int32_t index);

/// A Python object, and as Kind::name what stubs call its type.
template <typename Kind>
struct Named {
  py::object object;
};

/// A torch tensor over memory that `owner` keeps alive; None for no tensor.
py::object tensor_of(const TensorView& view, std::shared_ptr<const void> owner);

/// The framework's current stream on a device.
Stream current_stream(Device device);

/// Scratch memory from the framework's allocator, given back when this object goes.
class Workspace {
 public:
  Workspace(size_t bytes, Device device);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  TensorView view() const;

 private:
  dlpack::ManagedTensor* tensor_ = nullptr;
  Device device_;
};

}  // namespace adakv

template <typename Kind>
struct pybind11::detail::type_caster<adakv::Named<Kind>> {
  static constexpr auto name = Kind::name;
  static handle cast(adakv::Named<Kind> given, return_value_policy, handle) {
    return given.object.release();
  }
};
