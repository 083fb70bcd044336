#include "cache/file_parts.h"

#include "adakv/error.h"

namespace adakv {

std::vector<FilePart> parts_of(const CacheConfig& config,
                               int32_t layer,
                               const int32_t* lengths,
                               int64_t num_rows) {
  constexpr int64_t kFull = kTailedPageSize;
  int64_t entries = 0, full_pages = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    entries += lengths[r];
    full_pages += lengths[r] / kFull;
  }
  const int64_t dim = config.head_dim, value_dim = config.value_dim;
  const auto size = static_cast<int64_t>(dtype_size(config.dtype));
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  std::vector<FilePart> parts;
  const auto add = [&](const char* name, std::initializer_list<int64_t> shape, DType dtype,
                       TensorView LayerView::* where, int64_t entry_bytes, int64_t page_offset = 0,
                       Which which = Which::kAll, int64_t file_offset = 0) {
    parts.push_back({prefix + name, TensorView(nullptr, shape, dtype), where, which,
                     static_cast<size_t>(entry_bytes), static_cast<size_t>(page_offset),
                     static_cast<size_t>(file_offset)});
  };
  add("positions", {entries}, DType::kInt32, &LayerView::page_positions, 4);
  if (const FormatFacts& facts = facts_of(config.format); facts.has_tails) {
    const int64_t tail = entries - full_pages * kFull, width = dim * facts.code_bits / 8;
    const int64_t numbers = num_scales(config.format, dim);
    add("pages", {full_pages, 2, kFull, width}, DType::kUInt8, &LayerView::pages, 2 * width, 0,
        Which::kFull);
    add("key_scales", {full_pages, 2, dim}, config.dtype, &LayerView::key_scales,
        2 * dim * size / kFull, 0, Which::kFull);
    add("value_scales", {full_pages, kFull, numbers}, config.dtype, &LayerView::value_scales,
        numbers * size, 0, Which::kFull);
    for (int64_t half = 0; half < 2; ++half) {
      add("tails", {2, tail, dim}, config.dtype, &LayerView::tails, dim * size,
          half * kFull * dim * size, Which::kTail, half * tail * dim * size);
    }
    return parts;
  }
  const bool is_plain = config.format == PageFormat::kPlain;
  const DType codes = is_plain ? config.dtype : DType::kUInt8;
  const auto code = static_cast<int64_t>(dtype_size(codes));
  add("keys", {entries, dim}, codes, &LayerView::pages, dim * code);
  if (value_dim == dim) {
    add("values", {entries, dim}, codes, &LayerView::pages, dim * code,
        config.page_size * dim * code);
  } else {
    add("values", {entries, value_dim}, codes, &LayerView::value_pages, value_dim * code);
  }
  if (config.has_biases) {
    add("biases", {entries}, DType::kFloat16, &LayerView::page_biases, 2);
  }
  if (!is_plain) {
    const auto scales = [&](int64_t width) { return num_scales(config.format, width); };
    add("key_scales", {entries, scales(dim)}, config.dtype, &LayerView::key_scales,
        scales(dim) * size);
    add("value_scales", {entries, scales(value_dim)}, config.dtype, &LayerView::value_scales,
        scales(value_dim) * size);
  }
  return parts;
}

}  // namespace adakv
