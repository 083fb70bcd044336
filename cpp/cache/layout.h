// How the tensors of a cache lie in its memory: the pool of pages, the block tables, and what each row
// has beside them.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "adakv/kv_cache.h"

namespace adakv {

// The parts of a page, in bytes; in quantised pages they lie one behind the other in this order.
struct PageParts {
  explicit PageParts(const CacheConfig& c)
      : codes(int64_t{2} * c.page_size * c.head_dim *
              (c.format == PageFormat::kPlain ? dtype_size(c.dtype) : 1) /
              (c.format == PageFormat::kInt4 ? 2 : 1)),
        value_scales(c.page_size * num_scales(c.format, c.head_dim) * sizeof(uint16_t)),
        key_scales(c.format == PageFormat::kInt4 ? 2 * c.head_dim * sizeof(uint16_t)
                                                 : value_scales),
        positions(c.page_size * sizeof(int32_t)),
        biases(c.has_biases ? c.page_size * sizeof(uint16_t) : 0) {}

  int64_t bytes() const { return codes + key_scales + value_scales + positions + biases; }

  int64_t codes;  // of keys and values
  int64_t value_scales, key_scales;
  int64_t positions;
  int64_t biases;
};

// Lays tensors out one behind the other in one allocation: first without a base to learn the size,
// then with it.
class Layout {
 public:
  Layout(void* base, Device device) : base_(static_cast<char*>(base)), device_(device) {}

  TensorView add(std::initializer_list<int64_t> shape, DType dtype) {
    TensorView view(base_ ? base_ + bytes_ : nullptr, shape, dtype, device_);
    bytes_ += view.size() * static_cast<int64_t>(dtype_size(dtype));
    bytes_ = (bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    return view;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 256;

  char* base_;
  Device device_;
  int64_t bytes_ = 0;
};

inline void lay_out_pool(Layout& layout, const CacheConfig& c, LayerView& view) {
  if (c.format == PageFormat::kPlain) {
    view.pages = layout.add({c.num_pages, 2, c.page_size, c.head_dim}, c.dtype);
    view.page_positions = layout.add({c.num_pages, c.page_size}, DType::kInt32);
    if (c.has_biases) {
      view.page_biases = layout.add({c.num_pages, c.page_size}, DType::kFloat16);
    }
    return;
  }
  const PageParts parts(c);
  const TensorView whole = layout.add({c.num_pages, parts.bytes()}, DType::kUInt8);
  const auto part = [&](int64_t begin, std::initializer_list<int64_t> shape, DType dtype) {
    TensorView tensor(whole.data ? whole.ptr<char>() + begin : nullptr, shape, dtype, c.device);
    tensor.stride[0] = parts.bytes() / static_cast<int64_t>(dtype_size(dtype));
    return tensor;
  };
  const int64_t width = num_scales(c.format, c.head_dim);
  const bool is_int4 = c.format == PageFormat::kInt4;
  view.pages = part(0, {c.num_pages, 2, c.page_size, is_int4 ? c.head_dim / 2 : c.head_dim},
                    c.format == PageFormat::kFp8 ? DType::kFloat8 : DType::kUInt8);
  view.value_scales =
      part(parts.codes + parts.key_scales, {c.num_pages, c.page_size, width}, c.dtype);
  view.key_scales = is_int4 ? part(parts.codes, {c.num_pages, 2, c.head_dim}, c.dtype)
                            : part(parts.codes, {c.num_pages, c.page_size, width}, c.dtype);
  view.page_positions =
      part(parts.bytes() - parts.positions, {c.num_pages, c.page_size}, DType::kInt32);
}

// Of the block table: no row can have more pages than the pool, so that a large max_row_pages takes
// no memory before there are pages to fill it.
inline int32_t num_columns(const CacheConfig& c) {
  return std::min(c.max_row_pages, c.num_pages);
}

inline void lay_out_table(Layout& layout, const CacheConfig& c, LayerView& view) {
  view.block_table =
      layout.add({c.num_layers, c.num_sequences, c.num_kv_heads, num_columns(c)}, DType::kInt32);
}

inline void lay_out_rows(Layout& layout, const CacheConfig& c, LayerView& view) {
  view.lengths = layout.add({c.num_layers, c.num_sequences, c.num_kv_heads}, DType::kInt32);
  view.seen = layout.add({c.num_layers, c.num_sequences}, DType::kInt32);
  view.fresh_pages = layout.add(
      {c.num_sequences, c.num_layers, c.num_kv_heads, KVCache::kFreshColumns}, DType::kInt32);
  std::swap(view.fresh_pages.shape[0], view.fresh_pages.shape[1]);
  std::swap(view.fresh_pages.stride[0], view.fresh_pages.stride[1]);
  if (c.format == PageFormat::kInt4) {
    view.tails = layout.add(
        {int64_t{c.num_layers} * c.num_sequences, c.num_kv_heads, 2 * c.page_size, c.head_dim},
        c.dtype);
  }
}

}  // namespace adakv
