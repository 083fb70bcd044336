// KVCache for Python: counts as numbers, tensors as torch tensors that keep the cache alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "adakv/error.h"
#include "adakv/kv_cache.h"
#include "given.h"
#include "tensor_view.h"

namespace adakv {
namespace {

DType dtype_of(const std::string& name) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw InvalidArgument("dtype must be float32, float16 or bfloat16, got " + name);
}

// The tensors of a layer, in the order of LayerView; they keep their memory alive, also beyond a
// reserve().
struct TensorsKind {
  static constexpr auto name = py::detail::const_name("tuple[torch.Tensor | None, ...]");
};
using Tensors = Named<TensorsKind>;

Tensors tensors_of(const KVCache& cache, const LayerView& view) {
  const std::shared_ptr<const void> owner = cache.holder();
  py::list tensors;
  for_each_member<LayerView>(
      [&](const auto& member) { tensors.append(tensor_of(view.*member.cpp, owner)); });
  return {py::tuple(tensors)};
}

using Int = Given<int32_t>;
using Ints = Given<std::vector<int32_t>>;
using LongInts = Given<std::vector<int64_t>>;
using LongIntLists = Given<std::vector<std::vector<int64_t>>>;

std::shared_ptr<KVCache> make_cache(Int num_layers,
                                    Int num_sequences,
                                    Int num_kv_heads,
                                    Int head_dim,
                                    Int page_size,
                                    Int num_pages,
                                    Int max_row_pages,
                                    Given<const char*> dtype,
                                    Given<PageFormat> kv_dtype,
                                    bool has_biases,
                                    Int value_dim,
                                    Int key_dims_16,
                                    Int key_dims_2,
                                    Given<const char*> device_type,
                                    Int device_index) {
  CacheConfig config;
  config.num_layers = take("num_layers", num_layers);
  config.num_sequences = take("num_sequences", num_sequences);
  config.num_kv_heads = take("num_kv_heads", num_kv_heads);
  config.head_dim = take("head_dim", head_dim);
  config.page_size = take("page_size", page_size);
  config.num_pages = take("num_pages", num_pages);
  config.max_row_pages = take("max_row_pages", max_row_pages);
  config.dtype = dtype_of(take("dtype", dtype));
  config.format = take("kv_dtype", kv_dtype);
  config.has_biases = has_biases;
  config.value_dim = take("value_dim", value_dim);
  config.key_dims = {take("key_dims_16", key_dims_16), take("key_dims_2", key_dims_2)};
  config.device =
      named_device(take("device_type", device_type), take("device_index", device_index));
  Memory& memory = device_memory(config.device);  // says first if there is no such device
  return std::make_shared<KVCache>(config, memory, current_stream(config.device));
}

Stream stream_of(const KVCache& cache) {
  return current_stream(cache.config().device);
}

py::typing::Tuple<py::typing::List<py::int_>, py::typing::List<py::int_>> begin(
    KVCache& self, Int layer, Int first_sequence, LongInts num_kept, LongInts longest_row) {
  const PageList pages = self.begin(take("layer", layer), take("first_sequence", first_sequence),
                                    take("totals", num_kept), take("longest", longest_row));
  return py::make_tuple(pages.ids, pages.indptr);
}

// int32 numbers: where the pages of each sequence begin in each layer, [L, B + 1], counted from the
// first page of all; then all of them.
py::bytes begin_again(KVCache& self,
                      Int first_sequence,
                      LongIntLists num_kept,
                      LongInts longest_row,
                      bool own_pages) {
  std::vector<int32_t> starts, ids;
  for (const PageList& pages :
       self.begin_again(take("first_sequence", first_sequence), take("totals", num_kept),
                        take("longest", longest_row), own_pages)) {
    for (int32_t start : pages.indptr) starts.push_back(static_cast<int32_t>(ids.size()) + start);
    ids.insert(ids.end(), pages.ids.begin(), pages.ids.end());
  }
  starts.insert(starts.end(), ids.begin(), ids.end());
  return py::bytes(reinterpret_cast<const char*>(starts.data()), starts.size() * sizeof(int32_t));
}

// int32 numbers: the stretch of each sequence [B], where the pages of each sequence begin in each layer
// [L, B + 1], counted from the first page of all, and all of them.
py::bytes numbers_of(const Fork& made) {
  std::vector<int32_t> numbers = made.stretch, ids;
  for (const PageList& pages : made.pages) {
    for (int32_t start : pages.indptr) numbers.push_back(static_cast<int32_t>(ids.size()) + start);
    ids.insert(ids.end(), pages.ids.begin(), pages.ids.end());
  }
  numbers.insert(numbers.end(), ids.begin(), ids.end());
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int32_t)};
}

