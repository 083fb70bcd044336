#include "adakv/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <string>

#include "adakv/error.h"

namespace adakv {
namespace {

CacheConfig small_config() {
  CacheConfig config;
  config.num_layers = 2;
  config.num_sequences = 3;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.page_size = 8;
  config.num_pages = 400;
  config.max_row_pages = 40;
  config.dtype = DType::kFloat32;
  return config;
}

TEST(KVCache, RefusesConfigsThatMakeNoSense) {
  Memory& memory = device_memory({});
  for (const auto change :
       {+[](CacheConfig& c) { c.num_layers = 0; }, +[](CacheConfig& c) { c.head_dim = 12; },
        +[](CacheConfig& c) { c.head_dim = 264; }, +[](CacheConfig& c) { c.page_size = 12; },
        +[](CacheConfig& c) { c.num_pages = 0; }, +[](CacheConfig& c) { c.max_row_pages = 0; },
        +[](CacheConfig& c) { c.page_size = 0; }, +[](CacheConfig& c) { c.num_layers = 1 << 17; },
        +[](CacheConfig& c) { c.num_sequences = std::numeric_limits<int32_t>::max(); },
        +[](CacheConfig& c) { c.dtype = DType::kInt32; }, +[](CacheConfig& c) { c.value_dim = 12; },
        +[](CacheConfig& c) { c.device = {DeviceType::kCuda, 0}; }}) {
    CacheConfig config = small_config();
    change(config);
    EXPECT_THROW(KVCache(config, memory), InvalidArgument);
  }
}

// Host memory that notes which streams it hears of.
class NotingMemory final : public Memory {
 public:
  Device device() const override { return {}; }
  void* allocate(size_t bytes) override {
    if (bytes > most_bytes) throw Error("no memory");
    return host_.allocate(bytes);
  }
  void free(void* data) override { host_.free(data); }
  void copy_from_host(void* data, const void* host, size_t bytes, Stream stream) override {
    streams.push_back(stream);
    host_.copy_from_host(data, host, bytes, stream);
  }
  void copy_rows_from_host(void* data,
                           size_t pitch_bytes,
                           const void* host,
                           size_t row_bytes,
                           size_t rows,
                           Stream stream) override {
    streams.push_back(stream);
    host_.copy_rows_from_host(data, pitch_bytes, host, row_bytes, rows, stream);
  }
  void copy_rows(void* to,
                 size_t to_pitch,
                 const void* from,
                 size_t from_pitch,
                 size_t row_bytes,
                 size_t rows,
                 Stream stream) override {
    streams.push_back(stream);
    host_.copy_rows(to, to_pitch, from, from_pitch, row_bytes, rows, stream);
  }
  void fill_rows(void* data,
                 size_t pitch_bytes,
                 int value,
                 size_t row_bytes,
                 size_t rows,
                 Stream stream) override {
    streams.push_back(stream);
    host_.fill_rows(data, pitch_bytes, value, row_bytes, rows, stream);
  }

  std::vector<Stream> streams;
  size_t most_bytes = 1 << 20;

