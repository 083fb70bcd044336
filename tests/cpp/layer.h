// A layer of a cache outside of any KVCache, and what its rows hold.
#pragma once

#include <vector>

#include "tensors.h"

namespace adakv {

struct Entry {
  int32_t position;
  std::vector<float> key, value;  // [D]
};

/// What a row of a layer holds, in slot order.
inline std::vector<Entry> entries_of(const LayerView& layer, int64_t b, int64_t h) {
  const auto row = [&](const TensorView& x) {
    return x.ptr<int32_t>() + b * x.stride[0] + h * x.stride[1];
  };
  const int64_t page_size = layer.pages.shape[2], dim = layer.pages.shape[3];
  const auto number = [&](int64_t i) {
    if (layer.pages.dtype == DType::kFloat32) return layer.pages.ptr<float>()[i];
    return from_half(layer.pages.ptr<uint16_t>()[i], layer.pages.dtype);
  };
  std::vector<Entry> held;
  for (int32_t slot = 0; slot < *row(layer.lengths); ++slot) {
    const int64_t page = row(layer.block_table)[slot / page_size], in_page = slot % page_size;
    Entry entry = {layer.page_positions.ptr<int32_t>()[page * page_size + in_page], {}, {}};
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t key = (page * 2 * page_size + in_page) * dim + d;
      entry.key.push_back(number(key));
      entry.value.push_back(number(key + page_size * dim));
    }
    held.push_back(entry);
  }
  return held;
}

/// Tensors of B sequences that hold nothing. Integers are -1, lengths and seen 0.
struct Layer {
  Tensor pages, page_positions, block_table, lengths, seen, fresh_pages;

  Layer(int64_t batch,
        int64_t kv_heads,
        int64_t head_dim,
        int64_t page_size,
        int64_t num_pages,
        int64_t max_row_pages,
        int64_t num_fresh,
        DType dtype = DType::kFloat32)
      : pages({num_pages, 2, page_size, head_dim}, dtype),
        page_positions({num_pages, page_size}, DType::kInt32),
        block_table({batch, kv_heads, max_row_pages}, DType::kInt32),
        lengths({batch, kv_heads}, DType::kInt32),
        seen({batch}, DType::kInt32),
        fresh_pages({batch, kv_heads, num_fresh}, DType::kInt32) {
    for (const Tensor* tensor : {&page_positions, &block_table, &fresh_pages}) {
      std::fill_n(tensor->view.ptr<int32_t>(), tensor->view.size(), -1);
    }
  }

  LayerView view() const {
    return {pages.view,
            page_positions.view,
            block_table.view,
            lengths.view,
            seen.view,
            fresh_pages.view,
            {},
            {},
            {},
            {},
            {}};
  }

  std::vector<Entry> entries(int64_t b, int64_t h) const { return entries_of(view(), b, h); }
};

}  // namespace adakv
