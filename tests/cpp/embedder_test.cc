// The life of one sequence through the public headers alone, as another runtime would write it,
// against plain attention.
#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace {

using namespace adakv;

constexpr int kHq = 4, kHkv = 2, kGroup = kHq / kHkv, kDim = 16, kPrompt = 50, kWindow = 4;

struct Tensor {
  std::vector<float> data;
  TensorView view;

  Tensor(std::initializer_list<int64_t> shape) {
    int64_t size = 1;
    for (int64_t n : shape) size *= n;
    data.resize(size);
    view = TensorView(data.data(), shape, DType::kFloat32);
  }
};

struct Ints {
  std::vector<int32_t> data;
  TensorView view;

  explicit Ints(std::initializer_list<int64_t> shape) {
    int64_t size = 1;
    for (int64_t n : shape) size *= n;
    data.resize(size);
    view = TensorView(data.data(), shape, DType::kInt32);
  }
};

template <typename Args>
void run(void (*verb)(const Args&), Args& args) {
  std::vector<int32_t> workspace((workspace_bytes(args) + 3) / 4);
  args.workspace =
      TensorView(workspace.data(), {static_cast<int64_t>(workspace.size())}, DType::kInt32);
  verb(args);
}

// Attention of one query over the kept positions and the new tokens, in double.
std::vector<double> attention(const float* query,
                              const std::vector<const float*>& keys,
                              const std::vector<const float*>& values) {
  std::vector<double> weights, out(kDim);
  double sum = 0;
  for (const float* key : keys) {
    double dot = 0;
    for (int d = 0; d < kDim; ++d) dot += double(query[d]) * key[d];
    weights.push_back(std::exp(dot / std::sqrt(double(kDim))));
    sum += weights.back();
  }
  for (size_t i = 0; i < values.size(); ++i) {
    for (int d = 0; d < kDim; ++d) out[d] += weights[i] / sum * values[i][d];
  }
  return out;
}

TEST(Embedder, KeepsWhatMattersAndDecodesFromIt) {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const auto fill = [&](Tensor& tensor) {
    for (float& x : tensor.data) x = normal(random);
  };
  Tensor queries{1, kHq, kWindow, kDim}, keys{1, kHkv, kPrompt, kDim},
      values{1, kHkv, kPrompt, kDim};
  Tensor scores{1, kHkv, kPrompt};
  fill(queries), fill(keys), fill(values);

  ScoreArgs score_args;
  score_args.queries = queries.view;
  score_args.keys = keys.view;
  score_args.scores = scores.view;
  run(&score, score_args);

  const int budget = 12;
  Ints budgets{1, kHkv}, positions{kHkv * budget}, indptr{kHkv + 1};
  AllocateArgs allocate_args;
  allocate_args.scores = scores.view;
  allocate_args.budget = budget;
  allocate_args.window = kWindow;
  allocate_args.budgets = budgets.view;
  run(&allocate, allocate_args);
  EXPECT_EQ(budgets.data[0] + budgets.data[1], kHkv * budget);

  SelectArgs select_args;
  select_args.scores = scores.view;
  select_args.budgets = budgets.view;
  select_args.window = kWindow;
  select_args.positions = positions.view;
  select_args.indptr = indptr.view;
  run(&select, select_args);
  EXPECT_EQ(indptr.data[kHkv], kHkv * budget);

  CacheConfig config;
  config.num_layers = 1;
  config.num_sequences = 1;
  config.num_kv_heads = kHkv;
  config.head_dim = kDim;
  config.page_size = 8;
  config.num_pages = 40;
  config.max_row_pages = 16;
  config.dtype = DType::kFloat32;
  KVCache cache(config, device_memory({}));
  PageList pages = cache.begin(0, 0, {kHkv * budget}, {kPrompt});
  CompactArgs compact_args;
  compact_args.keys = keys.view;
  compact_args.values = values.view;
  compact_args.positions = positions.view;
  compact_args.indptr = indptr.view;
  compact_args.page_ids =
      TensorView(pages.ids.data(), {static_cast<int64_t>(pages.ids.size())}, DType::kInt32);
  compact_args.page_indptr = TensorView(pages.indptr.data(), {2}, DType::kInt32);
  compact_args.layer = cache.layer(0);
  run(&compact, compact_args);

  const int workers = default_num_workers({}), steps = 20;
  Ints schedule{1, schedule_size(kHkv, workers)};
  Tensor new_keys{steps, kHkv, kDim}, new_values{steps, kHkv, kDim}, query{1, kHq, 1, kDim},
      out{1, kHq, 1, kDim};
  fill(new_keys), fill(new_values);
  for (int step = 0; step < steps; ++step) {
    ASSERT_EQ(cache.grow({1}, 1), 1);
    PlanArgs plan_args;
    plan_args.lengths = cache.all_layers().lengths;
    plan_args.block_table = cache.all_layers().block_table;
    plan_args.fresh_pages = cache.all_layers().fresh_pages;
    plan_args.page_size = config.page_size;
    plan_args.num_workers = workers;
    plan_args.schedule = schedule.view;
    plan(plan_args);

    fill(query);
    AttendArgs attend_args;
    attend_args.queries = query.view;
    attend_args.layer = cache.layer(0);
    attend_args.schedule = schedule.view.select(0);
    attend_args.num_workers = workers;
    attend_args.keys =
        TensorView(new_keys.data.data() + step * kHkv * kDim, {1, kHkv, 1, kDim}, DType::kFloat32);
    attend_args.values = TensorView(new_values.data.data() + step * kHkv * kDim, {1, kHkv, 1, kDim},
                                    DType::kFloat32);
    attend_args.out = out.view;
    run(&attend, attend_args);

    for (int q = 0; q < kHq; ++q) {
      const int h = q / kGroup;
      std::vector<const float*> k, v;
      for (int i = indptr.data[h]; i < indptr.data[h + 1]; ++i) {
        k.push_back(&keys.data[(h * kPrompt + positions.data[i]) * kDim]);
        v.push_back(&values.data[(h * kPrompt + positions.data[i]) * kDim]);
      }
      for (int s = 0; s <= step; ++s) {
        k.push_back(&new_keys.data[(s * kHkv + h) * kDim]);
        v.push_back(&new_values.data[(s * kHkv + h) * kDim]);
      }
      const std::vector<double> expected = attention(&query.data[q * kDim], k, v);
      for (int d = 0; d < kDim; ++d)
        ASSERT_NEAR(out.data[q * kDim + d], expected[d], 1e-5) << "step " << step;
    }
  }
  cache.remove(0);
  EXPECT_EQ(cache.pool().num_used(), 0);
}

TEST(Embedder, HearsWhatIsWrong) {
  ScoreArgs args;
  EXPECT_THROW(score(args), InvalidArgument);
  EXPECT_THROW(workspace_bytes(args), InvalidArgument);
  if (!cuda_available()) {
    EXPECT_THROW(device_memory({DeviceType::kCuda, 0}), Error);
  }
}

}  // namespace
