// KVCache for Python: counts as numbers, tensors as torch tensors that keep the cache alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "adakv/kv_cache.h"
#include "tensor_view.h"

namespace adakv {
namespace {

DType dtype_of(const std::string& name) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw py::value_error("dtype must be float32, float16 or bfloat16, got " + name);
}

// Tensors that keep their memory alive, also beyond a reserve().
py::tuple tensors_of(const KVCache& cache, const LayerView& view) {
  const std::shared_ptr<const void> owner = cache.holder();
  return py::make_tuple(tensor_of(view.pages, owner), tensor_of(view.page_positions, owner),
                        tensor_of(view.block_table, owner), tensor_of(view.lengths, owner),
                        tensor_of(view.seen, owner), tensor_of(view.fresh_pages, owner));
}

std::shared_ptr<KVCache> make_cache(int32_t num_layers,
                                    int32_t num_sequences,
                                    int32_t num_kv_heads,
                                    int32_t head_dim,
                                    int32_t page_size,
                                    int32_t num_pages,
                                    int32_t max_row_pages,
                                    const std::string& dtype,
                                    const std::string& device_type,
                                    int32_t device_index) {
  CacheConfig config;
  config.num_layers = num_layers;
  config.num_sequences = num_sequences;
  config.num_kv_heads = num_kv_heads;
  config.head_dim = head_dim;
  config.page_size = page_size;
  config.num_pages = num_pages;
  config.max_row_pages = max_row_pages;
  config.dtype = dtype_of(dtype);
  if (device_type == "cuda") config.device = {DeviceType::kCuda, device_index};
  Memory& memory = device_memory(config.device);  // says first if there is no such device
  return std::make_shared<KVCache>(config, memory, current_stream(config.device));
}

}  // namespace

void bind_cache(py::module_& module) {
  py::class_<KVCache, std::shared_ptr<KVCache>>(module, "KVCache")
      .def(py::init(&make_cache), py::kw_only(), py::arg("num_layers"), py::arg("num_sequences"),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("page_size"), py::arg("num_pages"),
           py::arg("max_row_pages"), py::arg("dtype"), py::arg("device_type"),
           py::arg("device_index"))
      .def("layer",
           [](const KVCache& self, int32_t layer) { return tensors_of(self, self.layer(layer)); })
      .def("all_layers", [](const KVCache& self) { return tensors_of(self, self.all_layers()); })
      .def("reserve",
           [](KVCache& self, int32_t num_pages, int32_t max_row_pages) {
             self.reserve(num_pages, max_row_pages, current_stream(self.config().device));
           })
      .def("begin",
           [](KVCache& self, int32_t layer, int32_t first_sequence,
              const std::vector<int64_t>& num_kept, const std::vector<int64_t>& longest_row) {
             PageList pages = self.begin(layer, first_sequence, num_kept, longest_row);
             return py::make_tuple(std::move(pages.ids), std::move(pages.indptr));
           })
      .def("grow",
           [](KVCache& self, const std::vector<int32_t>& num_new, int32_t num_columns) {
             return self.grow(num_new, num_columns, current_stream(self.config().device));
           })
      .def("pages_to_grow", &KVCache::pages_to_grow)
      .def("row_pages_to_grow", &KVCache::row_pages_to_grow)
      .def("remove",
           [](KVCache& self, int32_t sequence) {
             self.remove(sequence, current_stream(self.config().device));
           })
      .def_static("pages_for", &KVCache::pages_for)
      .def("num_pages", &KVCache::num_pages)
      .def_property_readonly("page_bytes", &KVCache::page_bytes)
      .def_property_readonly("num_free", [](const KVCache& self) { return self.pool().num_free(); })
      .def_property_readonly("num_used",
                             [](const KVCache& self) { return self.pool().num_used(); });
}

}  // namespace adakv
