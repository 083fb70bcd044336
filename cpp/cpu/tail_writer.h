// Writes entries of int4 and int2: to the tails of rows, and whole pages of them as codes.
#pragma once

#include <cstring>

#include "adakv/ops.h"
#include "cpu/kernels.h"
#include "ops/tails.h"

namespace adakv {

/// The body of append.
void append_entries(const AppendArgs& args, FullTails full);

class TailWriter {
 public:
  /// For a layer with tails.
  explicit TailWriter(const LayerView& layer)
      : layer_(layer),
        head_dim_(layer.tails.shape[3]),
        entry_bytes_(head_dim_ * static_cast<int64_t>(dtype_size(layer.tails.dtype))),
        format_(layer.format()),
        key_dims_(layer.key_dims()),
        quantise_page_(kernels().quantise_page[static_cast<int>(layer.tails.dtype)]) {}

  /// Puts a key and a value into a slot of the tail of row (b, h).
  void write(int64_t b, int64_t h, int64_t slot, const char* key, const char* value) const {
    char* tail = tail_of(b, h) + slot * entry_bytes_;
    std::memcpy(tail, key, entry_bytes_);
    std::memcpy(tail + kTailedPageSize * entry_bytes_, value, entry_bytes_);
  }

  /// Writes the codes of a full tail to a page.
  void quantise(int64_t b, int64_t h, int64_t page) const {
    const void* entries[2 * kTailedPageSize];
    for (int i = 0; i < 2 * kTailedPageSize; ++i) entries[i] = tail_of(b, h) + i * entry_bytes_;
    quantise(entries, nullptr, page);
  }

  /// The same of any entries, the keys of the page's slots, then the values; fetches those of `next`,
  /// unless it is null.
  void quantise(const void* const* entries, const void* const* next, int64_t page) const {
    const auto at = [&](const TensorView& x) { return x.ptr<uint16_t>() + page * x.stride[0]; };
    const auto codes = [&](const TensorView& x) { return x.ptr<uint8_t>() + page * x.stride[0]; };
    quantise_page_(entries, next, static_cast<int>(head_dim_), format_, key_dims_,
                   {codes(layer_.pages), codes(layer_.values()), at(layer_.key_scales),
                    at(layer_.value_scales)});
  }

 private:
  char* tail_of(int64_t b, int64_t h) const {
    const TensorView& tails = layer_.tails;
    return tails.ptr<char>() +
           (b * tails.stride[0] + h * tails.stride[1]) * static_cast<int64_t>(sizeof(uint16_t));
  }

  const LayerView& layer_;
  int64_t head_dim_, entry_bytes_;
  PageFormat format_;
  KeyDims key_dims_;
  QuantisePage quantise_page_;
};

}  // namespace adakv