 private:
  Memory& host_ = device_memory({});
};

TEST(KVCache, WritesInTheStreamThatItIsGiven) {
  int a, b, c;
  NotingMemory memory;
  KVCache cache(small_config(), memory, &a);
  EXPECT_EQ(memory.streams, std::vector<Stream>(4, &a));
  memory.streams.clear();
  for (int32_t layer : {0, 1}) cache.begin(layer, 0, {8}, {8});
  EXPECT_TRUE(memory.streams.empty());
  cache.grow({8, 0, 0}, 8, &b);
  cache.grow({1, 0, 0}, 1, &b);
  EXPECT_EQ(memory.streams, std::vector<Stream>(1, &b));
  memory.streams.clear();
  cache.remove(0, &c);
  EXPECT_EQ(memory.streams, std::vector<Stream>(3, &c));
  memory.streams.clear();
  cache.reserve(500, 50, &a);
  EXPECT_EQ(memory.streams, std::vector<Stream>(4, &a));
}

TEST(KVCache, StartsEmpty) {
  KVCache cache(small_config(), device_memory({}));
  const LayerView layer = cache.layer(1);
  EXPECT_EQ(layer.pages.shape_string(), "[400, 2, 8, 8]");
  EXPECT_EQ(layer.block_table.shape_string(), "[3, 2, 40]");
  EXPECT_EQ(layer.lengths.shape_string(), "[3, 2]");
  EXPECT_EQ(layer.seen.shape_string(), "[3]");
  for (int i = 0; i < 3 * 2 * 40; ++i) EXPECT_EQ(layer.block_table.ptr<int32_t>()[i], -1);
  for (int i = 0; i < 3 * 2; ++i) EXPECT_EQ(layer.lengths.ptr<int32_t>()[i], 0);
  EXPECT_EQ(cache.page_bytes(), 8u * (2 * 8 * 4 + 4));
  EXPECT_THROW(cache.layer(2), InvalidArgument);
}

TEST(KVCache, QuantisedPagesHoldScalesAndPositions) {
  for (const PageFormat format : {PageFormat::kInt8, PageFormat::kFp8}) {
    CacheConfig config = small_config();
    config.format = format;
    EXPECT_THROW(KVCache(config, device_memory({})), InvalidArgument);  // float32
    config.dtype = DType::kFloat16;
    config.head_dim = 80;
    KVCache cache(config, device_memory({}));
    const LayerView layer = cache.layer(1);
    const int64_t numbers = format == PageFormat::kInt8 ? 4 : 2;  // of an entry, in two groups
    const auto bytes = static_cast<int64_t>(cache.page_bytes());
    EXPECT_EQ(bytes, 8 * (2 * 80 + 2 * numbers * 2 + 4));
    EXPECT_EQ(layer.format(), format);
    EXPECT_EQ(layer.pages.shape_string(), "[400, 2, 8, 80]");
    EXPECT_EQ(layer.key_scales.shape_string(), "[400, 8, " + std::to_string(numbers) + "]");
    EXPECT_EQ(layer.value_scales.shape_string(), layer.key_scales.shape_string());
    // Each of the four lies behind the one before, and pages lie page_bytes() apart.
    const char* end = layer.pages.ptr<char>();
    for (const TensorView* part :
         {&layer.pages, &layer.key_scales, &layer.value_scales, &layer.page_positions}) {
      const auto size = static_cast<int64_t>(dtype_size(part->dtype));
      EXPECT_EQ(part->ptr<char>(), end);
      EXPECT_EQ(part->stride[0] * size, bytes);
      end += part->size() / 400 * size;
    }
    EXPECT_EQ(end, layer.pages.ptr<char>() + bytes);

    cache.begin(0, 0, {20}, {12});
    const int64_t used = cache.pool().num_touched() * bytes;
    for (int64_t i = 0; i < used; ++i) layer.pages.ptr<uint8_t>()[i] = static_cast<uint8_t>(i * 7);
    cache.reserve(1000, 0);
    for (int64_t i = 0; i < used; ++i) {
      ASSERT_EQ(cache.layer(0).pages.ptr<uint8_t>()[i], static_cast<uint8_t>(i * 7));
    }
  }
}

TEST(KVCache, BiasesArePartOfPlainPagesThatHaveThem) {
  CacheConfig config = small_config();
  const size_t without = KVCache(config, device_memory({})).page_bytes();
  EXPECT_FALSE(KVCache(config, device_memory({})).layer(0).page_biases);
  config.has_biases = true;
  KVCache cache(config, device_memory({}));
  const TensorView biases = cache.layer(1).page_biases;
  EXPECT_EQ(biases.shape_string(), "[400, 8]");
  EXPECT_EQ(biases.dtype, DType::kFloat16);
  EXPECT_EQ(cache.page_bytes(), without + 8 * 2);
  cache.begin(0, 0, {20}, {12});
  const int64_t used = cache.pool().num_touched() * int64_t{8};
  for (int64_t i = 0; i < used; ++i) biases.ptr<uint16_t>()[i] = static_cast<uint16_t>(i * 7);
  cache.reserve(1000, 0);
  EXPECT_EQ(cache.layer(0).page_biases.shape_string(), "[1000, 8]");
  for (int64_t i = 0; i < used; ++i) {
    ASSERT_EQ(cache.layer(0).page_biases.ptr<uint16_t>()[i], static_cast<uint16_t>(i * 7));
  }
  config.format = PageFormat::kInt8;
  config.dtype = DType::kFloat16;
  EXPECT_THROW(KVCache(config, device_memory({})), InvalidArgument);
}

TEST(KVCache, Int4PagesHaveTails) {
  CacheConfig config = small_config();
  config.format = PageFormat::kInt4;
  config.dtype = DType::kFloat16;
  config.head_dim = 80;
  EXPECT_THROW(KVCache(config, device_memory({})), InvalidArgument);  // pages of 8 entries
  config.page_size = 32;
  KVCache cache(config, device_memory({}));
  const LayerView layer = cache.layer(1), all = cache.all_layers();
  EXPECT_EQ(layer.format(), PageFormat::kInt4);
  EXPECT_EQ(layer.pages.shape_string(), "[400, 2, 32, 40]");
  EXPECT_EQ(layer.key_scales.shape_string(), "[400, 2, 80]");
  EXPECT_EQ(layer.value_scales.shape_string(), "[400, 32, 4]");
  EXPECT_EQ(layer.tails.shape_string(), "[3, 2, 64, 80]");
  EXPECT_EQ(all.tails.shape_string(), "[6, 2, 64, 80]");
  EXPECT_EQ(layer.tails.ptr<uint16_t>(), all.tails.ptr<uint16_t>() + 3 * 2 * 64 * 80);
  EXPECT_EQ(cache.page_bytes(), 32u * 80 + 4u * 80 + 32u * 4 * 2 + 32u * 4);
  EXPECT_EQ(cache.tail_bytes(), 2u * 2 * 64 * 80 * 2);
  EXPECT_EQ(layer.page_positions.ptr<char>() + 32 * 4,
            layer.pages.ptr<char>() + cache.page_bytes());

  EXPECT_EQ(cache.bytes_used(), 0u);
  cache.begin(0, 1, {20}, {12});
  EXPECT_EQ(cache.bytes_used(), cache.pool().num_used() * cache.page_bytes() + cache.tail_bytes());
  for (int64_t i = 0; i < all.tails.size(); ++i) all.tails.ptr<uint16_t>()[i] = 7;
  cache.reserve(1000, 50);
  EXPECT_EQ(cache.layer(1).tails.data, layer.tails.data);
  EXPECT_EQ(cache.layer(1).tails.ptr<uint16_t>()[99], 7);
}

TEST(KVCache, ReserveKeepsWhatItHolds) {
  NotingMemory memory;
  KVCache cache(small_config(), memory);
  const PageList first = cache.begin(0, 0, {20}, {12});
  cache.begin(1, 0, {20}, {12});
  cache.grow({3, 0, 0}, 3);
  const LayerView before = cache.layer(1);
  const auto same_memory = [](const TensorView& a, const TensorView& b) {
    return a.data == b.data && a.shape_string() == b.shape_string();
  };
  // What the device wrote: entries, positions, tables and lengths.
  for (int64_t i = 0; i < cache.pool().num_touched() * before.pages.stride[0]; ++i) {
    before.pages.ptr<float>()[i] = static_cast<float>(i);
  }
  for (int64_t i = 0; i < cache.pool().num_touched() * 8; ++i) {
    before.page_positions.ptr<int32_t>()[i] = static_cast<int32_t>(i + 5);
  }
  for (int64_t i = 0; i < before.block_table.size(); ++i) {
    before.block_table.ptr<int32_t>()[i] = static_cast<int32_t>(i);
  }
  before.lengths.ptr<int32_t>()[0] = 12;

  cache.reserve(0, 0);
  cache.reserve(400, 40);
  EXPECT_TRUE(same_memory(cache.layer(1).pages, before.pages));
  EXPECT_TRUE(same_memory(cache.layer(1).block_table, before.block_table));
  EXPECT_THROW(cache.reserve(-1, 0), InvalidArgument);
  EXPECT_THROW(cache.reserve(0, -1), InvalidArgument);
  EXPECT_THROW(cache.reserve(std::numeric_limits<int32_t>::max(), 70), Error);
  EXPECT_EQ(cache.config().num_pages, 400);
  EXPECT_EQ(cache.pool().num_pages(), 400);
  EXPECT_TRUE(same_memory(cache.layer(1).pages, before.pages));
  EXPECT_TRUE(same_memory(cache.layer(1).block_table, before.block_table));

  const std::shared_ptr<const void> old = cache.holder();
  cache.reserve(1000, 0);
  EXPECT_TRUE(same_memory(cache.layer(1).block_table, before.block_table));
  cache.reserve(0, 70);
  const LayerView after = cache.layer(1);
  EXPECT_EQ(cache.config().num_pages, 1000);
  EXPECT_EQ(cache.config().max_row_pages, 70);
  EXPECT_EQ(after.pages.shape_string(), "[1000, 2, 8, 8]");
  EXPECT_EQ(after.page_positions.shape_string(), "[1000, 8]");
  EXPECT_EQ(after.block_table.shape_string(), "[3, 2, 70]");
  for (int64_t i = 0; i < cache.pool().num_touched() * before.pages.stride[0]; ++i) {
    ASSERT_EQ(after.pages.ptr<float>()[i], static_cast<float>(i));
  }
  for (int64_t i = 0; i < cache.pool().num_touched() * 8; ++i) {
    ASSERT_EQ(after.page_positions.ptr<int32_t>()[i], static_cast<int32_t>(i + 5));
  }
  for (int64_t row = 0; row < 6; ++row) {
    for (int64_t i = 0; i < 70; ++i) {
      ASSERT_EQ(after.block_table.ptr<int32_t>()[row * 70 + i],
                i < 40 ? static_cast<int32_t>(row * 40 + i) : -1);
    }
  }
  EXPECT_TRUE(same_memory(after.lengths, before.lengths));
  EXPECT_TRUE(same_memory(after.seen, before.seen));
  EXPECT_TRUE(same_memory(after.fresh_pages, before.fresh_pages));
  EXPECT_EQ(before.block_table.ptr<int32_t>()[1], 1);  // stale, but there: `old` holds it

  // And it goes on with the pages that were owned, and with new ones.
  EXPECT_EQ(cache.num_pages(0, 0), static_cast<int32_t>(first.ids.size()));
  cache.begin(0, 1, {7000}, {70 * 8});
  EXPECT_THROW(cache.begin(1, 1, {10}, {70 * 8 + 1}), Error);
  EXPECT_EQ(cache.pool().num_free(), 1000 - cache.pool().num_used());
  cache.remove(0);
  cache.remove(1);
  EXPECT_EQ(cache.pool().num_free(), 1000);
}

TEST(KVCache, RowsHaveNoMoreColumnsThanThePoolHasPages) {
  KVCache cache(small_config(), device_memory({}));
  const LayerView before = cache.layer(1);
  const int32_t most = std::numeric_limits<int32_t>::max();
  cache.reserve(0, most);
  EXPECT_EQ(cache.config().max_row_pages, most);
  EXPECT_EQ(cache.layer(1).block_table.shape_string(), "[3, 2, 400]");
  EXPECT_EQ(cache.layer(1).pages.data, before.pages.data);
  cache.reserve(500, 0);
  EXPECT_EQ(cache.layer(1).block_table.shape_string(), "[3, 2, 500]");
}

TEST(KVCache, SaysWhatRowsGrowTo) {
  KVCache cache(small_config(), device_memory({}));
  EXPECT_EQ(cache.row_pages_to_grow({0, 0, 0}), 0);
  for (int layer : {0, 1}) cache.begin(layer, 1, {20}, {12});
  EXPECT_EQ(cache.row_pages_to_grow({0, 4, 0}), 2);
  EXPECT_EQ(cache.row_pages_to_grow({0, 5, 0}), 3);
  EXPECT_THROW(cache.row_pages_to_grow({0, -1, 0}), InvalidArgument);
  const int32_t most = 40 * 8 - 12;
  EXPECT_EQ(cache.row_pages_to_grow({0, most + 1, 0}), 41);
  EXPECT_THROW(cache.grow({0, most + 1, 0}, most + 1), Error);
  cache.reserve(0, 41);
  EXPECT_GE(cache.grow({0, most + 1, 0}, most + 1), 1);
}

// All rows that K entries can be spread over: ceil(length / P) pages each, and a fresh one.
TEST(KVCache, PagesAreEnoughForEverySpread) {
  for (int total = 0; total <= 60; ++total) {
    for (int a = 0; a <= total; ++a) {
      for (int b = 0; a + b <= total; ++b) {
        const int c = total - a - b;
        ASSERT_LE((a + 7) / 8 + (b + 7) / 8 + (c + 7) / 8 + 3, KVCache::pages_for(total, 0, 3, 8));
      }
    }
  }
}

TEST(KVCache, BeginTakesAllOrNothing) {
  KVCache cache(small_config(), device_memory({}));
  EXPECT_THROW(cache.begin(0, 0, {100, 100000}, {50, 50}), Error);
  EXPECT_THROW(cache.begin(0, 0, {100, 100}, {50, 321}), Error);  // 321 entries are 41 pages
  EXPECT_THROW(cache.begin(0, 2, {100, 100}, {50, 50}), InvalidArgument);
  EXPECT_EQ(cache.pool().num_used(), 0);
  const PageList pages = cache.begin(0, 0, {100, 10}, {50, 10});
  EXPECT_EQ(pages.indptr, (std::vector<int32_t>{0, 16, 21}));
  EXPECT_EQ(cache.pool().num_used(), 21);
  EXPECT_THROW(cache.begin(0, 1, {10}, {10}), InvalidArgument);  // not twice
  cache.remove(0);
  cache.remove(1);
  EXPECT_EQ(cache.pool().num_used(), 0);
}

TEST(KVCache, BeginsAgainWithItsOwnPages) {
  KVCache cache(small_config(), device_memory({}));
  std::vector<PageList> first;
  for (int32_t layer : {0, 1}) first.push_back(cache.begin(layer, 0, {100, 100}, {50, 50}));
  cache.grow({20, 20, 0}, 20);
  const int32_t others = 2 * cache.num_pages(0, 1);
  const auto keep = [&](int64_t a, int64_t b) { return cache.begin_again(0, {{a}, {b}}, {70}); };
  EXPECT_THROW(keep(20, 100000), Error);
  EXPECT_THROW(keep(20, -1), InvalidArgument);
  EXPECT_THROW(cache.begin_again(0, {{20}}, {70}), InvalidArgument);
  EXPECT_THROW(cache.begin_again(0, {{20}, {20}}, {321}), Error);  // of 41 pages
  EXPECT_THROW(cache.begin_again(1, {{20, 20}, {20, 20}}, {70, 70}), InvalidArgument);
  EXPECT_EQ(cache.pool().num_used(), 2 * others);
  EXPECT_EQ(cache.row_pages_to_grow({1, 0, 0}), 9);  // 50 + 20 + 1

  const std::vector<PageList> pages = keep(20, 30);
  ASSERT_EQ(pages.size(), 2u);
  EXPECT_EQ(pages[0].indptr, (std::vector<int32_t>{0, 6}));
  EXPECT_EQ(pages[1].indptr, (std::vector<int32_t>{0, 7}));
  for (int l : {0, 1}) {  // those that it has had longest
    const auto begin = first[l].ids.begin();
    EXPECT_EQ(pages[l].ids, (std::vector<int32_t>{begin, begin + pages[l].indptr[1]}));
  }
  EXPECT_EQ(cache.pool().num_used(), others + 13);
  EXPECT_EQ(cache.num_pages(1, 0), 7);
  // Its rows have a fresh page each, for the next 8 tokens.
  EXPECT_EQ(cache.pages_to_grow({8, 0, 0}), 0);
  EXPECT_EQ(cache.pages_to_grow({9, 0, 0}), 4);
  cache.remove(0);
  cache.remove(1);
  EXPECT_EQ(cache.pool().num_used(), 0);
}

// Layers that were dealt pages of one another must not overwrite what the others still hold.
TEST(KVCache, BeginsAgainWithFreePages) {
  KVCache cache(small_config(), device_memory({}));
  std::vector<int32_t> held;
  for (int32_t layer : {0, 1}) {
    const std::vector<int32_t> ids = cache.begin(layer, 0, {40}, {40}).ids;
    held.insert(held.end(), ids.begin(), ids.end());
  }
  const std::vector<PageList> pages = cache.begin_again(0, {{30}, {20}}, {40}, false);
  EXPECT_EQ(pages[0].ids.size(), 7u);
  EXPECT_EQ(pages[1].ids.size(), 6u);
  for (const PageList& list : pages) {
    for (int32_t id : list.ids) EXPECT_EQ(std::count(held.begin(), held.end(), id), 0);
  }
  EXPECT_EQ(cache.pool().num_used(), 13);
  EXPECT_EQ(cache.num_pages(1, 0), 6);
}

TEST(KVCache, GrowNeedsABeginInEveryLayer) {
  KVCache cache(small_config(), device_memory({}));
  cache.begin(0, 0, {10}, {10});
  EXPECT_THROW(cache.grow({1, 0, 0}, 1), InvalidArgument);
  cache.begin(1, 0, {10}, {10});
  EXPECT_EQ(cache.grow({1, 0, 0}, 1), 1);
  EXPECT_THROW(cache.grow({1, 0}, 1), InvalidArgument);
  EXPECT_THROW(cache.grow({2, 0, 0}, 1), InvalidArgument);
}

// Counts of which the sum is more than int32 holds, or makes no sense.
TEST(KVCache, RefusesCountsThatMakeNoSense) {
  constexpr int32_t most = std::numeric_limits<int32_t>::max();
  KVCache cache(small_config(), device_memory({}));
  for (int layer : {0, 1}) cache.begin(layer, 0, {10}, {10});
  cache.grow({8, 0, 0}, 8);
  EXPECT_THROW(cache.pages_to_grow({most, 0, 0}), InvalidArgument);
  EXPECT_THROW(cache.grow({most, 0, 0}, most), InvalidArgument);
  EXPECT_THROW(cache.grow({0, 0, 0}, -1), InvalidArgument);
  EXPECT_THROW(cache.begin(0, most, {1, 1}, {1, 1}), InvalidArgument);
  EXPECT_THROW(KVCache::pages_for(1, 1, 1, 0), InvalidArgument);
}

TEST(KVCache, GrowChangesNothingIfItFails) {
  CacheConfig config = small_config();
  config.num_pages = 12;
  KVCache cache(config, device_memory({}));
  for (int layer = 0; layer < 2; ++layer) cache.begin(layer, 0, {0}, {0});
  EXPECT_EQ(cache.pool().num_free(), 4);
  for (int i = 0; i < 16; ++i) EXPECT_EQ(cache.grow({1, 0, 0}, 1), 1);
  EXPECT_EQ(cache.pool().num_free(), 0);
  EXPECT_THROW(cache.grow({1, 0, 0}, 1), Error);
  cache.remove(0);
  EXPECT_EQ(cache.pool().num_free(), 12);
}

// The two facts that spare the host from asking for lengths, by simulating rows of all phases:
// whatever is appended in whatever portions, each row finds a fresh page when it outgrows its last
// one, and pages are never taken in vain.
TEST(KVCache, FreshPagesSufficeForRowsOfEveryPhase) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 50; ++trial) {
    CacheConfig config = small_config();
    config.num_kv_heads = 8;
    config.num_pages = 20000;
    config.max_row_pages = 200;
    KVCache cache(config, device_memory({}));
    const int P = config.page_size;
    std::vector<std::vector<int>> length(3, std::vector<int>(8)), capacity = length;
    for (int b = 0; b < 3; ++b) {
      int total = 0;
      for (int h = 0; h < 8; ++h) {
        length[b][h] = random() % 30;
        capacity[b][h] = (length[b][h] + P - 1) / P * P;
        total += length[b][h];
      }
      for (int layer = 0; layer < 2; ++layer) cache.begin(layer, b, {total}, {30});
    }
    // The fresh pages as the device would see them: taken in order within an append.
    const LayerView view = cache.layer(0);
    auto fresh = [&](int b, int h, int k) {
      return view.fresh_pages
          .ptr<int32_t>()[b * view.fresh_pages.stride[0] + h * view.fresh_pages.stride[1] + k];
    };
    for (int b = 0; b < 3; ++b) {
      for (int h = 0; h < 8; ++h) {
        view.fresh_pages
            .ptr<int32_t>()[b * view.fresh_pages.stride[0] + h * view.fresh_pages.stride[1]] =
            100000 + b * 8 + h;
      }
    }
    std::vector<int> taken;
    for (int step = 0; step < 60; ++step) {
      int columns = random() % 3 ? 1 : 1 + random() % 50;
      std::vector<int32_t> num_new(3);
      for (int32_t& n : num_new) n = random() % 4 ? columns : random() % (columns + 1);
      for (int left = columns; left > 0;) {
        const int now = cache.grow(num_new, left);
        ASSERT_GE(now, 1);
        ASSERT_LE(now, left);
        for (int b = 0; b < 3; ++b) {
          const int tokens = std::max(0, now - (left - num_new[b]));
          for (int h = 0; h < 8; ++h) {
            length[b][h] += tokens;
            for (int k = 0; length[b][h] > capacity[b][h]; ++k) {
              ASSERT_LT(k, KVCache::kFreshColumns);
              const int page = fresh(b, h, k);
              ASSERT_GE(page, 0);
              taken.push_back(page);
              capacity[b][h] += P;
            }
          }
          num_new[b] -= tokens;
        }
        left -= now;
      }
      ASSERT_EQ(num_new, (std::vector<int32_t>{0, 0, 0}));
    }
    std::sort(taken.begin(), taken.end());
    ASSERT_EQ(std::unique(taken.begin(), taken.end()), taken.end()) << "a page was taken twice";
    for (int b = 0; b < 3; ++b) cache.remove(b);
    ASSERT_EQ(cache.pool().num_used(), 0);
  }
}

}  // namespace
}  // namespace adakv
