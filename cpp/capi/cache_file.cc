// Caches in files for C.
#include "adakv/cache_file.h"

#include <map>
#include <string>

#include "capi/convert.h"

namespace adakv::capi {
namespace {

// A tensor as C sees it, with its shape.
struct Tensor {
  AdakvTensor tensor;
  int64_t shape[TensorView::kMaxRank], strides[TensorView::kMaxRank];
};

}  // namespace
}  // namespace adakv::capi

struct AdakvCacheFile {
  adakv::CacheFile file;
  std::map<std::string, adakv::capi::Tensor> others = {};  // that were asked for
};

using adakv::capi::cache_of;
using adakv::capi::given;
using adakv::capi::guarded;

AdakvStatus adakv_cache_file_open(const char* path, AdakvCacheFile** file) {
  return guarded([&] {
    AdakvCacheFile*& out = given("file", file);
    out = new AdakvCacheFile{adakv::CacheFile(&given("path", path))};
  });
}

AdakvStatus adakv_cache_file_from_memory(const void* data, size_t bytes, AdakvCacheFile** file) {
  return guarded([&] {
    AdakvCacheFile*& out = given("file", file);
    ADAKV_CHECK(data != nullptr, "data must not be NULL");
    out = new AdakvCacheFile{adakv::CacheFile(data, bytes)};
  });
}

void adakv_cache_file_close(AdakvCacheFile* file) {
  delete file;
}

const char* adakv_cache_file_text(const AdakvCacheFile* file, const char* name) {
  const char* text = nullptr;
  guarded([&] {
    const auto& texts = given("file", file).file.texts();
    const auto found = texts.find(&given("name", name));
    if (found != texts.end()) text = found->second.c_str();
  });
  return text;
}

const int32_t* adakv_cache_file_seen(const AdakvCacheFile* file) {
  return file == nullptr ? nullptr : file->file.seen().data();
}

AdakvStatus adakv_cache_file_config(const AdakvCacheFile* file,
                                    int64_t max_new_tokens,
                                    int32_t page_size,
                                    AdakvCacheConfig* config) {
  return guarded([&] {
    AdakvCacheConfig& out = given("config", config);
    const adakv::CacheConfig c = given("file", file).file.config(max_new_tokens, page_size);
    out.num_layers = c.num_layers;
    out.num_sequences = c.num_sequences;
    out.num_kv_heads = c.num_kv_heads;
    out.head_dim = c.head_dim;
    out.page_size = c.page_size;
    out.num_pages = c.num_pages;
    out.max_row_pages = c.max_row_pages;
    int64_t shape[1], strides[1];
    const AdakvTensor tensor =
        adakv::capi::tensor_of(adakv::TensorView(nullptr, {0}, c.dtype), shape, strides);
    out.dtype = tensor.dtype;
    out.device = tensor.device;
    out.format = static_cast<AdakvPageFormat>(c.format);
    out.has_biases = c.has_biases;
    out.value_dim = c.value_dim;
    out.key_dims[0] = out.key_dims[1] = 0;  // no file has others
  });
}

AdakvStatus adakv_cache_file_other(AdakvCacheFile* file,
                                   const char* name,
                                   const AdakvTensor** tensor) {
  return guarded([&] {
    const AdakvTensor*& out = given("tensor", tensor);
    const adakv::TensorView view = given("file", file).file.other(&given("name", name));
    adakv::capi::Tensor& other = file->others[name];
    other.tensor = adakv::capi::tensor_of(view, other.shape, other.strides);
    out = &other.tensor;
  });
}

AdakvStatus adakv_cache_load(AdakvCache* cache,
                             const AdakvCacheFile* file,
                             int32_t first_sequence,
                             void* stream) {
  return guarded([&] {
    given("file", file).file.load(cache_of(&given("cache", cache)), first_sequence, stream);
  });
}

AdakvStatus adakv_cache_save(const AdakvCache* cache,
                             const char* path,
                             const AdakvText* texts,
                             int32_t num_texts,
                             const AdakvNamedTensor* others,
                             int32_t num_others,
                             void* stream) {
  return guarded([&] {
    given("cache", cache), given("path", path);
    std::map<std::string, std::string> cpp_texts;
    for (int32_t i = 0; i < num_texts; ++i) {
      const AdakvText& text = (&given("texts", texts))[i];
      cpp_texts[&given("texts[i].name", text.name)] = &given("texts[i].text", text.text);
    }
    std::map<std::string, adakv::TensorView> views;
    for (int32_t i = 0; i < num_others; ++i) {
      const AdakvNamedTensor& other = (&given("others", others))[i];
      views[&given("others[i].name", other.name)] =
          adakv::capi::view_of(other.name, &given("others[i].tensor", other.tensor));
    }
    adakv::save_cache(path, cache_of(cache), cpp_texts, views, stream);
  });
}
