// What a page has for each of its slots, part by part, so that entries can be moved without asking for
// their format. Not of a layer with tails, where a page's keys share scales.
#pragma once

#include <cstdint>

#include "adakv/kv_cache.h"

namespace adakv {

/// A part of all pages: that of slot s of page p begins at data + p * page_stride + s * slot_bytes.
struct SlotPart {
  char* data;
  int64_t page_stride;  // in bytes
  int32_t slot_bytes;
};

/// The keys, the values, their scales if there are any, the positions, and the biases if there are any.
struct SlotParts {
  static constexpr int kMost = 6;

  explicit SlotParts(const LayerView& layer) {
    for (const TensorView& half : {layer.pages, layer.values()}) {
      const auto bytes = static_cast<int64_t>(dtype_size(half.dtype));
      parts[count++] = {half.ptr<char>(), half.stride[0] * bytes,
                        static_cast<int32_t>(half.shape[3] * bytes)};
    }
    for (const TensorView* scales : {&layer.key_scales, &layer.value_scales}) {
      if (!*scales) continue;
      const auto bytes = static_cast<int64_t>(dtype_size(scales->dtype));
      parts[count++] = {scales->ptr<char>(), scales->stride[0] * bytes,
                        static_cast<int32_t>(scales->shape[2] * bytes)};
    }
    parts[count++] = {layer.page_positions.ptr<char>(), layer.page_positions.stride[0] * 4, 4};
    if (!layer.page_biases) return;
    parts[count++] = {layer.page_biases.ptr<char>(), layer.page_biases.stride[0] * 2, 2};
  }

  SlotPart parts[kMost];
  int count = 0;
};

}  // namespace adakv
