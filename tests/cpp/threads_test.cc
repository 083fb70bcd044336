// What several threads may do at once, see kv_cache.h and ops.h. Worth most under ThreadSanitizer
// (`make test-tsan`).
#include <adakv/adakv.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "layer.h"
#include "tensors.h"

namespace adakv {
namespace {

constexpr int kKvHeads = 2, kGroup = 2, kDim = 16, kPrompt = 40, kKept = 10, kThreads = 4;

CacheConfig config(int num_layers) {
  CacheConfig config;
  config.num_layers = num_layers;
  config.num_sequences = 1;
  config.num_kv_heads = kKvHeads;
  config.head_dim = kDim;
  config.num_pages = 40 * num_layers;
  config.max_row_pages = 20;
  config.dtype = DType::kFloat32;
  return config;
}

// What one thread does in one layer, on tensors of its own.
struct LayerWork {
  KVCache& cache;
  int layer;
  std::mt19937 random{7};
  std::vector<float> outs = {};

  void fill(const PageList& pages) {
    const Tensor keys({1, kKvHeads, kPrompt, kDim}, DType::kFloat32, random),
        values({1, kKvHeads, kPrompt, kDim}, DType::kFloat32, random),
        queries({1, kKvHeads * kGroup, 4, kDim}, DType::kFloat32, random);
    const Tensor scores({1, kKvHeads, kPrompt}, DType::kFloat32);
    const Tensor budgets({1, kKvHeads}, DType::kInt32);
    const Tensor positions({kKvHeads * kKept}, DType::kInt32), indptr({3}, DType::kInt32);
    ScoreArgs score_args;
    score_args.queries = queries.view;
    score_args.keys = keys.view;
    score_args.scores = scores.view;
    run(&score, score_args);
    AllocateArgs allocate_args;
    allocate_args.scores = scores.view;
    allocate_args.budget = kKept;
    allocate_args.window = 4;
    allocate_args.budgets = budgets.view;
    run(&allocate, allocate_args);
    SelectArgs select_args;
    select_args.scores = scores.view;
    select_args.budgets = budgets.view;
    select_args.window = 4;
    select_args.positions = positions.view;
    select_args.indptr = indptr.view;
    run(&select, select_args);
    const Tensor ids({static_cast<int64_t>(pages.ids.size())}, pages.ids),
        id_indptr({2}, pages.indptr);
    CompactArgs args;
    args.keys = keys.view;
    args.values = values.view;
    args.positions = positions.view;
    args.indptr = indptr.view;
    args.page_ids = ids.view;
    args.page_indptr = id_indptr.view;
    args.layer = cache.layer(layer);
    run(&compact, args);
  }

