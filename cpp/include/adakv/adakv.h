// Everything that adakv offers to C++.
#pragma once

#include "adakv/cache_file.h"
#include "adakv/error.h"
#include "adakv/kv_cache.h"
#include "adakv/memory.h"
#include "adakv/ops.h"
#include "adakv/page_pool.h"
#include "adakv/safetensors.h"
#include "adakv/types.h"

/// Head-wise KV cache eviction: ten verbs on tensors, and the memory of a compressed cache.
namespace adakv {}
