#include "adakv/page_pool.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <string>

#include "adakv/error.h"

namespace adakv {
namespace {

TEST(PagePool, HandsOutLowIdsFirst) {
  PagePool pool(5);
  std::vector<int32_t> pages;
  pool.take(3, pages);
  EXPECT_EQ(pages, (std::vector<int32_t>{0, 1, 2}));
  pool.give_back({1, 2});
  pages.clear();
  pool.take(2, pages);
  EXPECT_EQ(pages, (std::vector<int32_t>{1, 2}));
}

TEST(PagePool, TakesNothingIfTooFewAreFree) {
  PagePool pool(4);
  std::vector<int32_t> pages;
  pool.take(1, pages);
  try {
    pool.take(4, pages);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "not enough pages: 4 needed, 3 free of 4");
  }
  EXPECT_EQ(pages.size(), 1u);
  EXPECT_EQ(pool.num_free(), 3);
}

TEST(PagePool, FreesNothingIfOnePageIsWrong) {
  PagePool pool(4);
  std::vector<int32_t> pages;
  pool.take(2, pages);
  EXPECT_THROW(pool.give_back({0, 3}), InvalidArgument);  // 3 is free
  EXPECT_THROW(pool.give_back({0, 0}), InvalidArgument);
  EXPECT_THROW(pool.give_back({0, 4}), InvalidArgument);
  EXPECT_THROW(pool.give_back({-1}), InvalidArgument);
  EXPECT_EQ(pool.num_used(), 2);
  pool.give_back({0, 1});
  EXPECT_EQ(pool.num_used(), 0);
}

TEST(PagePool, EveryPageHasOneOwnerWhateverHappens) {
  std::mt19937 random(0);
  PagePool pool(100);
  std::vector<std::vector<int32_t>> owners(8);
  for (int step = 0; step < 5000; ++step) {
    std::vector<int32_t>& owner = owners[random() % owners.size()];
    if (random() % 2) {
      pool.give_back(owner);
      owner.clear();
    } else {
      const int32_t count = random() % 20;
      if (count <= pool.num_free()) pool.take(count, owner);
    }
    std::set<int32_t> seen;
    size_t total = 0;
    for (const auto& pages : owners) {
      seen.insert(pages.begin(), pages.end());
      total += pages.size();
    }
    ASSERT_EQ(seen.size(), total);
    ASSERT_EQ(pool.num_used(), static_cast<int32_t>(total));
  }
}

TEST(PagePool, APageIsFreeWhenItsLastOwnerGoes) {
  PagePool pool(3);
  std::vector<int32_t> pages;
  pool.take(2, pages);
  pool.share({0, 1});
  pool.share({0});
  EXPECT_THROW(pool.share({0, 2}), InvalidArgument);
  EXPECT_EQ(pool.num_owners(0), 3);
  EXPECT_EQ(pool.num_owners(2), 0);
  EXPECT_THROW(pool.give_back({1, 1, 1}), InvalidArgument);
  EXPECT_EQ(pool.num_owners(1), 2);
  pool.give_back({0, 1, 0});
  EXPECT_EQ(pool.num_free(), 1);
  pool.give_back({1, 0});
  EXPECT_EQ(pool.num_free(), 3);
}

TEST(PagePool, GrowsByFreePages) {
  PagePool pool(2);
  std::vector<int32_t> pages;
  pool.take(2, pages);
  EXPECT_THROW(pool.grow(1), InvalidArgument);
  pool.grow(5);
  EXPECT_EQ(pool.num_pages(), 5);
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_EQ(pool.num_touched(), 2);
  pool.take(3, pages);
  EXPECT_EQ(pages, (std::vector<int32_t>{0, 1, 2, 3, 4}));
}

}  // namespace
}  // namespace adakv
