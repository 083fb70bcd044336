#include "adakv/page_pool.h"

#include "adakv/error.h"

namespace adakv {

PagePool::PagePool(int32_t num_pages) : num_pages_(num_pages) {
  ADAKV_CHECK(num_pages >= 0, "PagePool: num_pages must not be negative, got ", num_pages);
}

void PagePool::grow(int32_t num_pages) {
  ADAKV_CHECK(num_pages >= num_pages_, "PagePool: num_pages must be at least ", num_pages_,
              ", the pages there are, got ", num_pages);
  num_pages_ = num_pages;
}

void PagePool::check_free(int64_t count) const {
  if (count > num_free()) {
    throw Error(detail::concat("not enough pages: ", count, " needed, ", num_free(), " free of ",
                               num_pages()));
  }
}

void PagePool::take(int64_t count, std::vector<int32_t>& pages) {
  ADAKV_CHECK(count >= 0, "PagePool: count must not be negative, got ", count);
  check_free(count);
  for (int64_t i = 0; i < count; ++i) {
    if (free_.empty()) {
      owners_.push_back(1);
      pages.push_back(next_++);
    } else {
      owners_[free_.back()] = 1;
      pages.push_back(free_.back());
      free_.pop_back();
    }
  }
}

void PagePool::share(const std::vector<int32_t>& pages) {
  for (const int32_t page : pages) {
    ADAKV_CHECK(num_owners(page) > 0, "share: page ", page, " is not taken");
  }
  for (const int32_t page : pages) ++owners_[page];
}

void PagePool::give_back(const std::vector<int32_t>& pages) {
  std::vector<int32_t> freed;
  for (size_t i = 0; i < pages.size(); ++i) {
    const int32_t page = pages[i];
    if (num_owners(page) > 0) {
      if (--owners_[page] == 0) freed.push_back(page);
      continue;
    }
    for (size_t j = 0; j < i; ++j) ++owners_[pages[j]];
    throw InvalidArgument(detail::concat("give_back: page ", page, " is not taken"));
  }
  // Backwards, so that pages taken together come out again in the same order.
  free_.insert(free_.end(), freed.rbegin(), freed.rend());
}

}  // namespace adakv
