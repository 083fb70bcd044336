// select on examples worked out by hand, and against sorting.
#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include <numeric>

#include "tensors.h"

namespace adakv {
namespace {

using Ints = std::vector<int32_t>;

SelectArgs args_of(const Tensor& scores,
                   const Tensor& budgets,
                   const Tensor& positions,
                   const Tensor& indptr) {
  SelectArgs args;
  args.scores = scores.view;
  args.budgets = budgets.view;
  args.positions = positions.view;
  args.indptr = indptr.view;
  return args;
}

// Positions that one row keeps.
Ints kept_of(const std::vector<float>& scores, int budget, const std::vector<float>& norms = {}) {
  const auto length = static_cast<int64_t>(scores.size());
  const Tensor in({1, 1, length}, scores), weights({1, 1, length}, norms);
  const Tensor budgets({1, 1}, Ints{budget}), positions({budget}, DType::kInt32),
      indptr({2}, DType::kInt32);
  SelectArgs args = args_of(in, budgets, positions, indptr);
  if (!norms.empty()) args.norms = weights.view;
  run(&select, args);
  EXPECT_EQ(indptr.ints(), (Ints{0, budget}));
  return positions.ints();
}

TEST(Select, TakesTheBestAndTheEarlierOfEqualOnes) {
  EXPECT_EQ(kept_of({.12f, .20f, .06f, .14f, .09f, .15f, .11f, .13f}, 5), (Ints{0, 1, 3, 5, 7}));
  EXPECT_EQ(kept_of({.1f, .9f, .9f, .9f, .8f, .8f, .8f, .1f}, 5), (Ints{1, 2, 3, 4, 5}));
  EXPECT_EQ(kept_of({NAN, -INFINITY, 0.f, -0.f, INFINITY}, 3), (Ints{2, 3, 4}));
}

// CriticalKV, arXiv 2502.03805, Algorithm 1.
TEST(Select, TakesTheRestByWhatItCanMove) {
  const std::vector<float> scores = {.30f, .25f, .05f, .20f, .15f, .05f},
                           norms = {1, .5f, 10, 1, 1.8f, 5};
  EXPECT_EQ(kept_of(scores, 4), (Ints{0, 1, 3, 4}));
  EXPECT_EQ(kept_of(scores, 4, norms), (Ints{0, 1, 2, 4}));
}

TEST(Select, KeepsTheWindowAndClampsBudgets) {
  const Tensor scores({2, 1, 6}, std::vector<float>{5, 4, 3, 2, 1, 0, 0, 1, 2, 3, 4, 5});
  const Tensor budgets({2, 1}, Ints{-7, 99}), seq_lens({2}, Ints{6, 3});
  const Tensor positions({8}, DType::kInt32), indptr({3}, DType::kInt32);
  SelectArgs args = args_of(scores, budgets, positions, indptr);
  args.seq_lens = seq_lens.view;
  args.window = 2;
  run(&select, args);
  EXPECT_EQ(indptr.ints(), (Ints{0, 2, 5}));
  EXPECT_EQ(positions.ints(), (Ints{4, 5, 0, 1, 2, -1, -1, -1}));
}

TEST(Select, ChangesNothingIfPositionsAreTooFew) {
  const Tensor scores({1, 1, 6}, DType::kFloat32), budgets({1, 1}, Ints{5});
  const Tensor positions({4}, Ints{7, 7, 7, 7}), indptr({2}, Ints{7, 7});
  const SelectArgs args = args_of(scores, budgets, positions, indptr);
  EXPECT_EQ(complaint([&] { run(&select, args); }),
            "select: positions must hold the sum of the budgets, 5, got room for 4");
  EXPECT_EQ(positions.ints(), (Ints{7, 7, 7, 7}));
  EXPECT_EQ(indptr.ints(), (Ints{7, 7}));
}

TEST(Select, AgreesWithSorting) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 200; ++trial) {
    const int length = 1 + random() % 1500, budget = random() % (length + 1);
    std::vector<float> scores(length);
    for (float& x : scores) x = static_cast<float>(random() % 200) - 100;  // many ties
    Ints order(length);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return scores[a] > scores[b]; });
    order.resize(budget);
    std::sort(order.begin(), order.end());
    ASSERT_EQ(kept_of(scores, budget), order);
  }
}

}  // namespace
}  // namespace adakv
