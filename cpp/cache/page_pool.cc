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
      taken_.push_back(true);
      pages.push_back(next_++);
    } else {
      taken_[free_.back()] = true;
      pages.push_back(free_.back());
      free_.pop_back();
    }
  }
}

void PagePool::give_back(const std::vector<int32_t>& pages) {
  for (size_t i = 0; i < pages.size(); ++i) {
    const int32_t page = pages[i];
    if (page >= 0 && page < next_ && taken_[page]) {
      taken_[page] = false;
      continue;
    }
    for (size_t j = 0; j < i; ++j) taken_[pages[j]] = true;
    throw InvalidArgument(detail::concat("give_back: page ", page, " is not taken"));
  }
  // Backwards, so that pages taken together come out again in the same order.
  free_.insert(free_.end(), pages.rbegin(), pages.rend());
}

}  // namespace adakv
