// What a page consists of, piece by piece, so that whole pages can be copied without asking for their
// format.
#pragma once

#include <cstdint>

#include "adakv/kv_cache.h"

namespace adakv {

/// A piece of all pages: that of page p begins at data + p * page_stride.
struct PagePiece {
  char* data;
  int64_t page_stride, bytes;  // a multiple of 16 each
};

/// Keys and values, their scales if there are any, the positions, and the biases if there are any.
struct PagePieces {
  static constexpr int kMost = 6;

  explicit PagePieces(const LayerView& layer) {
    for (const TensorView* tensor :
         {&layer.pages, &layer.value_pages, &layer.key_scales, &layer.value_scales,
          &layer.page_positions, &layer.page_biases}) {
      if (!*tensor) continue;
      const auto element_bytes = static_cast<int64_t>(dtype_size(tensor->dtype));
      int64_t elements = 1;
      for (int i = 1; i < tensor->rank; ++i) elements *= tensor->shape[i];
      pieces[count++] = {tensor->ptr<char>(), tensor->stride[0] * element_bytes,
                         elements * element_bytes};
    }
  }

  PagePiece pieces[kMost];
  int count = 0;
};

}  // namespace adakv