  // One new token; room was made before.
  void step() {
    const LayerView view = cache.layer(layer);
    const Tensor schedule({1, schedule_size(kKvHeads, 8)}, DType::kInt32);
    PlanArgs plan_args;
    plan_args.lengths = TensorView(view.lengths.data, {1, 1, kKvHeads}, DType::kInt32);
    plan_args.block_table = TensorView(view.block_table.data,
                                       {1, 1, kKvHeads, view.block_table.shape[2]}, DType::kInt32);
    plan_args.fresh_pages =
        TensorView(view.fresh_pages.data, {1, 1, kKvHeads, KVCache::kFreshColumns}, DType::kInt32);
    plan_args.num_workers = 8;
    plan_args.schedule = schedule.view;
    plan(plan_args);
    const Tensor keys({1, kKvHeads, 1, kDim}, DType::kFloat32, random),
        values({1, kKvHeads, 1, kDim}, DType::kFloat32, random),
        queries({1, kKvHeads * kGroup, 1, kDim}, DType::kFloat32, random),
        out({1, kKvHeads * kGroup, 1, kDim}, DType::kFloat32);
    AttendArgs args;
    args.queries = queries.view;
    args.layer = view;
    args.schedule = schedule.view.select(0);
    args.keys = keys.view;
    args.values = values.view;
    args.num_workers = 8;
    args.out = out.view;
    run(&attend, args);
    for (int64_t i = 0; i < out.view.size(); ++i) outs.push_back(out.get(i));
  }
};

template <typename Work>
void on_threads(int count, const Work& work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back([&, i] { work(i); });
  for (std::thread& thread : threads) thread.join();
}

std::vector<float> life_of_a_cache() {
  KVCache cache(config(1), device_memory({}));
  LayerWork work{cache, 0};
  work.fill(cache.begin(0, 0, {kKvHeads * kKept}, {kPrompt}));
  for (int step = 0; step < 20; ++step) {
    cache.grow({1}, 1);
    work.step();
  }
  cache.remove(0);
  EXPECT_EQ(cache.pool().num_used(), 0);
  return work.outs;
}

TEST(Threads, EachMayHaveACache) {
  const std::vector<float> alone = life_of_a_cache();
  set_num_threads(3);  // verbs of all callers share these
  std::vector<std::vector<float>> outs(kThreads);
  on_threads(kThreads, [&](int i) { outs[i] = life_of_a_cache(); });
  set_num_threads(1);
  for (const std::vector<float>& out : outs) EXPECT_EQ(out, alone);
}

// begin, grow and remove are for one thread; the verbs of different layers may run at once, while
// others look at the cache.
TEST(Threads, EachMayHaveALayer) {
  const std::vector<float> alone = life_of_a_cache();
  set_num_threads(2);
  KVCache cache(config(kThreads), device_memory({}));
  std::vector<LayerWork> work;
  std::vector<PageList> pages;
  for (int i = 0; i < kThreads; ++i) {
    work.push_back({cache, i});
    pages.push_back(cache.begin(i, 0, {kKvHeads * kKept}, {kPrompt}));
  }
  on_threads(kThreads, [&](int i) { work[i].fill(pages[i]); });
  for (int step = 0; step < 20; ++step) {
    cache.grow({1}, 1);
    on_threads(kThreads + 1, [&](int i) {
      if (i < kThreads) {
        work[i].step();
      } else {
        EXPECT_EQ(cache.pool().num_free() + cache.pool().num_used(), cache.config().num_pages);
        EXPECT_GT(cache.num_pages(0, 0), 0);
      }
    });
  }
  set_num_threads(1);
  for (const LayerWork& layer : work) EXPECT_EQ(layer.outs, alone);
}

// The threads stay behind in the parent: a child that waited for them would wait for ever.
TEST(Threads, AChildAfterForkHasThreadsOfItsOwn) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "ThreadSanitizer starts no threads after fork()";
#endif
  set_num_threads(3);
  const std::vector<float> before = life_of_a_cache();
  const pid_t child = ::fork();
  if (child == 0) {
    alarm(60);
    _exit(life_of_a_cache() == before ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(life_of_a_cache(), before);
  set_num_threads(1);
}

TEST(Threads, ErrorsReachTheirCaller) {
  set_num_threads(3);
  on_threads(kThreads, [&](int i) {
    Layer layer(1, 2, 8, 8, 4, 2, 1);
    layer.lengths.view.ptr<int32_t>()[1] = i % 2 ? 99 : 0;
    const Tensor schedule({4, schedule_size(2, 1)}, DType::kInt32);
    PlanArgs args;
    args.lengths = TensorView(layer.lengths.view.data, {4, 1, 2}, DType::kInt32);
    args.block_table = TensorView(layer.block_table.view.data, {4, 1, 2, 2}, DType::kInt32);
    args.fresh_pages = TensorView(layer.fresh_pages.view.data, {4, 1, 2, 1}, DType::kInt32);
    for (TensorView* view : {&args.lengths, &args.block_table, &args.fresh_pages}) {
      view->stride[0] = 0;  // four layers with the same rows
    }
    args.page_size = 8;
    args.num_workers = 1;
    args.schedule = schedule.view;
    for (int repeat = 0; repeat < 50; ++repeat) {
      EXPECT_EQ(complaint([&] { plan(args); }),
                i % 2 ? "plan: lengths must lie in 0 .. M * P = 16, got 99" : "");
    }
  });
  set_num_threads(1);
}

}  // namespace
}  // namespace adakv
