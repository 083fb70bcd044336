// plan: whatever the lengths, workers get every page of every row exactly once, and in order.
#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include "ops/schedule.h"
#include "tensors.h"

namespace adakv {
namespace {

using schedule::RowFacts;
using schedule::Worker;

constexpr int kPageSize = 16, kColumns = 40, kFresh = 3;

// One layer of rows with the given lengths; row r has the pages 100 * r ... and then, fresh ones,
// 100 * r + 50 ...
void check(const std::vector<int32_t>& row_lengths, int new_tokens, int num_workers) {
  const auto rows = static_cast<int64_t>(row_lengths.size());
  const Tensor lengths({1, 1, rows}, row_lengths);
  const Tensor table({1, 1, rows, kColumns}, DType::kInt32),
      fresh({1, 1, rows, kFresh}, DType::kInt32);
  for (int64_t r = 0; r < rows; ++r) {
    for (int i = 0; i < kColumns; ++i) table.view.ptr<int32_t>()[r * kColumns + i] = 100 * r + i;
    for (int i = 0; i < kFresh; ++i) fresh.view.ptr<int32_t>()[r * kFresh + i] = 100 * r + 50 + i;
  }
  const Tensor out({1, schedule_size(rows, num_workers)}, DType::kInt32);
  PlanArgs args;
  args.lengths = lengths.view;
  args.block_table = table.view;
  args.fresh_pages = fresh.view;
  args.new_tokens = new_tokens;
  args.page_size = kPageSize;
  args.num_workers = num_workers;
  args.schedule = out.view;
  plan(args);

  const auto* workers = out.view.ptr<const Worker>();
  const auto* facts = reinterpret_cast<const RowFacts*>(workers + num_workers);
  std::vector<int32_t> pages;  // of all units
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t length = row_lengths[r] + new_tokens;
    ASSERT_EQ(facts[r].begin, static_cast<int32_t>(pages.size()));
    ASSERT_EQ(facts[r].length, length);
    const int32_t used = schedule::ceil_div(row_lengths[r], kPageSize);
    for (int32_t i = 0; i < schedule::ceil_div(length, kPageSize); ++i) {
      pages.push_back(static_cast<int32_t>(100 * r + (i < used ? i : 50 + i - used)));
    }
    ASSERT_EQ(facts[r].end, static_cast<int32_t>(pages.size()));
  }
  int32_t unit = 0;
  for (int w = 0; w < num_workers; ++w) {
    if (workers[w].begin == workers[w].end) continue;
    ASSERT_EQ(workers[w].begin, unit);
    const RowFacts& first = facts[workers[w].row];
    ASSERT_LE(first.begin, unit);
    ASSERT_GT(first.end, unit);
    for (int i = 0; i < std::min(workers[w].end - unit, schedule::kWorkerPages); ++i) {
      ASSERT_EQ(workers[w].pages[i], pages[unit + i]);
    }
    unit = workers[w].end;
  }
  ASSERT_EQ(unit, static_cast<int32_t>(pages.size()));
}

TEST(Plan, SharesEveryPageOutOnce) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 500; ++trial) {
    std::vector<int32_t> lengths(1 + random() % 10);
    for (int32_t& n : lengths) n = random() % 3 ? random() % 40 : random() % 600;
    check(lengths, random() % 2 ? 1 : random() % (kFresh * kPageSize), 1 + random() % 70);
  }
}

TEST(Plan, HasNothingToShareOfEmptyRows) {
  check({0, 0, 0}, 0, 4);
  check({0, 0, 5}, 0, 4);
}

}  // namespace
}  // namespace adakv
