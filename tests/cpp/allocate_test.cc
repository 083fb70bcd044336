// allocate on examples worked out by hand (Ada-KV, arXiv 2407.11550, Algorithms 1 and 2).
#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include "tensors.h"

namespace adakv {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Budgets of one sequence of two heads.
std::vector<int32_t> budgets_of(const std::vector<float>& scores,
                                int budget,
                                double floor,
                                Safeguard safeguard,
                                int window = 0) {
  const auto length = static_cast<int64_t>(scores.size() / 2);
  const Tensor in({1, 2, length}, scores), out({1, 2}, DType::kInt32);
  AllocateArgs args;
  args.scores = in.view;
  args.budget = budget;
  args.window = window;
  args.floor = floor;
  args.safeguard = safeguard;
  args.budgets = out.view;
  run(&allocate, args);
  return out.ints();
}

using Ints = std::vector<int32_t>;

// Of the six highest scores of both heads, five lie in the first.
const std::vector<float> kScores = {.12f,  .20f, .06f, .14f, .09f, .15f,  .11f, .13f,  //
                                    .045f, .03f, .70f, .02f, .10f, .055f, .01f, .04f};

TEST(Allocate, SharesOneBudgetOutByTheBestScores) {
  EXPECT_EQ(budgets_of(kScores, 3, 0.0, Safeguard::kNone), (Ints{5, 1}));
  EXPECT_EQ(budgets_of(kScores, 3, 0.0, Safeguard::kBlend), (Ints{5, 1}));
}

TEST(Allocate, KeepsTheFloorOfEachSafeguard) {
  EXPECT_EQ(budgets_of(kScores, 3, 1.0, Safeguard::kBlend), (Ints{3, 3}));
  EXPECT_EQ(budgets_of(kScores, 3, 0.5, Safeguard::kBlend), (Ints{4, 2}));
  EXPECT_EQ(budgets_of(kScores, 3, 0.2, Safeguard::kHardFloor), (Ints{5, 1}));
  EXPECT_EQ(budgets_of(kScores, 3, 0.7, Safeguard::kHardFloor), (Ints{4, 2}));
  EXPECT_EQ(budgets_of(kScores, 3, 0.2, Safeguard::kOfficialRound), (Ints{4, 1}));
}

TEST(Allocate, AddsTheWindowAndLeavesItOutOfTheRace) {
  std::vector<float> scores;
  for (int h = 0; h < 2; ++h) {
    scores.insert(scores.end(), kScores.begin() + 8 * h, kScores.begin() + 8 * h + 8);
    scores.insert(scores.end(), {1.f, 1.f});  // the window's, which nobody may look at
  }
  EXPECT_EQ(budgets_of(scores, 5, 0.0, Safeguard::kBlend, 2), (Ints{7, 3}));
}

TEST(Allocate, GivesEqualScoresEvenBudgets) {
  EXPECT_EQ(budgets_of(std::vector<float>(20, 0.5f), 3, 0.0, Safeguard::kNone), (Ints{3, 3}));
}

TEST(Allocate, RanksNanAndMinusInfinityLast) {
  const std::vector<float> scores = {kNan, kNan, kNan, kNan, .1f, .2f, -INFINITY, .3f};
  EXPECT_EQ(budgets_of(scores, 2, 0.0, Safeguard::kNone), (Ints{1, 3}));
}

TEST(Allocate, KeepsEverythingWhereThatIsLittle) {
  EXPECT_EQ(budgets_of(kScores, 8, 0.2, Safeguard::kBlend), (Ints{8, 8}));
  EXPECT_EQ(budgets_of(kScores, 2000000000, 0.2, Safeguard::kBlend), (Ints{8, 8}));
  EXPECT_EQ(budgets_of(kScores, 9, 0.2, Safeguard::kBlend, 9), (Ints{8, 8}));
  EXPECT_EQ(budgets_of({}, 4, 0.2, Safeguard::kBlend), (Ints{0, 0}));
}

// Whatever the scores, the sum is exact and no head gets more than it has.
TEST(Allocate, SpendsExactlyTheBudget) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 300; ++trial) {
    const int heads = 1 + random() % 5, length = 1 + random() % 60,
              budget = random() % (length + 3);
    const Tensor scores({1, heads, length}, DType::kFloat32), budgets({1, heads}, DType::kInt32);
    for (int64_t i = 0; i < scores.view.size(); ++i) {
      scores.view.ptr<float>()[i] = static_cast<float>(random() % 20) / 16;  // many ties
    }
    AllocateArgs args;
    args.scores = scores.view;
    args.budget = budget;
    args.floor = static_cast<double>(random() % 11) / 10;
    args.safeguard = random() % 2 ? Safeguard::kBlend : Safeguard::kHardFloor;
    args.budgets = budgets.view;
    run(&allocate, args);
    int64_t sum = 0;
    for (const int32_t n : budgets.ints()) {
      ASSERT_GE(n, static_cast<int32_t>(args.floor * std::min(budget, length)));
      ASSERT_LE(n, length);
      sum += n;
    }
    ASSERT_EQ(sum, heads * std::min(budget, length));
  }
}

}  // namespace
}  // namespace adakv
