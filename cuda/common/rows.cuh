// Where the entries and the integers of a row lie: what kernels know of the tensors of a call.
#pragma once

#include <cstdint>

#include "adakv/kv_cache.h"
#include "adakv/types.h"
#include "common/dispatch.cuh"

namespace adakv {

/// A tensor [B, H, T, D] of entries (or queries), or [B, H, T] of numbers.
struct EntryRows {
  char* data;         // null: not given
  int64_t stride[3];  // in bytes

  __device__ char* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * stride[0] + h * stride[1] + t * stride[2];
  }
};

/// A tensor [B, H, ...] of integers.
struct IntRows {
  int32_t* data;
  int64_t stride[2];

  __device__ int32_t* at(int64_t b, int64_t h) const {
    return data + b * stride[0] + h * stride[1];
  }
};

inline EntryRows entry_rows(const TensorView& x) {
  EntryRows rows = {};
  if (!x) return rows;
  const int64_t bytes = static_cast<int64_t>(dtype_size(x.dtype));
  rows.data = x.ptr<char>();
  for (int i = 0; i < 3; ++i) rows.stride[i] = x.stride[i] * bytes;
  return rows;
}

inline IntRows int_rows(const TensorView& x) {
  return {x.ptr<int32_t>(), {x.stride[0], x.stride[1]}};
}

/// The scales of keys or values [N, P, Z * scales of a group]; nothing for plain pages.
struct ScaleRows {
  char* data;
  int64_t page_stride;  // in bytes
  int32_t slot_bytes;

  __device__ char* at(int32_t page, int32_t slot) const {
    return data + page * page_stride + slot * slot_bytes;
  }
};

inline ScaleRows scale_rows(const TensorView& x) {
  if (!x) return {};
  const int64_t bytes = static_cast<int64_t>(dtype_size(x.dtype));
  return {x.ptr<char>(), x.stride[0] * bytes, static_cast<int32_t>(x.shape[2] * bytes)};
}

/// A LayerView as kernels take it.
struct LayerRows {
  char* pages;               // [N, P, D] keys, elements or codes
  char* values;              // [N, P, Dv]
  int64_t page_stride;       // in bytes, of both
  int32_t* page_positions;   // [N, P]
  int64_t positions_stride;  // of a page
  IntRows block_table;       // [B, Hkv, M]
  IntRows lengths;           // [B, Hkv]
  IntRows fresh_pages;       // [B, Hkv, F]
  int32_t* seen;             // [B]
  int32_t num_heads, head_dim, value_dim, page_size;
  int32_t entry_bytes, value_bytes;  // of a key and of a value in a page
  int32_t page_shift;                // page_size is 1 << page_shift
  // What plain pages don't need comes last: parameters come from memory a line at a time.
  ScaleRows key_scales, value_scales;  // of codes; keys' with tails: [N, 2, D]
  EntryRows tails;                     // [B, Hkv, 2 P, D], 16 bits, or none
  KeyDims key_dims;                    // with tails
  uint16_t* page_biases;               // [N, P] float16, or null
  int64_t biases_stride;               // of a page

  /// The key in a slot of a page.
  __device__ char* key(int32_t page, int32_t slot) const {
    return pages + page_stride * page + slot * entry_bytes;
  }

  /// Its value; half_page_bytes() further, if it is as wide as the key.
  __device__ char* value(int32_t page, int32_t slot) const {
    return values + page_stride * page + slot * value_bytes;
  }

  /// Pages that `length` entries fill.
  __device__ int32_t num_pages(int32_t length) const {
    return (length + page_size - 1) >> page_shift;
  }

  __device__ int64_t half_page_bytes() const { return int64_t{page_size} * entry_bytes; }

  /// An entry's key or value in its row's tail, from an element on.
  __device__ char* tail(int32_t b, int32_t h, bool is_value, int32_t slot, int32_t element) const {
    return tails.at(b, h, slot + (is_value ? page_size : 0)) + element * 2;
  }
};

inline LayerRows layer_rows(const LayerView& layer) {
  LayerRows rows = {};
  rows.pages = layer.pages.ptr<char>();
  const TensorView values = layer.values();
  rows.values = values.ptr<char>();
  rows.page_stride = layer.pages.stride[0] * static_cast<int64_t>(dtype_size(layer.pages.dtype));
  rows.key_scales = scale_rows(layer.key_scales);
  rows.value_scales = scale_rows(layer.value_scales);
  rows.tails = entry_rows(layer.tails);
  rows.page_positions = layer.page_positions.ptr<int32_t>();
  rows.positions_stride = layer.page_positions.stride[0];
  rows.page_biases = layer.page_biases ? layer.page_biases.ptr<uint16_t>() : nullptr;
  rows.biases_stride = layer.page_biases.stride[0];
  rows.block_table = int_rows(layer.block_table);
  rows.lengths = int_rows(layer.lengths);
  rows.fresh_pages = int_rows(layer.fresh_pages);
  rows.seen = layer.seen.ptr<int32_t>();
  rows.num_heads = static_cast<int32_t>(layer.lengths.shape[1]);
  rows.page_size = static_cast<int32_t>(layer.page_positions.shape[1]);
  while (1 << rows.page_shift < rows.page_size) ++rows.page_shift;
  const int32_t bytes = static_cast<int32_t>(dtype_size(values.dtype));
  const int32_t key_size = static_cast<int32_t>(layer.pages.shape[3]);
  const int32_t value_size = static_cast<int32_t>(values.shape[3]);
  const int32_t tail_size = static_cast<int32_t>(layer.tails.shape[3]);
  rows.head_dim = layer.tails ? tail_size : key_size;
  rows.value_dim = layer.tails ? tail_size : value_size;
  rows.key_dims = layer.key_dims();
  rows.entry_bytes = key_size * bytes;
  rows.value_bytes = value_size * bytes;
  return rows;
}

/// Whether every row of the tensor (along its last dimension) begins at a multiple of `bytes`.
inline bool rows_are_aligned(const TensorView& x, size_t bytes) {
  bool is_aligned = reinterpret_cast<uintptr_t>(x.data) % bytes == 0;
  for (int i = 0; i + 1 < x.rank; ++i) {
    const bool matters = x.shape[i] > 1;
    is_aligned &= !matters || x.stride[i] * dtype_size(x.dtype) % bytes == 0;
  }
  return is_aligned;
}

/// Calls the body with the type that entries are copied by: 16 bytes if all of them are aligned to
/// that, else one element.
template <typename Body>
void dispatch_chunk(bool is_aligned, DType dtype, const Body& body) {
  if (is_aligned) return body(TypeTag<uint4>{});
  if (dtype_size(dtype) == 2) return body(TypeTag<uint16_t>{});
  body(TypeTag<uint32_t>{});
}

}  // namespace adakv
