// The cache for C: a KVCache, its tensors with shapes that C can point to, and memory by callbacks.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "capi/convert.h"

namespace adakv::capi {
namespace {

// A Memory whose bodies are the caller's functions.
class CallbackMemory final : public Memory {
 public:
  CallbackMemory(const AdakvMemory& calls, Device device) : calls_(calls), device_(device) {
    ADAKV_CHECK(calls.allocate && calls.free && calls.copy_rows_from_host && calls.copy_rows &&
                    calls.fill_rows,
                "memory: all five functions must be given");
  }

  Device device() const override { return device_; }

  void* allocate(size_t bytes) override {
    void* data = calls_.allocate(calls_.context, bytes);
    if (data == nullptr) throw Error(detail::concat("memory: allocate(", bytes, ") gave NULL"));
    return data;
  }

  void free(void* data) override { calls_.free(calls_.context, data); }

  void copy_from_host(void* data, const void* host, size_t bytes, Stream stream) override {
    copy_rows_from_host(data, bytes, host, bytes, 1, stream);
  }

  void copy_rows_from_host(void* data,
                           size_t pitch_bytes,
                           const void* host,
                           size_t row_bytes,
                           size_t rows,
                           Stream stream) override {
    check("copy_rows_from_host", calls_.copy_rows_from_host(calls_.context, data, pitch_bytes, host,
                                                            row_bytes, rows, stream));
  }

  void copy_rows(void* to,
                 size_t to_pitch,
                 const void* from,
                 size_t from_pitch,
                 size_t row_bytes,
                 size_t rows,
                 Stream stream) override {
    check("copy_rows", calls_.copy_rows(calls_.context, to, to_pitch, from, from_pitch, row_bytes,
                                        rows, stream));
  }

  void fill_rows(void* data,
                 size_t pitch_bytes,
                 int value,
                 size_t row_bytes,
                 size_t rows,
                 Stream stream) override {
    check("fill_rows",
          calls_.fill_rows(calls_.context, data, pitch_bytes, value, row_bytes, rows, stream));
  }

 private:
  static void check(const char* name, int result) {
    if (result != 0) throw Error(detail::concat("memory: ", name, " gave ", result));
  }

  AdakvMemory calls_;
  Device device_;
};

// The tensors of a LayerView, and their shapes.
struct LayerTensors {
  explicit LayerTensors(const LayerView& view) { set(view); }
  LayerTensors(const LayerTensors&) = delete;

  void set(const LayerView& view) {
    int i = 0;
    for_each_member<LayerView>([&](const auto& member) {
      tensors[i] = tensor_of(view.*member.cpp, shapes[i], strides[i]);
      ++i;
    });
  }

  AdakvLayer layer() const {
    AdakvLayer layer = {};
    int i = 0;
    for_each_member<LayerView>([&](const auto& member) {
      const bool is_given = tensors[i].ndim >= 0;
      layer.*member.c = is_given ? &tensors[i] : nullptr;
      ++i;
    });
    return layer;
  }

  static constexpr size_t kNum = std::tuple_size_v<decltype(MembersOf<LayerView>::kAll)>;
  AdakvTensor tensors[kNum];
  int64_t shapes[kNum][TensorView::kMaxRank], strides[kNum][TensorView::kMaxRank];
};

CacheConfig config_of(const AdakvCacheConfig& c) {
  CacheConfig config;
  config.num_layers = c.num_layers;
  config.num_sequences = c.num_sequences;
  config.num_kv_heads = c.num_kv_heads;
  config.head_dim = c.head_dim;
  config.page_size = c.page_size;
  config.num_pages = c.num_pages;
  config.max_row_pages = c.max_row_pages;
  config.dtype = dtype_of("config.dtype", c.dtype);
  config.device = device_of("config.device", c.device);
  config.format = enumerator<PageFormat>("config.format", c.format);
  config.has_biases = c.has_biases != 0;
  config.value_dim = c.value_dim;
  config.key_dims = {c.key_dims[0], c.key_dims[1]};
  return config;
}

}  // namespace
}  // namespace adakv::capi

struct AdakvCache {
  AdakvCache(const adakv::CacheConfig& config,
             std::shared_ptr<adakv::Memory> memory,
             adakv::Stream stream)
      : AdakvCache(memory,
                   std::make_unique<adakv::KVCache>(
                       config, memory ? *memory : adakv::device_memory(config.device), stream),
                   std::make_shared<std::vector<AdakvCache*>>()) {}

  AdakvCache(std::shared_ptr<adakv::Memory> memory,
             std::unique_ptr<adakv::KVCache> made,
             std::shared_ptr<std::vector<AdakvCache*>> forks)
      : own_memory(std::move(memory)),
        cache_memory(std::move(made)),
        cache(*cache_memory),
        all_layers(cache.all_layers()),
        members(std::move(forks)) {
    for (int32_t i = 0; i < cache.config().num_layers; ++i) {
      layers.push_back(std::make_unique<adakv::capi::LayerTensors>(cache.layer(i)));
    }
    members->push_back(this);
  }

