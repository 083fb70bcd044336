// Which pages are free. Host bookkeeping only: no memory, no device.
#pragma once

#include <cstdint>
#include <vector>

#pragma GCC visibility push(default)  // what a shared adakv shows
namespace adakv {

/// `num_pages` equal pages with the ids 0 .. num_pages - 1. Each is free or has owners, who are
/// counted. Pages that were given back are handed out first, then those never used by ascending id:
/// memory is touched late.
class PagePool {
 public:
  /// All pages free. Throws InvalidArgument for a negative number.
  explicit PagePool(int32_t num_pages);

  /// Pages, free or taken.
  int32_t num_pages() const { return num_pages_; }
  /// Pages that can be taken.
  int32_t num_free() const { return num_pages_ - next_ + static_cast<int32_t>(free_.size()); }
  /// Pages that are taken.
  int32_t num_used() const { return num_pages() - num_free(); }
  /// Pages that were ever taken: those from here on hold nothing.
  int32_t num_touched() const { return next_; }

  /// Adds free pages, so that there are `num_pages`. Throws InvalidArgument if there are more.
  void grow(int32_t num_pages);

  /// Throws Error, naming both numbers, unless `count` pages are free.
  void check_free(int64_t count) const;

  /// Appends `count` page ids to `pages`. Throws Error, and takes nothing, if fewer are free.
  void take(int64_t count, std::vector<int32_t>& pages);

  /// Gives each of the pages one owner more. Throws InvalidArgument, and changes nothing, for a page
  /// that is not taken.
  void share(const std::vector<int32_t>& pages);

  /// Owners of a page; 0 if it is free.
  int32_t num_owners(int32_t page) const { return page >= 0 && page < next_ ? owners_[page] : 0; }

  /// Takes one owner from each of the pages, which are free when they have none. Throws
  /// InvalidArgument, and changes nothing, for a page that is not taken.
  void give_back(const std::vector<int32_t>& pages);

 private:
  int32_t num_pages_;
  int32_t next_ = 0;             // the lowest page that was never taken
  std::vector<int32_t> free_;    // pages given back; a stack
  std::vector<int32_t> owners_;  // [next_] how many each page has
};

}  // namespace adakv
#pragma GCC visibility pop
