// score against its formula in ops.h, in double.
#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include "tensors.h"

namespace adakv {
namespace {

struct Shape {
  int batch, group, kv_heads, window, length;
};

// Positions that compete.
int num_candidates(const ScoreArgs& args, int seq_len, int num_queries) {
  return std::max(0, seq_len - (args.window < 0 ? num_queries : args.window));
}

// Softmax of the window's queries over one row of keys, reduced: [n].
std::vector<double> head_scores(
    const ScoreArgs& args, const Tensor& queries, const Tensor& keys, Shape s, int b, int q) {
  const int64_t dim = args.keys.shape[3];
  const int seq_len = args.seq_lens ? args.seq_lens.ptr<int32_t>()[b] : s.length;
  const int n = num_candidates(args, seq_len, s.window), heads = s.group * s.kv_heads;
  std::vector<double> scores(n, 0.0), counts(n, 0.0);
  for (int w = 0; w < s.window && n > 0; ++w) {
    const int visible = seq_len - (s.window - 1 - w) * args.stride;
    if (visible <= 0) continue;
    std::vector<double> z(visible);
    double sum = args.sink_logits ? std::exp(args.sink_logits.ptr<float>()[q]) : 0;
    for (int t = 0; t < visible; ++t) {
      double dot = 0;
      for (int64_t d = 0; d < dim; ++d) {
        dot += double(queries.get(((b * heads + q) * s.window + w) * dim + d)) *
               keys.get(((b * s.kv_heads + q / s.group) * s.length + t) * dim + d);
      }
      z[t] = dot * (args.scale != 0 ? args.scale : 1 / std::sqrt(double(dim)));
      if (args.softcap > 0) z[t] = args.softcap * std::tanh(z[t] / args.softcap);
      sum += std::exp(z[t]);
    }
    for (int t = 0; t < std::min(n, visible - args.distance); ++t) {
      const double p = std::exp(z[t]) / sum;
      scores[t] = args.window_reduce == Reduce::kMax ? std::max(scores[t], p) : scores[t] + p;
      ++counts[t];
    }
  }
  if (args.window_reduce == Reduce::kMean) {
    for (int t = 0; t < n; ++t) scores[t] /= std::max(1.0, counts[t]);
  }
  return scores;
}

std::vector<double> pooled(const std::vector<double>& x, Pool pool, int width) {
  if (pool == Pool::kNone) return x;
  const int n = static_cast<int>(x.size());
  std::vector<double> out(x.size());
  for (int t = 0; t < n; ++t) {
    double largest = -INFINITY, sum = 0;
    for (int i = std::max(0, t - width / 2); i <= std::min(n - 1, t + width / 2); ++i) {
      largest = std::max(largest, x[i]);
      sum += x[i];
    }
    out[t] = pool == Pool::kMax ? largest : sum / width;
  }
  return out;
}

// The whole formula: [B, Hkv, T].
std::vector<double> expected_scores(const ScoreArgs& args,
                                    const Tensor& queries,
                                    const Tensor& keys,
                                    Shape s) {
  std::vector<double> all;
  for (int row = 0; row < s.batch * s.kv_heads; ++row) {
    std::vector<double> total;
    for (int g = 0; g < s.group; ++g) {
      const int q = row % s.kv_heads * s.group + g;
      std::vector<double> head = head_scores(args, queries, keys, s, row / s.kv_heads, q);
      if (args.order == Order::kPoolFirst) head = pooled(head, args.pool, args.pool_width);
      if (g == 0) total.assign(head.size(), 0.0);
      for (size_t t = 0; t < head.size(); ++t) {
        if (args.group_reduce == Reduce::kMax) total[t] = std::max(total[t], head[t]);
        if (args.group_reduce == Reduce::kSum) total[t] += head[t];
        if (args.group_reduce == Reduce::kMean) total[t] += head[t] / s.group;
      }
    }
    if (args.order == Order::kGroupFirst) total = pooled(total, args.pool, args.pool_width);
    total.resize(s.length, -INFINITY);
    all.insert(all.end(), total.begin(), total.end());
  }
  return all;
}

void check(Shape s, Format format, ScoreArgs args) {
  std::mt19937 random(s.length);
  const Tensor queries({s.batch, s.group * s.kv_heads, s.window, format.head_dim}, format.dtype,
                       random);
  const Tensor keys({s.batch, s.kv_heads, s.length, format.head_dim}, format.dtype, random);
  const Tensor scores({s.batch, s.kv_heads, s.length}, DType::kFloat32);
  args.queries = queries.view;
  args.keys = keys.view;
  args.scores = scores.view;
  run(&score, args);
  expect_close(scores, expected_scores(args, queries, keys, s));
}

class ScoreFormats : public testing::TestWithParam<Format> {};
INSTANTIATE_TEST_SUITE_P(All, ScoreFormats, testing::ValuesIn(formats()));

TEST_P(ScoreFormats, FollowsTheFormula) {
  check({2, 3, 2, 5, 40}, GetParam(), {});
  check({1, 4, 1, 32, 800}, GetParam(), {});  // more than one chunk of keys
}

TEST(Score, TakesEveryOption) {
  const Format format = {DType::kFloat32, 16};
  const Tensor sinks({6}, std::vector<float>{0.f, 1.f, -2.f, 3.f, 0.5f, -0.5f});
  for (const Reduce reduce : {Reduce::kMean, Reduce::kMax, Reduce::kSum}) {
    for (const Pool pool : {Pool::kMax, Pool::kAvg, Pool::kNone}) {
      for (const Order order : {Order::kGroupFirst, Order::kPoolFirst}) {
        ScoreArgs args;
        args.window_reduce = args.group_reduce = reduce;
        args.pool = pool;
        args.order = order;
        args.pool_width = 5;
        args.softcap = 3.f;
        args.scale = 0.3f;
        args.sink_logits = sinks.view;
        check({1, 3, 2, 4, 23}, format, args);
      }
    }
  }
}

TEST(Score, TakesQueriesOfAnyPositions) {
  const Tensor seq_lens({2}, std::vector<int32_t>{400, 131});
  for (const Reduce reduce : {Reduce::kMean, Reduce::kMax, Reduce::kSum}) {
    for (const int window : {-1, 0, 7}) {
      ScoreArgs args;
      args.seq_lens = seq_lens.view;
      args.window_reduce = reduce;
      args.window = window;
      args.stride = 2;
      args.distance = 5;
      check({2, 2, 1, 40, 400}, {DType::kFloat32, 8}, args);
      args.stride = 1;
      check({2, 2, 1, 300, 400}, {DType::kBFloat16, 16}, args);
    }
  }
}

TEST(Score, LeavesShortSequencesWithoutCandidates) {
  const Tensor seq_lens({4}, std::vector<int32_t>{0, 4, 5, 12});
  ScoreArgs args;
  args.seq_lens = seq_lens.view;
  check({4, 2, 2, 4, 12}, {DType::kFloat32, 8}, args);
}

TEST(Score, TakesALogSumExpThatTheModelKnows) {
  // Two keys are visible to the one query: with lse = 0 the scores are exp(z) itself.
  const Tensor queries({1, 1, 1, 8}, std::vector<float>{1, 0, 0, 0, 0, 0, 0, 0});
  Tensor keys({1, 1, 2, 8}, DType::kFloat32);
  keys.set(0, 2.f);
  const Tensor lse({1, 1, 1}, DType::kFloat32), scores({1, 1, 2}, DType::kFloat32);
  ScoreArgs args;
  args.queries = queries.view;
  args.keys = keys.view;
  args.lse = lse.view;
  args.scale = 1;
  args.scores = scores.view;
  run(&score, args);
  expect_close(scores, {std::exp(2.0), -INFINITY});
}

}  // namespace
}  // namespace adakv
