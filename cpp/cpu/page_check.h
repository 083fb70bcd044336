// What the CPU can check of the pages that rows hold, as it may look at them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "adakv/error.h"
#include "adakv/types.h"
#include "ops/schedule.h"

namespace adakv {

/// Throws unless every page that a row holds, of a table [B, Hkv, M] and lengths [B, Hkv], lies in the
/// pool: a wild id would lead outside of it.
inline void check_pages(const char* verb,
                        const TensorView& table,
                        const TensorView& lengths,
                        int64_t pages_in_pool,
                        int32_t page_size) {
  const auto num_pages = static_cast<uint32_t>(pages_in_pool);
  const int64_t most = table.shape[2] * page_size;
  for (int64_t b = 0; b < lengths.shape[0]; ++b) {
    for (int64_t h = 0; h < lengths.shape[1]; ++h) {
      const int32_t length = lengths.ptr<int32_t>()[b * lengths.stride[0] + h * lengths.stride[1]];
      ADAKV_CHECK(length >= 0 && length <= std::min<int64_t>(most, schedule::kMostLength), verb,
                  ": lengths must lie in 0 .. M * P = ", most, ", got ", length);
      const int32_t* ids = table.ptr<int32_t>() + b * table.stride[0] + h * table.stride[1];
      const int32_t* end = ids + schedule::ceil_div(length, page_size);
      bool are_there = true;
      for (const int32_t* id = ids; id != end; ++id) {
        are_there &= static_cast<uint32_t>(*id) < num_pages;
      }
      if (are_there) continue;
      const int32_t* wild = std::find_if(
          ids, end, [&](int32_t id) { return static_cast<uint32_t>(id) >= num_pages; });
      throw InvalidArgument(detail::concat(verb, ": block_table must name pages 0 .. ",
                                           pages_in_pool - 1, ", got ", *wild, " for sequence ", b,
                                           ", kv head ", h));
    }
  }
}

}  // namespace adakv
