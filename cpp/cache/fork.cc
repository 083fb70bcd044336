// Branches of the sequences of a cache: which pages they share, and which they get for themselves.
//
// Of its pages a row can write only to two: the one that it began last, or that its prompt ended in,
// and its fresh one. In P appended tokens it begins exactly one, so a row's pages are those of its
// prompt, and page k for the tokens k P .. k P + P - 1 behind it, wherever in that stretch it begins.
// Within stretch j all pages before j - 1 are full; so a branch shares these, and gets pages of its own
// for j - 1 and j, copied by the verb fork() as far as they hold something.
#include <algorithm>

#include "adakv/error.h"
#include "adakv/kv_cache.h"
#include "cache/shared_pages.h"

namespace adakv {

// Pages that each row was given behind its first fresh one, for so many tokens.
int64_t KVCache::row_starts(int64_t appended) const {
  return std::max<int64_t>(appended - 1, 0) / config_.page_size;
}

bool KVCache::is_shared(int32_t sequence) const {
  check_sequence(sequence);
  const auto has_others = [&](int32_t page) { return shared_->pool.num_owners(page) > 1; };
  const auto& layers = sequences_[sequence].pages;
  return std::any_of(layers.begin(), layers.end(), [&](const std::vector<int32_t>& pages) {
    return std::any_of(pages.begin(), pages.end(), has_others);
  });
}

void KVCache::check_fork(const std::vector<int32_t>& sources,
                         const std::vector<int32_t>& back) const {
  ADAKV_CHECK(!sources.empty(), "fork: sources must name at least one sequence");
  ADAKV_CHECK(back.empty() || back.size() == sources.size(), "fork: back must have ",
              sources.size(), " elements, as sources has, got ", back.size());
  for (const int32_t source : sources) {
    check_sequence(source);
    const auto& pages = sequences_[source].pages;
    ADAKV_CHECK(std::none_of(pages.begin(), pages.end(), [](const auto& p) { return p.empty(); }),
                "fork: sequence ", source, " was not begun in every layer");
  }
  for (const int32_t count : back) {
    ADAKV_CHECK(count >= 0, "fork: back must not be negative, got ", count);
    ADAKV_CHECK(count == 0 || !facts_of(config_.format).has_tails, "fork: back must be 0 for ",
                facts_of(config_.format).name, " pages, whose keys share scales, got ", count);
  }
}

// Pages that a branch gets for itself in a layer. If they are all, what the source has will do, and
// a fresh one more for each row: of those of the source some rows may have begun theirs.
int64_t KVCache::pages_of_fork(const std::vector<int32_t>& owned, bool whole) const {
  const int64_t heads = config_.num_kv_heads;
  return whole ? static_cast<int64_t>(owned.size()) + heads : 2 * heads;
}

int64_t KVCache::pages_to_fork(const std::vector<int32_t>& sources, bool whole) const {
  int64_t pages = 0;
  for (const int32_t source : sources) {
    check_sequence(source);
    for (const std::vector<int32_t>& owned : sequences_[source].pages) {
      pages += pages_of_fork(owned, whole);
    }
  }
  return pages;
}

// Gives a branch its pages in every layer, and adds those that are its own to the lists.
void KVCache::fork_pages(const Sequence& source,
                         Sequence& branch,
                         int64_t back,
                         bool whole,
                         std::vector<PageList>& lists) {
  if (source.pages.empty()) return;
  const int32_t heads = config_.num_kv_heads;
  branch.longest_row = source.longest_row;
  branch.appended = std::max<int64_t>(source.appended - back, 0);
  // Pages behind the branch's last ones, and these two, as far as it is known which they are.
  const int64_t behind = row_starts(source.appended) - row_starts(branch.appended);
  const auto leave =
      static_cast<int32_t>(std::min<int64_t>(source.num_started, std::max<int64_t>(behind, 0) + 2));
  branch.num_started = whole ? 0 : source.num_started - leave + 2;
  branch.pages.resize(source.pages.size());
  for (size_t l = 0; l < source.pages.size(); ++l) {
    const std::vector<int32_t>& owned = source.pages[l];
    std::vector<int32_t>& pages = branch.pages[l];
    if (!whole) {
      pages.assign(owned.begin(), owned.end() - int64_t{leave} * heads);
      shared_->pool.share(pages);
    }
    std::vector<int32_t> own;
    shared_->pool.take(pages_of_fork(owned, whole), own);
    pages.insert(pages.end(), own.begin(), own.end());
    lists[l].ids.insert(lists[l].ids.end(), own.begin(), own.end());
  }
}

// Makes sequences of `to`, from `first` on, branches; and what the verb has to know of them.
void KVCache::branch(KVCache& to,
                     int32_t first,
                     const std::vector<int32_t>& sources,
                     const std::vector<int32_t>& back,
                     bool whole,
                     Fork& fork) {
  fork.pages.resize(config_.num_layers);
  for (PageList& list : fork.pages) list.indptr.push_back(0);
  for (size_t i = 0; i < sources.size(); ++i) {
    Sequence& branch = to.sequences_[first + i];
    fork_pages(sequences_[sources[i]], branch, back.empty() ? 0 : back[i], whole, fork.pages);
    for (PageList& list : fork.pages) list.indptr.push_back(static_cast<int32_t>(list.ids.size()));
    const int64_t appended = branch.appended;
    fork.stretch.push_back(
        appended == 0 ? 0 : static_cast<int32_t>((appended - 1) % config_.page_size + 1));
  }
}

Fork KVCache::fork(const std::vector<int32_t>& sources,
                   const std::vector<int32_t>& back,
                   bool whole,
                   Stream stream) {
  check_fork(sources, back);
  shared_->pool.check_free(pages_to_fork(sources, whole));
  Fork fork;
  fork.cache.reset(new KVCache(*this, static_cast<int32_t>(sources.size()), stream));
  branch(*fork.cache, 0, sources, back, whole, fork);
  return fork;
}

Fork KVCache::fork_into(int32_t first_sequence,
                        const std::vector<int32_t>& sources,
                        const std::vector<int32_t>& back,
                        bool whole) {
  check_fork(sources, back);
  for (size_t i = 0; i < sources.size(); ++i) {
    const int32_t sequence = first_sequence + static_cast<int32_t>(i);
    check_sequence(sequence);
    ADAKV_CHECK(sequences_[sequence].pages.empty(), "fork_into: sequence ", sequence,
                " holds entries already: remove() it first");
  }
  shared_->pool.check_free(pages_to_fork(sources, whole));
  Fork fork;
  branch(*this, first_sequence, sources, back, whole, fork);
  return fork;
}

}  // namespace adakv
