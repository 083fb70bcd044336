// The Python module adakv._C: version, backends, errors, and what ops.cc, cache.cc and cache_file.cc bind.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "adakv/error.h"
#include "adakv/ops.h"

namespace adakv {

void bind_ops(pybind11::module_& module);
void bind_cache(pybind11::module_& module);
void bind_cache_file(pybind11::module_& module);

}  // namespace adakv

PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  module.attr("__version__") = ADAKV_VERSION;
  py::register_exception<adakv::Error>(module, "Error", PyExc_RuntimeError).attr("__module__") =
      "adakv";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const adakv::InvalidArgument& error) {
      py::set_error(PyExc_ValueError, error.what());
    }
  });
  module.def("cuda_unavailable_reason", []() -> std::optional<std::string> {
    std::string reason;
    if (adakv::cuda_available(&reason)) return std::nullopt;
    return reason;
  });
  module.def("cpu_instruction_set", &adakv::cpu_instruction_set);
  adakv::bind_ops(module);
  adakv::bind_cache(module);
  adakv::bind_cache_file(module);
}
