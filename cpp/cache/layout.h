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
      : keys(c.page_size *
             (c.key_dims.are_mixed() ? c.key_dims.bytes(c.head_dim) : entry_bytes(c, c.head_dim))),
        values(c.page_size * entry_bytes(c, c.value_dim)),
        key_scales(facts_of(c.format).has_tails
                       ? 2 * (c.head_dim - c.key_dims.in_16) * sizeof(uint16_t)
                       : scale_bytes(c, c.head_dim)),
        value_scales(scale_bytes(c, c.value_dim)),
        positions(c.page_size * sizeof(int32_t)),
        biases(c.has_biases ? c.page_size * sizeof(uint16_t) : 0) {}

  int64_t bytes() const { return keys + values + key_scales + value_scales + positions + biases; }

  int64_t keys, values;  // or their codes
  int64_t key_scales, value_scales;
  int64_t positions;
  int64_t biases;

 private:
  static int64_t entry_bytes(const CacheConfig& c, int64_t width) {
    const int64_t bits = facts_of(c.format).code_bits;
    return bits == 0 ? width * static_cast<int64_t>(dtype_size(c.dtype)) : width * bits / 8;
  }

  static int64_t scale_bytes(const CacheConfig& c, int64_t width) {
    return c.page_size * num_scales(c.format, width) * sizeof(uint16_t);
  }
};

// Lays tensors out one behind the other in one allocation: first without a base to learn the size,
// then with it.
class Layout {
 public:
  Layout(void* base, Device device) : base_(static_cast<char*>(base)), device_(device) {}

  TensorView add(std::initializer_list<int64_t> shape, DType dtype) {
    TensorView view(base_ ? base_ + bytes_ : nullptr, shape, dtype, device_);
    bytes_ += static_cast<int64_t>(view.bytes());
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
  const PageParts parts(c);
  const bool is_plain = c.format == PageFormat::kPlain, has_tails = facts_of(c.format).has_tails;
  // Of plain pages, positions and biases lie elsewhere.
  const int64_t page_bytes = is_plain ? parts.keys + parts.values : parts.bytes();
  const TensorView whole = layout.add({c.num_pages, page_bytes}, DType::kUInt8);
  const auto part = [&](int64_t begin, std::initializer_list<int64_t> shape, DType dtype) {
    TensorView tensor(whole.data ? whole.ptr<char>() + begin : nullptr, shape, dtype, c.device);
    tensor.stride[0] = page_bytes / static_cast<int64_t>(dtype_size(dtype));
    return tensor;
  };
  const DType codes = is_plain                       ? c.dtype
                      : c.format == PageFormat::kFp8 ? DType::kFloat8
                                                     : DType::kUInt8;
  const auto size = static_cast<int64_t>(dtype_size(codes));
  const int64_t width = parts.keys / (c.page_size * size);
  const int64_t value_width = parts.values / (c.page_size * size);
  view.pages = part(0, {c.num_pages, 2, c.page_size, width}, codes);
  if (c.value_dim != c.head_dim || c.key_dims.are_mixed()) {
    view.pages = view.pages.narrow(1, 0, 1);
    view.value_pages = part(parts.keys, {c.num_pages, 1, c.page_size, value_width}, codes);
  }
  if (is_plain) {
    view.page_positions = layout.add({c.num_pages, c.page_size}, DType::kInt32);
    if (c.has_biases) {
      view.page_biases = layout.add({c.num_pages, c.page_size}, DType::kFloat16);
    }
    return;
  }
  const int64_t key_scales = parts.keys + parts.values,
                value_scales = key_scales + parts.key_scales;
  const auto scales = [&](int64_t dim) { return num_scales(c.format, dim); };
  view.key_scales = has_tails
                        ? part(key_scales, {c.num_pages, 2, c.head_dim - c.key_dims.in_16}, c.dtype)
                        : part(key_scales, {c.num_pages, c.page_size, scales(c.head_dim)}, c.dtype);
  view.value_scales = part(value_scales, {c.num_pages, c.page_size, scales(c.value_dim)}, c.dtype);
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
  if (facts_of(c.format).has_tails) {
    view.tails = layout.add(
        {int64_t{c.num_layers} * c.num_sequences, c.num_kv_heads, 2 * c.page_size, c.head_dim},
        c.dtype);
  }
}

}  // namespace adakv
