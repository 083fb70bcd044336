// Whether the sizes of a cache make sense.
#pragma once

#include "adakv/kv_cache.h"

namespace adakv {

/// The config, whose value_dim is that of the values; throws unless it makes sense.
CacheConfig checked(CacheConfig config);

/// Throws unless there are pages of so many entries; `who` asks.
void check_page_size(const char* who, int32_t page_size);

}  // namespace adakv