  ~AdakvCache() { members->erase(std::find(members->begin(), members->end(), this)); }
  AdakvCache(const AdakvCache&) = delete;

  std::shared_ptr<adakv::Memory> own_memory;  // of the caller's functions, if given
  std::unique_ptr<adakv::KVCache> cache_memory;
  adakv::KVCache& cache;
  adakv::capi::LayerTensors all_layers;
  std::vector<std::unique_ptr<adakv::capi::LayerTensors>> layers;
  std::vector<adakv::PageList> pages;                 // of the last begin, of each layer or of one
  std::shared_ptr<std::vector<AdakvCache*>> members;  // it and its forks, as long as they live

  /// The tensors have other places: the pool has grown, for all forks.
  void update() {
    all_layers.set(cache.all_layers());
    for (size_t i = 0; i < layers.size(); ++i) layers[i]->set(cache.layer(static_cast<int32_t>(i)));
  }

  /// Throws unless there are so many sequences from the first one on.
  void check_sequences(int32_t first, int32_t count) const {
    const int32_t most = cache.config().num_sequences;
    ADAKV_CHECK(first >= 0 && first < most, "first_sequence must be 0 .. ", most - 1, ", got ",
                first);
    ADAKV_CHECK(count >= 1 && count <= most - first, "num_sequences must be 1 .. ", most - first,
                " from first_sequence = ", first, " on, got ", count);
  }

  /// Takes what a fork was given, and writes it.
  void give(adakv::Fork&& made, AdakvPageList* lists, int32_t* stretch) {
    pages = std::move(made.pages);
    give(lists);
    std::copy(made.stretch.begin(), made.stretch.end(), stretch);
  }

  /// Writes the page lists that the cache holds.
  void give(AdakvPageList* lists) const {
    for (const adakv::PageList& list : pages) {
      *lists++ = {list.ids.data(), list.indptr.data(), static_cast<int64_t>(list.ids.size())};
    }
  }
};

adakv::KVCache& adakv::capi::cache_of(const AdakvCache* cache) {
  return cache->cache;
}

using adakv::capi::given;
using adakv::capi::guarded;

AdakvStatus adakv_cache_create(const AdakvCacheConfig* config,
                               const AdakvMemory* memory,
                               void* stream,
                               AdakvCache** cache) {
  return guarded([&] {
    AdakvCache*& out = given("cache", cache);
    const adakv::CacheConfig cpp_config = adakv::capi::config_of(given("config", config));
    std::shared_ptr<adakv::Memory> own;
    if (memory) own = std::make_shared<adakv::capi::CallbackMemory>(*memory, cpp_config.device);
    out = new AdakvCache(cpp_config, std::move(own), stream);
  });
}

void adakv_cache_destroy(AdakvCache* cache) {
  delete cache;
}

AdakvStatus adakv_cache_layer(const AdakvCache* cache, int32_t layer, AdakvLayer* tensors) {
  return guarded([&] {
    given("cache", cache).cache.layer(layer);  // checks it
    given("tensors", tensors) = cache->layers[layer]->layer();
  });
}

AdakvStatus adakv_cache_all_layers(const AdakvCache* cache, AdakvLayer* tensors) {
  return guarded([&] { given("tensors", tensors) = given("cache", cache).all_layers.layer(); });
}

AdakvStatus adakv_cache_reserve(AdakvCache* cache,
                                int32_t num_pages,
                                int32_t max_row_pages,
                                void* stream) {
  return guarded([&] {
    adakv::KVCache& memory = given("cache", cache).cache;
    memory.reserve(num_pages, max_row_pages, stream);
    for (AdakvCache* member : *cache->members) member->update();
  });
}

AdakvStatus adakv_cache_begin(AdakvCache* cache,
                              int32_t layer,
                              int32_t first_sequence,
                              int32_t num_sequences,
                              const int64_t* num_kept,
                              const int64_t* longest_row,
                              AdakvPageList* pages) {
  return guarded([&] {
    given("cache", cache), given("pages", pages);
    cache->check_sequences(first_sequence, num_sequences);
    const auto list = [&](const char* name, const int64_t* values) {
      return std::vector<int64_t>(&given(name, values), values + num_sequences);
    };
    cache->pages = {cache->cache.begin(layer, first_sequence, list("num_kept", num_kept),
                                       list("longest_row", longest_row))};
    cache->give(pages);
  });
}

AdakvStatus adakv_cache_begin_again(AdakvCache* cache,
                                    int32_t first_sequence,
                                    int32_t num_sequences,
                                    const int64_t* num_kept,
                                    const int64_t* longest_row,
                                    AdakvPageList* pages) {
  return guarded([&] {
    given("cache", cache), given("pages", pages);
    given("num_kept", num_kept), given("longest_row", longest_row);
    cache->check_sequences(first_sequence, num_sequences);
    std::vector<std::vector<int64_t>> kept;
    for (int32_t l = 0; l < cache->cache.config().num_layers; ++l, num_kept += num_sequences) {
      kept.emplace_back(num_kept, num_kept + num_sequences);
    }
    cache->pages =
        cache->cache.begin_again(first_sequence, kept, {longest_row, longest_row + num_sequences});
    cache->give(pages);
  });
}

