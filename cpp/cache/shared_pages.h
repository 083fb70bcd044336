// What a cache and its forks have in common.
#pragma once

#include <memory>
#include <vector>

#include "adakv/kv_cache.h"

namespace adakv {

struct SharedPages {
  PagePool pool;
  std::shared_ptr<void> data;     // what LayerView has [N, ...] of
  std::vector<KVCache*> members;  // the cache and its forks, as long as they live
};

}  // namespace adakv