py::typing::Tuple<std::shared_ptr<KVCache>, py::bytes> fork_cache(KVCache& self,
                                                                  Ints sources,
                                                                  Ints back,
                                                                  bool whole) {
  Fork made = self.fork(take("sources", sources), take("back", back), whole,
                        current_stream(self.config().device));
  const py::bytes numbers = numbers_of(made);
  return py::make_tuple(std::shared_ptr<KVCache>(std::move(made.cache)), numbers);
}

}  // namespace

void bind_cache(py::module_& module) {
  using py::arg;
  py::class_<KVCache, std::shared_ptr<KVCache>>(module, "KVCache")
      .def(py::init(&make_cache), py::kw_only(), arg("num_layers"), arg("num_sequences"),
           arg("num_kv_heads"), arg("head_dim"), arg("page_size"), arg("num_pages"),
           arg("max_row_pages"), arg("dtype"), arg("kv_dtype"), arg("has_biases"), arg("value_dim"),
           arg("key_dims_16"), arg("key_dims_2"), arg("device_type"), arg("device_index"))
      .def(
          "layer",
          [](const KVCache& self, Int layer) {
            return tensors_of(self, self.layer(take("layer", layer)));
          },
          arg("layer"))
      .def("all_layers", [](const KVCache& self) { return tensors_of(self, self.all_layers()); })
      .def(
          "reserve",
          [](KVCache& self, Int num_pages, Int max_row_pages) {
            self.reserve(take("num_pages", num_pages), take("max_row_pages", max_row_pages),
                         stream_of(self));
          },
          arg("num_pages"), arg("max_row_pages"))
      .def("begin", &begin, arg("layer"), arg("first_sequence"), arg("totals"), arg("longest"))
      .def("begin_again", &begin_again, arg("first_sequence"), arg("totals"), arg("longest"),
           arg("own_pages"))
      .def("fork", &fork_cache, arg("sources"), arg("back"), arg("whole"))
      .def(
          "fork_into",
          [](KVCache& self, Int first_sequence, Ints sources, Ints back, bool whole) {
            return numbers_of(self.fork_into(take("first_sequence", first_sequence),
                                             take("sources", sources), take("back", back), whole));
          },
          arg("first_sequence"), arg("sources"), arg("back"), arg("whole"))
      .def(
          "pages_to_fork",
          [](const KVCache& self, Ints sources, bool whole) {
            return self.pages_to_fork(take("sources", sources), whole);
          },
          arg("sources"), arg("whole"))
      .def(
          "is_shared",
          [](const KVCache& self, Int sequence) {
            return self.is_shared(take("sequence", sequence));
          },
          arg("sequence"))
      .def(
          "grow",
          [](KVCache& self, Ints num_new, Int columns) {
            return self.grow(take("num_new", num_new), take("columns", columns), stream_of(self));
          },
          arg("num_new"), arg("columns"))
      .def(
          "pages_to_grow",
          [](const KVCache& self, Ints num_new) {
            return self.pages_to_grow(take("num_new", num_new));
          },
          arg("num_new"))
      .def(
          "row_pages_to_grow",
          [](const KVCache& self, Ints num_new) {
            return self.row_pages_to_grow(take("num_new", num_new));
          },
          arg("num_new"))
      .def(
          "remove",
          [](KVCache& self, Int sequence) {
            self.remove(take("sequence", sequence), stream_of(self));
          },
          arg("sequence"))
      .def_static(
          "pages_for",
          [](Given<int64_t> total, Given<int64_t> new_tokens, Int num_kv_heads, Int page_size) {
            return KVCache::pages_for(take("total", total), take("new_tokens", new_tokens),
                                      take("num_kv_heads", num_kv_heads),
                                      take("page_size", page_size));
          },
          arg("total"), arg("new_tokens"), arg("num_kv_heads"), arg("page_size"))
      .def(
          "num_pages",
          [](const KVCache& self, Int layer, Int sequence) {
            return self.num_pages(take("layer", layer), take("sequence", sequence));
          },
          arg("layer"), arg("sequence"))
      .def_property_readonly("page_bytes", &KVCache::page_bytes)
      .def_property_readonly("tail_bytes", &KVCache::tail_bytes)
      .def_property_readonly("bytes_used", &KVCache::bytes_used)
      .def_property_readonly("num_free", [](const KVCache& self) { return self.pool().num_free(); })
      .def_property_readonly("num_used",
                             [](const KVCache& self) { return self.pool().num_used(); });
}

}  // namespace adakv
