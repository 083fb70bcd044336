// fork: what a branch shares, what it gets for itself, and that nobody sees another's tokens; in C++
// and in C. Random histories are in tests/fuzz/history.cc.
#include <adakv/adakv.h>
#include <adakv/c.h>
#include <gtest/gtest.h>

#include <memory>

#include "layer.h"
#include "tensors.h"

namespace adakv {
namespace {

using Ints = std::vector<int32_t>;

constexpr int kDim = 8, kPageSize = 8, kHeads = 2;

CacheConfig config_of(int32_t num_pages) {
  CacheConfig config;
  config.num_layers = 1;
  config.num_sequences = 1;
  config.num_kv_heads = kHeads;
  config.head_dim = kDim;
  config.page_size = kPageSize;
  config.num_pages = num_pages;
  config.max_row_pages = 20;
  config.dtype = DType::kFloat32;
  return config;
}

// Rows of 11 and 8 entries: a page that is full and one that isn't, and a full one.
struct Filled {
  KVCache cache;
  std::mt19937 random{0};

  explicit Filled(int32_t num_pages = 60) : cache(config_of(num_pages), device_memory({})) {
    const Tensor keys({1, kHeads, 11, kDim}, DType::kFloat32, random);
    Ints positions, indptr = {0, 11, 19};
    for (int i = 0; i < 19; ++i) positions.push_back(i < 11 ? i : i - 11);
    PageList pages = cache.begin(0, 0, {19}, {11});
    const Tensor where({19}, positions), ends({3}, indptr),
        ids({static_cast<int64_t>(pages.ids.size())}, pages.ids), starts({2}, pages.indptr);
    CompactArgs args;
    args.keys = args.values = keys.view;
    args.positions = where.view;
    args.indptr = ends.view;
    args.page_ids = ids.view;
    args.page_indptr = starts.view;
    args.layer = cache.layer(0);
    compact(args);
  }
};

void append_to(KVCache& cache, int count, std::mt19937& random) {
  const int32_t batch = cache.config().num_sequences;
  for (int i = 0; i < count; ++i) {
    ASSERT_EQ(cache.grow(Ints(batch, 1), 1), 1);
    const Tensor keys({batch, kHeads, 1, kDim}, DType::kFloat32, random);
    AppendArgs args;
    args.keys = args.values = keys.view;
    args.layer = cache.layer(0);
    append(args);
  }
}

// Fills what fork() or fork_into() made.
void fill(const LayerView& from,
          const LayerView& rows,
          const Fork& made,
          Ints sources,
          Ints back = {},
          bool whole = false) {
  const auto count = static_cast<int64_t>(sources.size());
  PageList pages = made.pages[0];
  const Tensor named({count}, sources), stretch({count}, made.stretch),
      ids({static_cast<int64_t>(pages.ids.size())}, pages.ids), starts({count + 1}, pages.indptr),
      backs({count}, back.empty() ? Ints(count) : back);
  ForkArgs args;
  args.source_table = from.block_table;
  args.source_lengths = from.lengths;
  args.source_seen = from.seen;
  args.sources = named.view;
  args.stretch = stretch.view;
  args.back = backs.view;
  args.page_ids = ids.view;
  args.page_indptr = starts.view;
  args.whole = whole;
  args.layer = rows;
  fork(args);
}

std::unique_ptr<KVCache> forked(KVCache& cache, Ints sources, Ints back = {}, bool whole = false) {
  Fork made = cache.fork(sources, back, whole);
  fill(cache.layer(0), made.cache->layer(0), made, sources, back, whole);
  return std::move(made.cache);
}

void expect_same(const KVCache& a, const KVCache& b, int32_t sequence, int less = 0) {
  for (int h = 0; h < kHeads; ++h) {
    const std::vector<Entry> x = entries_of(a.layer(0), 0, h);
    const std::vector<Entry> y = entries_of(b.layer(0), sequence, h);
    ASSERT_EQ(x.size(), y.size() + less);
    for (size_t i = 0; i < y.size(); ++i) {
      EXPECT_EQ(x[i].position, y[i].position);
      EXPECT_EQ(x[i].key, y[i].key);
      EXPECT_EQ(x[i].value, y[i].value);
    }
  }
}

TEST(Fork, SharesAllButTheLastPages) {
  Filled filled;
  KVCache& cache = filled.cache;
  const int32_t before = cache.pool().num_used();
  EXPECT_FALSE(cache.is_shared(0));
  const std::unique_ptr<KVCache> branch = forked(cache, {0, 0});
  EXPECT_TRUE(cache.is_shared(0));
  EXPECT_EQ(cache.pool().num_used(), before + 2 * 2 * kHeads);
  const auto table = [](const KVCache& of, int64_t i) {
    return of.layer(0).block_table.ptr<int32_t>()[i];
  };
  EXPECT_EQ(table(*branch, 0), table(cache, 0));  // the full one
  EXPECT_NE(table(*branch, 1), table(cache, 1));
  for (int b : {0, 1}) expect_same(cache, *branch, b);
}

TEST(Fork, BranchesGoOnByThemselves) {
  Filled filled(200);
  for (int steps : {0, 1, 7, 8, 9, 30}) {
    append_to(filled.cache, steps, filled.random);
    const std::unique_ptr<KVCache> kept = forked(filled.cache, {0}, {}, true);
    const std::unique_ptr<KVCache> branch = forked(filled.cache, {0, 0});
    append_to(*branch, 20, filled.random);
    expect_same(*kept, filled.cache, 0);
    const std::unique_ptr<KVCache> back = forked(*branch, {1}, {20});
    expect_same(*kept, *back, 0);
  }
}

TEST(Fork, GoesIntoAnEmptySequenceOfTheSameCache) {
  Filled filled;
  const std::unique_ptr<KVCache> both = forked(filled.cache, {0, 0});
  const int32_t used = both->pool().num_used();
  EXPECT_THROW(both->fork_into(1, {0}), InvalidArgument);  // it holds something
  EXPECT_THROW(both->fork_into(2, {0}), InvalidArgument);
  EXPECT_EQ(both->pool().num_used(), used);
  both->remove(1);
  LayerView second = both->layer(0);
  for (TensorView* x : {&second.block_table, &second.lengths, &second.seen, &second.fresh_pages}) {
    *x = x->narrow(0, 1, 1);
  }
  const Fork made = both->fork_into(1, {0});
  EXPECT_EQ(made.cache, nullptr);
  fill(both->layer(0), second, made, {0});
  EXPECT_EQ(both->pool().num_used(), used);
  append_to(*both, 10, filled.random);
  for (int h = 0; h < kHeads; ++h) {
    EXPECT_EQ(entries_of(both->layer(0), 0, h).size(), entries_of(both->layer(0), 1, h).size());
  }
}

TEST(Fork, PagesAreFreeWhenNobodyHasThem) {
  auto filled = std::make_unique<Filled>();
  const std::unique_ptr<KVCache> branch = forked(filled->cache, {0});
  filled.reset();  // the first cache goes first
  branch->remove(0);
  EXPECT_EQ(branch->pool().num_used(), 0);
  EXPECT_EQ(branch->pool().num_free(), 60);
}

TEST(Fork, ASequenceThatHoldsNothingBegins) {
  Filled filled;
  filled.cache.remove(0);
  const std::unique_ptr<KVCache> branch = forked(filled.cache, {0});
  EXPECT_EQ(branch->pool().num_used(), 0);
  const size_t taken = branch->begin(0, 0, {19}, {11}).ids.size();
  const Fork again = branch->fork({0});
  EXPECT_EQ(again.cache->num_pages(0, 0), static_cast<int32_t>(taken) + 2 * kHeads);
}

TEST(Fork, ThePoolGrowsForAll) {
  Filled filled(20);
  const std::unique_ptr<KVCache> branch = forked(filled.cache, {0});
  branch->reserve(200, 0);
  EXPECT_EQ(filled.cache.config().num_pages, 200);
  EXPECT_EQ(filled.cache.layer(0).pages.data, branch->layer(0).pages.data);
  expect_same(filled.cache, *branch, 0);
}

TEST(Fork, EntriesOfSharedPagesDoNotMove) {
  Filled filled;
  const std::unique_ptr<KVCache> branch = forked(filled.cache, {0});
  EXPECT_THROW(branch->begin_again(0, {{9}}, {9}), InvalidArgument);
  EXPECT_THROW(filled.cache.begin_again(0, {{9}}, {9}), InvalidArgument);
  const std::unique_ptr<KVCache> own = forked(*branch, {0}, {}, true);
  EXPECT_EQ(own->begin_again(0, {{9}}, {9}).size(), 1u);
}

TEST(Fork, RefusesWhatMakesNoSense) {
  Filled filled(12);
  KVCache& cache = filled.cache;
  const int32_t free = cache.pool().num_free();
  EXPECT_THROW(cache.fork({}), InvalidArgument);
  EXPECT_THROW(cache.fork({1}), InvalidArgument);
  EXPECT_THROW(cache.fork({0}, {-1}), InvalidArgument);
  EXPECT_THROW(cache.fork({0}, {1, 2}), InvalidArgument);
  EXPECT_THROW(cache.fork({0, 0, 0, 0, 0, 0}), Error);
  EXPECT_EQ(cache.pool().num_free(), free);
  EXPECT_THROW(forked(cache, {0}, {9}), InvalidArgument);  // a row of 8 entries
  EXPECT_EQ(cache.pool().num_free(), free);
  ForkArgs args;
  args.layer = cache.layer(0);
  EXPECT_THROW(fork(args), InvalidArgument);
}

TEST(Fork, IsThereInC) {
  AdakvCacheConfig config = {};
  config.num_layers = config.num_sequences = config.num_kv_heads = 1;
  config.head_dim = config.page_size = 8;
  config.num_pages = config.max_row_pages = 20;
  config.dtype = {2, 32, 1};
  config.device = {1, 0};
  AdakvCache *cache = nullptr, *branch = nullptr;
  ASSERT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_OK);
  AdakvPageList begun = {}, pages = {};
  const int64_t kept = 5;
  ASSERT_EQ(adakv_cache_begin(cache, 0, 0, 1, &kept, &kept, &begun), ADAKV_OK);
  const Ints sources = {0, 0};
  Ints stretch = {7, 7};
  EXPECT_EQ(adakv_cache_fork(cache, nullptr, 2, nullptr, 0, nullptr, &branch, &pages, nullptr),
            ADAKV_INVALID_ARGUMENT);
  ASSERT_EQ(adakv_cache_fork(cache, sources.data(), 2, nullptr, 0, nullptr, &branch, &pages,
                             stretch.data()),
            ADAKV_OK);
  EXPECT_EQ(stretch, (Ints{0, 0}));
  EXPECT_EQ(pages.num_ids, 4);
  EXPECT_EQ(adakv_cache_is_shared(cache, 0), 1);
  EXPECT_EQ(adakv_cache_is_shared(cache, 1), -1);
  AdakvLayer from, to;
  ASSERT_EQ(adakv_cache_reserve(branch, 40, 0, nullptr), ADAKV_OK);  // both follow
  ASSERT_EQ(adakv_cache_layer(cache, 0, &from), ADAKV_OK);
  ASSERT_EQ(adakv_cache_layer(branch, 0, &to), ADAKV_OK);
  EXPECT_EQ(from.pages->data, to.pages->data);
  adakv_cache_destroy(cache);
  EXPECT_EQ(adakv_cache_num_free(branch), 40 - 2 - 4);
  EXPECT_EQ(adakv_cache_fork_into(branch, 1, sources.data(), 1, nullptr, 0, &pages, stretch.data()),
            ADAKV_INVALID_ARGUMENT);
  ASSERT_EQ(adakv_cache_remove(branch, 1, nullptr), ADAKV_OK);
  ASSERT_EQ(adakv_cache_fork_into(branch, 1, sources.data(), 1, nullptr, 0, &pages, stretch.data()),
            ADAKV_OK);
  EXPECT_EQ(pages.num_ids, 2);
  EXPECT_EQ(adakv_cache_is_shared(branch, 0), 1);  // with the other branch
  adakv_cache_destroy(branch);
}

}  // namespace
}  // namespace adakv
