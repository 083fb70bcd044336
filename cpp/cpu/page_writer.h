// Writes keys and values into the slots of pages, as the pages' format has it.
#pragma once

#include <cstring>

#include "adakv/kv_cache.h"
#include "cpu/kernels.h"

namespace adakv {

class PageWriter {
 public:
  /// For entries of so many dimensions and of a dtype.
  PageWriter(const LayerView& layer, int64_t head_dim, DType dtype)
      : pages_(layer.pages.ptr<char>()),
        page_bytes_(layer.pages.stride[0] * static_cast<int64_t>(dtype_size(layer.pages.dtype))),
        entry_bytes_(head_dim * static_cast<int64_t>(dtype_size(layer.pages.dtype))),
        half_bytes_(layer.pages.shape[2] * entry_bytes_),
        head_dim_(static_cast<int>(head_dim)),
        quantise_(kernels().quantise[static_cast<int>(layer.format())][static_cast<int>(dtype)]),
        keys_(layer.key_scales),
        values_(layer.value_scales) {}

  void write_key(int64_t page, int64_t slot, const char* entry) const {
    write(page * page_bytes_ + slot * entry_bytes_, keys_, page, slot, entry);
  }

  void write_value(int64_t page, int64_t slot, const char* entry) const {
    write(page * page_bytes_ + half_bytes_ + slot * entry_bytes_, values_, page, slot, entry);
  }

 private:
  struct Scales {
    explicit Scales(const TensorView& view)
        : data(view.ptr<uint16_t>()), page_stride(view.stride[0]), slot_stride(view.stride[1]) {}

    uint16_t* data;
    int64_t page_stride, slot_stride;  // in elements
  };

  void write(
      int64_t offset, const Scales& scales, int64_t page, int64_t slot, const char* entry) const {
    if (quantise_ == nullptr) {
      std::memcpy(pages_ + offset, entry, entry_bytes_);
      return;
    }
    quantise_(entry, head_dim_, reinterpret_cast<uint8_t*>(pages_ + offset),
              scales.data + page * scales.page_stride + slot * scales.slot_stride);
  }

  char* pages_;
  int64_t page_bytes_, entry_bytes_, half_bytes_;
  int head_dim_;
  QuantiseEntry quantise_;  // null for plain pages
  Scales keys_, values_;
};

}  // namespace adakv