AdakvStatus adakv_cache_grow(AdakvCache* cache,
                             const int32_t* num_new,
                             int32_t num_columns,
                             void* stream,
                             int32_t* columns) {
  return guarded([&] {
    given("cache", cache), given("num_new", num_new), given("columns", columns);
    const int32_t* end = num_new + cache->cache.config().num_sequences;
    *columns = cache->cache.grow({num_new, end}, num_columns, stream);
  });
}

AdakvStatus adakv_cache_pages_to_grow(const AdakvCache* cache,
                                      const int32_t* num_new,
                                      int64_t* pages) {
  return guarded([&] {
    given("cache", cache), given("num_new", num_new), given("pages", pages);
    *pages = cache->cache.pages_to_grow({num_new, num_new + cache->cache.config().num_sequences});
  });
}

AdakvStatus adakv_cache_row_pages_to_grow(const AdakvCache* cache,
                                          const int32_t* num_new,
                                          int64_t* pages) {
  return guarded([&] {
    given("cache", cache), given("num_new", num_new), given("pages", pages);
    *pages =
        cache->cache.row_pages_to_grow({num_new, num_new + cache->cache.config().num_sequences});
  });
}

AdakvStatus adakv_cache_remove(AdakvCache* cache, int32_t sequence, void* stream) {
  return guarded([&] { given("cache", cache).cache.remove(sequence, stream); });
}

AdakvStatus adakv_cache_fork(AdakvCache* cache,
                             const int32_t* sources,
                             int32_t num_sources,
                             const int32_t* back,
                             int32_t whole,
                             void* stream,
                             AdakvCache** fork,
                             AdakvPageList* pages,
                             int32_t* stretch) {
  return guarded([&] {
    given("cache", cache), given("sources", sources), given("fork", fork);
    given("pages", pages), given("stretch", stretch);
    ADAKV_CHECK(num_sources >= 1, "num_sources must be at least 1, got ", num_sources);
    const std::vector<int32_t> backs(back, back ? back + num_sources : back);
    adakv::Fork made =
        cache->cache.fork({sources, sources + num_sources}, backs, whole != 0, stream);
    auto out =
        std::make_unique<AdakvCache>(cache->own_memory, std::move(made.cache), cache->members);
    out->give(std::move(made), pages, stretch);
    *fork = out.release();
  });
}

AdakvStatus adakv_cache_fork_into(AdakvCache* cache,
                                  int32_t first_sequence,
                                  const int32_t* sources,
                                  int32_t num_sources,
                                  const int32_t* back,
                                  int32_t whole,
                                  AdakvPageList* pages,
                                  int32_t* stretch) {
  return guarded([&] {
    given("cache", cache), given("sources", sources), given("pages", pages);
    given("stretch", stretch);
    cache->check_sequences(first_sequence, num_sources);
    const std::vector<int32_t> backs(back, back ? back + num_sources : back);
    adakv::Fork made =
        cache->cache.fork_into(first_sequence, {sources, sources + num_sources}, backs, whole != 0);
    cache->give(std::move(made), pages, stretch);
  });
}

int32_t adakv_cache_is_shared(const AdakvCache* cache, int32_t sequence) {
  int32_t result = -1;
  guarded([&] { result = given("cache", cache).cache.is_shared(sequence) ? 1 : 0; });
  return result;
}

AdakvStatus adakv_cache_num_pages(const AdakvCache* cache,
                                  int32_t layer,
                                  int32_t sequence,
                                  int32_t* pages) {
  return guarded(
      [&] { given("pages", pages) = given("cache", cache).cache.num_pages(layer, sequence); });
}

int32_t adakv_cache_num_free(const AdakvCache* cache) {
  int32_t pages = -1;
  guarded([&] { pages = given("cache", cache).cache.pool().num_free(); });
  return pages;
}

size_t adakv_cache_page_bytes(const AdakvCache* cache) {
  size_t bytes = 0;
  guarded([&] { bytes = given("cache", cache).cache.page_bytes(); });
  return bytes;
}

size_t adakv_cache_tail_bytes(const AdakvCache* cache) {
  size_t bytes = 0;
  guarded([&] { bytes = given("cache", cache).cache.tail_bytes(); });
  return bytes;
}

size_t adakv_cache_bytes_used(const AdakvCache* cache) {
  size_t bytes = 0;
  guarded([&] { bytes = given("cache", cache).cache.bytes_used(); });
  return bytes;
}

int64_t adakv_pages_for(int64_t num_kept,
                        int64_t num_new,
                        int32_t num_kv_heads,
                        int32_t page_size) {
  int64_t pages = -1;
  guarded([&] { pages = adakv::KVCache::pages_for(num_kept, num_new, num_kv_heads, page_size); });
  return pages;
}
