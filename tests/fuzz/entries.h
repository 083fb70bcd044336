// Entries that are made of a number, in float32 or bfloat16, and what a cache says of them.
#pragma once

#include <adakv/adakv.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "input.h"

namespace adakv::fuzz {

/// A cache of random sizes.
inline CacheConfig config_from(Input& input) {
  CacheConfig config;
  config.num_layers = input.range(1, 3);
  config.num_sequences = input.range(1, 3);
  config.num_kv_heads = input.range(1, 3);
  config.head_dim = config.value_dim = 8;
  config.page_size = 8 << input.range(0, 1);
  config.num_pages = input.range(1, 300);
  config.max_row_pages = input.range(1, 40);
  config.format = static_cast<PageFormat>(input.range(0, kNumFormats - 1));
  if (config.format == PageFormat::kFp8) config.format = PageFormat::kPlain;
  config.dtype = config.format == PageFormat::kPlain ? DType::kFloat32 : DType::kBFloat16;
  if (facts_of(config.format).has_tails) {
    config.page_size = kTailedPageSize;
  } else if (input.one_in(2)) {
    config.head_dim = 8 * input.range(1, 3);
    config.value_dim = 8 * input.range(1, 3);
  }
  return config;
}

struct Entry {
  int32_t position;
  int number;
};

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

/// Element d of the key of an entry; its value is the same plus 1. In bfloat16 both are rounded.
inline float element(int number, int d) {
  return static_cast<float>(number % 4093) / 64 + static_cast<float>(d) / 8;
}

inline float rounded(float x, DType dtype) {
  return dtype == DType::kFloat32 ? x : from_bfloat16(to_bfloat16(x));
}

/// Numbers in the dtype of a cache.
class Numbers {
 public:
  Numbers(int64_t count, DType dtype)
      : dtype_(dtype), bytes_(static_cast<size_t>(count) * dtype_size(dtype)) {}

  void set(int64_t i, float x) {
    if (dtype_ == DType::kFloat32) {
      std::memcpy(at(i), &x, sizeof x);
    } else {
      const uint16_t half = to_bfloat16(x);
      std::memcpy(at(i), &half, sizeof half);
    }
  }

  float get(int64_t i) const {
    float x;
    uint16_t half;
    if (dtype_ == DType::kFloat32) {
      std::memcpy(&x, at(i), sizeof x);
      return x;
    }
    std::memcpy(&half, at(i), sizeof half);
    return from_bfloat16(half);
  }

  TensorView view(std::initializer_list<int64_t> shape) {
    return TensorView(bytes_.data(), shape, dtype_);
  }

 private:
  char* at(int64_t i) { return bytes_.data() + i * static_cast<int64_t>(dtype_size(dtype_)); }
  const char* at(int64_t i) const { return const_cast<Numbers*>(this)->at(i); }

  DType dtype_;
  std::vector<char> bytes_;
};

/// Writes the key and the value of an entry at a place among others.
inline void put(const CacheConfig& config, Numbers& keys, Numbers& values, int64_t at, int number) {
  const int64_t key = at * config.head_dim, value = at * config.value_dim;
  for (int d = 0; d < config.head_dim; ++d) keys.set(key + d, element(number, d));
  for (int d = 0; d < config.value_dim; ++d) values.set(value + d, element(number, d) + 1);
}

/// Element d of a key (half 0) or value (half 1) that a row holds, and how far it may be from what
/// was written.
struct Held {
  float x, error;
};

inline Held held(const LayerView& view,
                 int64_t row,
                 int64_t length,
                 int64_t page,
                 int64_t slot,
                 int half,
                 int d) {
  const int64_t size = view.pages.shape[2], in_page = slot % size;
  const TensorView& scales = half == 0 ? view.key_scales : view.value_scales;
  if (!view.tails) {
    const TensorView part = half == 0 ? view.pages : view.values();
    const int64_t at = page * part.stride[0] + in_page * part.shape[3] + d;
    if (!scales) return {part.ptr<float>()[at], 0};
    const uint16_t* numbers = scales.ptr<uint16_t>() + page * scales.stride[0] + in_page * 2;
    const float scale = from_bfloat16(numbers[0]), zero = from_bfloat16(numbers[1]);
    return {scale * static_cast<float>(part.ptr<uint8_t>()[at]) + zero, scale * 0.505f};
  }
  const int64_t dim = view.tails.shape[3];
  if (slot >= length / size * size) {
    const uint16_t* tail = view.tails.ptr<uint16_t>() + row * view.tails.stride[1];
    return {from_bfloat16(tail[(half * size + in_page) * dim + d]), 0};
  }
  const uint8_t* codes = view.pages.ptr<uint8_t>() + page * view.pages.stride[0];
  const int bits = facts_of(view.format()).code_bits, in_byte = 8 / bits;
  const uint8_t byte = codes[(half * size + in_page) * (dim / in_byte) + d / in_byte];
  const uint16_t* numbers = scales.ptr<uint16_t>() + page * scales.stride[0];
  const float scale = from_bfloat16(half == 0 ? numbers[d] : numbers[in_page * 2]);
  const float zero = from_bfloat16(half == 0 ? numbers[dim + d] : numbers[in_page * 2 + 1]);
  const int code = byte >> d % in_byte * bits & ((1 << bits) - 1);
  return {scale * static_cast<float>(code) + zero, scale * 0.50001f};
}

/// What a sequence of a cache ought to hold.
struct SequenceModel {
  bool is_begun = false;
  int32_t seen = 0;
  int64_t appended = 0;
  int64_t num_started = 0;  // pages of each row that the host knows of
  bool is_forked = false;
  std::vector<int64_t> num_pages;        // [L]
  std::vector<std::vector<Entry>> rows;  // [L * Hkv]

