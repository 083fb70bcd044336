// Writes keys and values into the slots of pages, as the pages' format has it.
#pragma once

#include <cstring>

#include "adakv/kv_cache.h"
#include "cpu/kernels.h"

namespace adakv {

class PageWriter {
 public:
  /// For entries of a dtype.
  PageWriter(const LayerView& layer, DType dtype)
      : quantise_(kernels().quantise[static_cast<int>(layer.format())][static_cast<int>(dtype)]),
        keys_(layer.pages, layer.key_scales),
        values_(layer.values(), layer.value_scales) {}

  void write_key(int64_t page, int64_t slot, const char* entry) const {
    write(keys_, page, slot, entry);
  }

  void write_value(int64_t page, int64_t slot, const char* entry) const {
    write(values_, page, slot, entry);
  }

 private:
  /// The keys or the values of pages.
  struct Half {
    Half(const TensorView& view, const TensorView& numbers)
        : data(view.ptr<char>()),
          page_bytes(view.stride[0] * static_cast<int64_t>(dtype_size(view.dtype))),
          entry_bytes(view.shape[3] * static_cast<int64_t>(dtype_size(view.dtype))),
          width(static_cast<int>(view.shape[3])),
          scales(numbers.ptr<uint16_t>()),
          page_scales(numbers.stride[0]),
          slot_scales(numbers.stride[1]) {}

    char* data;
    int64_t page_bytes, entry_bytes;
    int width;
    uint16_t* scales;
    int64_t page_scales, slot_scales;  // in elements
  };

  void write(const Half& half, int64_t page, int64_t slot, const char* entry) const {
    char* to = half.data + page * half.page_bytes + slot * half.entry_bytes;
    if (quantise_ == nullptr) {
      std::memcpy(to, entry, half.entry_bytes);
      return;
    }
    quantise_(entry, half.width, reinterpret_cast<uint8_t*>(to),
              half.scales + page * half.page_scales + slot * half.slot_scales);
  }

  QuantiseEntry quantise_;  // null for plain pages
  Half keys_, values_;
};

}  // namespace adakv
