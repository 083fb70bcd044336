// compact without keys and values: compact_in_place.cu.
#pragma once

#include "adakv/ops.h"

namespace adakv {

void cuda_compact_in_place(const CompactArgs& args);
size_t cuda_compact_in_place_workspace_bytes(const CompactArgs& args);

}  // namespace adakv
