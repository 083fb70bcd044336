#include "cache/config.h"

#include <utility>

#include "adakv/error.h"

namespace adakv {
namespace {

constexpr int32_t kMostLayers = 1 << 16;
constexpr int64_t kMostRows = int64_t{1} << 24;     // of all layers
constexpr int64_t kMostColumns = int64_t{1} << 40;  // of all block tables

}  // namespace

void check_page_size(const char* who, int32_t page_size) {
  ADAKV_CHECK(page_size >= 8 && page_size <= 256 && (page_size & (page_size - 1)) == 0, who,
              ": page_size must be a power of two from 8 to 256, got ", page_size);
}

CacheConfig checked(CacheConfig c) {
  if (c.value_dim == 0) c.value_dim = c.head_dim;
  ADAKV_CHECK(c.num_layers >= 1 && c.num_layers <= kMostLayers, "KVCache: num_layers must be 1 .. ",
              kMostLayers, ", got ", c.num_layers);
  ADAKV_CHECK(c.num_sequences >= 1, "KVCache: num_sequences must be at least 1, got ",
              c.num_sequences);
  ADAKV_CHECK(c.num_kv_heads >= 1, "KVCache: num_kv_heads must be at least 1, got ",
              c.num_kv_heads);
  for (const auto& [name, dim] :
       {std::pair("head_dim", c.head_dim), std::pair("value_dim", c.value_dim)}) {
    ADAKV_CHECK(dim >= 8 && dim <= 256 && dim % 8 == 0, "KVCache: ", name,
                " must be a multiple of 8, at most 256, got ", dim);
  }
  check_page_size("KVCache", c.page_size);
  ADAKV_CHECK(c.num_pages >= 1, "KVCache: num_pages must be at least 1, got ", c.num_pages);
  ADAKV_CHECK(c.max_row_pages >= 1, "KVCache: max_row_pages must be at least 1, got ",
              c.max_row_pages);
  int64_t rows = 1;
  for (const int64_t n : {c.num_layers, c.num_sequences, c.num_kv_heads}) {
    ADAKV_CHECK(n <= kMostRows / rows,
                "KVCache: num_layers * num_sequences * num_kv_heads must be at most ", kMostRows,
                ", got ", c.num_layers, " * ", c.num_sequences, " * ", c.num_kv_heads);
    rows *= n;
  }
  ADAKV_CHECK(c.max_row_pages <= kMostColumns / rows, "KVCache: max_row_pages must be at most ",
              kMostColumns / rows, " for ", rows, " rows, got ", c.max_row_pages);
  ADAKV_CHECK(c.dtype < DType::kInt32, "KVCache: dtype must be float32, float16 or bfloat16, got ",
              dtype_name(c.dtype));
  ADAKV_CHECK(static_cast<int>(c.format) < kNumFormats,
              "KVCache: format must be plain, int8, fp8, int4 or int2, got ",
              static_cast<int>(c.format));
  ADAKV_CHECK(c.format == PageFormat::kInt4 || !c.key_dims.are_mixed(),
              "KVCache: key_dims are of int4 pages alone, got ", c.key_dims.in_16, " and ",
              c.key_dims.in_2, " for others");
  ADAKV_CHECK(c.key_dims.in_16 >= 0 && c.key_dims.in_16 % 4 == 0 && c.key_dims.in_2 >= 0 &&
                  c.key_dims.in_2 % 8 == 0 && c.key_dims.in_16 < c.head_dim &&
                  c.key_dims.in_2 <= c.head_dim - c.key_dims.in_16,
              "KVCache: key_dims must be a multiple of 4 in 16 bits and one of 8 in 2, of ",
              c.head_dim, " in all and not all of them in 16, got ", c.key_dims.in_16, " and ",
              c.key_dims.in_2);
  if (c.format == PageFormat::kPlain) return c;
  ADAKV_CHECK(!c.has_biases, "KVCache: has_biases must be false for quantised pages");
  ADAKV_CHECK(c.dtype != DType::kFloat32,
              "KVCache: quantised pages need dtype float16 or bfloat16, got float32");
  const FormatFacts& facts = facts_of(c.format);
  ADAKV_CHECK(!facts.has_tails || c.page_size == kTailedPageSize, "KVCache: page_size must be ",
              kTailedPageSize, " for ", facts.name, " pages, got ", c.page_size);
  ADAKV_CHECK(!facts.has_tails || c.value_dim == c.head_dim,
              "KVCache: value_dim must be head_dim = ", c.head_dim, " for ", facts.name,
              " pages, got ", c.value_dim);
  return c;
}

}  // namespace adakv
