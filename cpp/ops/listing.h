// How many pages of a row shortlist looks at, and how many it lists.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "adakv/ops.h"
#include "ops/host_device.h"

namespace adakv::listing {

constexpr int64_t kShareUnit = 1 << 20;  // shares are multiples of its reciprocal
constexpr int kBisections = 10;          // of the threshold that mass asks for

/// Pages at the end of a row that are listed always: those of the step's S tokens, too.
inline int64_t newest_pages(int64_t newest, int64_t tokens, int64_t page_size) {
  return newest + (std::max<int64_t>(tokens - 1, 0) + page_size - 1) / page_size;
}
inline int64_t newest_pages(const ShortlistArgs& args) {
  return newest_pages(args.newest, args.queries.shape[2], args.page_size);
}

/// Pages of one row.
struct Row {
  int32_t total;   // that it has
  int32_t older;   // before the newest ones
  int32_t wanted;  // of those, at most
};

/// What all rows of a call have in common.
struct Rule {
  int32_t page_size = 1, newest = 1, least = 0, most = 0;  // most: that a row lists
  int64_t share = 0;                                       // in units

  Rule() = default;
  explicit Rule(const ShortlistArgs& args)
      : Rule(args, args.queries.shape[2], static_cast<int32_t>(args.listed.shape[2])) {}
  explicit Rule(const PlanArgs& args) : Rule(args, args.new_tokens, INT32_MAX) {}

  ADAKV_HOST_DEVICE Row of(int32_t length) const {
    Row row;
    const uint32_t size = static_cast<uint32_t>(page_size);  // divisions of 32 bits take less
    row.total = static_cast<int32_t>((static_cast<uint32_t>(length) + size - 1) / size);
    row.older = row.total > newest ? row.total - newest : 0;
    const int64_t shared = (row.total * share + kShareUnit - 1) / kShareUnit;
    const int64_t at_least = least < row.total ? least : row.total;
    int64_t budget = shared > at_least ? shared : at_least;
    if (budget > most) budget = most;
    const int64_t wanted = budget - (row.total - row.older);
    row.wanted = static_cast<int32_t>(wanted > 0 ? wanted : 0);
    return row;
  }

  /// Entries of the pages that a row lists, with a mass of 1; `asks`: the step has tokens of it.
  ADAKV_HOST_DEVICE int32_t listed_length(int32_t length, bool asks) const {
    const Row row = of(length);
    const int32_t left_out = row.wanted >= row.older ? 0
                             : asks                  ? row.older - row.wanted
                                                     : row.older;
    return length - left_out * page_size;
  }

 private:
  template <typename Args>
  Rule(const Args& args, int64_t tokens, int32_t most)
      : page_size(args.page_size),
        newest(static_cast<int32_t>(
            std::min<int64_t>(newest_pages(args.newest, tokens, args.page_size), INT32_MAX))),
        least(args.least),
        most(most),
        share(std::max<int64_t>(std::llrint(args.share * kShareUnit), 0)) {}
};

}  // namespace adakv::listing