  /// It becomes a branch that leaves `back` tokens behind.
  void fork(int64_t back, bool whole, int64_t page_size, int64_t num_heads) {
    if (!is_begun) return;
    const int64_t left = std::max<int64_t>(appended - back, 0);
    const int64_t behind = starts(appended, page_size) - starts(left, page_size);
    const int64_t leave = std::min<int64_t>(num_started, behind + 2);
    for (int64_t& pages : num_pages) pages += (whole ? 1 : 2 - leave) * num_heads;
    num_started = whole ? 0 : num_started - leave + 2;
    appended = left;
    for (auto& row : rows) row.resize(row.size() - back);
    seen -= static_cast<int32_t>(back);
    is_forked = true;
  }

  /// Its counts behind so many new tokens.
  void append(int32_t count, int64_t page_size, int64_t num_heads) {
    const int64_t more = starts(appended + count, page_size) - starts(appended, page_size);
    for (int64_t& pages : num_pages) pages += more * num_heads;
    num_started += more;
    seen += count;
    appended += count;
  }

  /// Pages that a row was given for so many tokens, behind its first fresh one.
  static int64_t starts(int64_t tokens, int64_t page_size) {
    return std::max<int64_t>(tokens - 1, 0) / page_size;
  }
};

/// What a sequence keeps of what it holds.
struct Chosen {
  std::vector<std::vector<int32_t>> slots, indptr;  // [L]
  std::vector<std::vector<int64_t>> kept;           // [L][1], a bound
  int64_t longest = 0;
};

/// Some of the entries of each row, which are all that is left.
inline Chosen choose_again(Input& input, SequenceModel& text, const CacheConfig& config) {
  Chosen chosen;
  const int heads = config.num_kv_heads;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    std::vector<int32_t> slots, indptr = {0};
    for (int h = 0; h < heads; ++h) {
      std::vector<Entry>& row = text.rows[layer * heads + h];
      std::vector<Entry> left;
      const int stride = input.range(1, 5), first = input.range(0, 20);
      for (int slot = first; slot < static_cast<int>(row.size()); slot += stride) {
        slots.push_back(slot);
        left.push_back(row[slot]);
      }
      row = left;
      indptr.push_back(static_cast<int32_t>(slots.size()));
      chosen.longest = std::max<int64_t>(chosen.longest, row.size());
    }
    const int64_t kept = indptr.back() + input.range(0, 10);
    text.num_pages[layer] = KVCache::pages_for(kept, 0, heads, config.page_size);
    chosen.slots.push_back(slots);
    chosen.indptr.push_back(indptr);
    chosen.kept.push_back({kept});
  }
  text.appended = text.num_started = 0;
  return chosen;
}

/// The rows of one sequence.
inline LayerView rows_of(LayerView layer, int b) {
  for (TensorView* tensor :
       {&layer.block_table, &layer.lengths, &layer.seen, &layer.fresh_pages, &layer.tails}) {
    if (*tensor) *tensor = tensor->narrow(0, b, 1);
  }
  return layer;
}

/// Runs a verb with the scratch memory that it wants.
template <typename Args>
void run(void (*verb)(const Args&), Args& args) {
  std::vector<int32_t> workspace((workspace_bytes(args) + 3) / 4);
  args.workspace =
      TensorView(workspace.data(), {static_cast<int64_t>(workspace.size())}, DType::kInt32);
  verb(args);
}

inline TensorView ints(std::vector<int32_t>& numbers) {
  return TensorView(numbers.data(), {static_cast<int64_t>(numbers.size())}, DType::kInt32);
}

}  // namespace adakv::fuzz
