// Caches in files for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "adakv/cache_file.h"
#include "given.h"
#include "tensor_view.h"

namespace adakv {
namespace {

using Texts = std::map<std::string, std::string>;
using Views = std::map<std::string, Given<TensorView>>;

// A tensor in the memory of a file, which it keeps open.
struct TensorKind {
  static constexpr auto name = py::detail::const_name("torch.Tensor");
};
using FileTensor = Named<TensorKind>;

void save(const std::string& path, const KVCache& cache, const Texts& texts, const Views& others) {
  std::map<std::string, TensorView> views;
  for (const auto& [name, tensor] : others) views[name] = take(name.c_str(), tensor);
  const Stream stream = current_stream(cache.config().device);
  const py::gil_scoped_release release;
  save_cache(path, cache, texts, views, stream);
}

void load(const CacheFile& self, KVCache& cache) {
  const Stream stream = current_stream(cache.config().device);
  const py::gil_scoped_release release;
  self.load(cache, 0, stream);
}

}  // namespace

void bind_cache_file(py::module_& module) {
  using py::arg;
  py::class_<CacheFile, std::shared_ptr<CacheFile>>(module, "CacheFile")
      .def(py::init<const std::string&>(), arg("path"))
      .def_property_readonly("texts", &CacheFile::texts)
      .def_property_readonly("seen", &CacheFile::seen)
      .def_property_readonly("has_biases", &CacheFile::has_biases)
      .def("lengths",
           [](const std::shared_ptr<CacheFile>& self) {
             return FileTensor{tensor_of(self->lengths(), self)};
           })
      .def("others", &CacheFile::others)
      .def(
          "other",
          [](const std::shared_ptr<CacheFile>& self, const std::string& name) {
            return FileTensor{tensor_of(self->other(name), self)};
          },
          arg("name"))
      .def("load", &load, arg("cache"));
  module.def("save_cache", &save, arg("path"), arg("cache"), arg("texts"), arg("others"));
}

}  // namespace adakv
