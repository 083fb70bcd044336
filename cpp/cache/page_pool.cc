#include "adakv/page_pool.h"

#include "adakv/error.h"

namespace adakv {

PagePool::PagePool(int32_t num_pages) {
  ADAKV_CHECK(num_pages >= 0, "PagePool: num_pages must not be negative, got ", num_pages);
  taken_.assign(num_pages, false);
  free_.resize(num_pages);
  for (int32_t i = 0; i < num_pages; ++i) free_[i] = num_pages - 1 - i;
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
    pages.push_back(free_.back());
    taken_[free_.back()] = true;
    free_.pop_back();
  }
}

void PagePool::give_back(const std::vector<int32_t>& pages) {
  for (size_t i = 0; i < pages.size(); ++i) {
    const int32_t page = pages[i];
    if (page >= 0 && page < num_pages() && taken_[page]) {
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
