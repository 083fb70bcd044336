#include "ops/check_layer.h"

#include <utility>

namespace adakv {
namespace {

void check_width(const Checker& check, const char* name, int64_t width) {
  check.require(width >= 8 && width <= 256 && width % 8 == 0, name,
                " must be a multiple of 8, at most 256, got ", width);
}

// Pages of codes may lie apart, as they do in a KVCache; within a page nothing does, and it is read in
// pieces of 16 bytes.
void check_page_parts(const Checker& check, const char* name, const TensorView& view) {
  if (view.size() == 0) return;
  int64_t elements = 1;
  for (int i = view.rank - 1; i > 0; --i) {
    check.require(view.stride[i] == elements, name,
                  " must be contiguous from the second dimension on");
    elements *= view.shape[i];
  }
  check.aligned(name, view);
  const int64_t bytes = view.stride[0] * static_cast<int64_t>(dtype_size(view.dtype));
  check.require(view.shape[0] == 1 || (view.stride[0] >= elements && bytes % 16 == 0), name,
                ": pages must lie at least ", elements,
                " elements and a multiple of 16 bytes apart, got ", view.stride[0], " elements");
}

// Keys of which not all dimensions have 4 bits, and values beside them.
void check_mixed(Checker& check, const LayerView& layer) {
  const int64_t d = check.size("D");
  check.floats("key_scales", layer.key_scales, "N 2 D4");
  check.tensor("value_pages", layer.value_pages, "N 1 P D/2", DType::kUInt8);
  const KeyDims dims = layer.key_dims();
  check.require(
      2 * check.size("D/2") == d && dims.in_16 >= 0 && dims.in_16 % 4 == 0 && dims.in_2 >= 0 &&
          dims.in_2 % 8 == 0 && dims.in_16 < d && dims.in_2 <= d - dims.in_16,
      "pages, value_pages and key_scales must be [N, 1, P, C], [N, 1, P, ", d / 2, "] and [N, 2, ",
      d, " - n] for mixed keys, a multiple n of 4 dimensions in 16 bits ",
      "and one of 8 in 2, got ", layer.pages.shape_string(), ", ", layer.value_pages.shape_string(),
      " and ", layer.key_scales.shape_string());
}

void check_tailed(Checker& check, const LayerView& layer) {
  const FormatFacts& facts = facts_of(layer.format());
  check.require(check.size("P") == kTailedPageSize, "page size P must be ", kTailedPageSize,
                " for ", facts.name, " pages, got ", check.size("P"));
  const int64_t width = num_scales(layer.format(), check.size("D"));
  if (layer.value_pages) {
    check_mixed(check, layer);
  } else {
    check.require(2 * check.size("C") == check.size("D") || facts.code_bits == 2,
                  "pages must be [N, 2, P, ", check.size("D") / 2, "] for int4, or [N, 2, P, ",
                  check.size("D") / 4, "] for int2, got ", layer.pages.shape_string());
    check.floats("key_scales", layer.key_scales, "N 2 D");
  }
  check.floats("value_scales", layer.value_scales, "N P 2Z");
  check.require(check.size("2Z") == width, "value_scales must have ", width,
                " numbers for each entry, got ", layer.value_scales.shape_string());
  check_page_parts(check, "pages", layer.pages);
  check_page_parts(check, "key_scales", layer.key_scales);
  check_page_parts(check, "value_scales", layer.value_scales);
  check_tails(check, "tails", layer.tails, "B Hkv 2P D");
}

void check_quantised(Checker& check, const LayerView& layer) {
  check.require(check.float_dtype() != DType::kFloat32, "pages of ", dtype_name(layer.pages.dtype),
                " need keys, values and queries in float16 or bfloat16, got float32");
  const PageFormat format = layer.format();
  if (facts_of(format).has_tails) return check_tailed(check, layer);
  check_page_parts(check, "pages", layer.pages);
  const auto check_scales = [&](const char* name, const TensorView& view, const char* dims,
                                int64_t dim) {
    check.floats(name, view, dims);
    const int64_t width = num_scales(format, dim);
    check.require(view.shape[2] == width, name, " must have ", width,
                  " numbers for each entry, got ", view.shape_string());
    check_page_parts(check, name, view);
  };
  const bool is_int8 = format == PageFormat::kInt8;
  check_scales("key_scales", layer.key_scales, is_int8 ? "N P 2Z" : "N P Z", check.size("D"));
  check_scales("value_scales", layer.value_scales, is_int8 ? "N P 2Zv" : "N P Zv",
               layer.values().shape[3]);
}

// Values that are as wide as keys lie in the pages themselves.
void check_values(Checker& check, const LayerView& layer) {
  if (!layer.value_pages) return;
  if (!layer.tails) {
    check.tensor("value_pages", layer.value_pages, "N 1 P Dv", layer.pages.dtype);
    check_width(check, "value dim Dv", check.size("Dv"));
  }
  check_page_parts(check, "pages", layer.pages);
  check_page_parts(check, "value_pages", layer.value_pages);
  check.require(layer.pages.shape[0] <= 1 || layer.value_pages.stride[0] == layer.pages.stride[0],
                "value_pages must lie as far apart as pages, ", layer.pages.stride[0],
                " elements, got ", layer.value_pages.stride[0]);
}

// The pages' own shape: keys and values, or keys alone where there are value_pages.
const char* dims_of_pages(const LayerView& layer) {
  return layer.value_pages ? "N 1 P D" : "N 2 P D";
}

}  // namespace

void check_tails(Checker& check, const char* name, const TensorView& tails, const char* dims) {
  check.floats(name, tails, dims);
  check.require(check.size("2P") == 2 * check.size("P") && tails.stride[2] == check.size("D"), name,
                " must be [B, Hkv, ", 2 * check.size("P"), ", D], contiguous from the third ",
                "dimension on, got ", tails.shape_string());
  check.aligned(name, tails);
  for (int i = 0; i < 2; ++i) {
    check.require(tails.shape[i] <= 1 || tails.stride[i] % 8 == 0, name,
                  ": rows must lie a multiple of 16 bytes apart, got ", tails.stride[i],
                  " elements");
  }
}

void check_head_dim(const Checker& check) {
  check_width(check, "head dim D", check.size("D"));
}

const char* value_dims(const LayerView& layer, const char* same, const char* own) {
  return layer.value_pages && !layer.tails ? own : same;
}

void check_layer(Checker& check, const LayerView& layer) {
  const PageFormat format = layer.format();
  if (format == PageFormat::kPlain) {
    check.floats("pages", layer.pages, dims_of_pages(layer));
    check.require(!layer.key_scales && !layer.value_scales,
                  "key_scales and value_scales must be left out for pages of ",
                  dtype_name(layer.pages.dtype));
  } else if (layer.tails) {
    check.tensor("pages", layer.pages, layer.value_pages ? "N 1 P C" : "N 2 P C", DType::kUInt8);
  } else {
    check.tensor("pages", layer.pages, dims_of_pages(layer), layer.pages.dtype);
  }
  check.tensor("page_positions", layer.page_positions, "N P", DType::kInt32);
  check.optional("page_biases", layer.page_biases, "N P", DType::kFloat16);
  check.require(!layer.page_biases || format == PageFormat::kPlain,
                "page_biases must be left out for pages of ", dtype_name(layer.pages.dtype),
                ": plain ones alone have biases");
  check.tensor("block_table", layer.block_table, "B Hkv M", DType::kInt32);
  check.tensor("lengths", layer.lengths, "B Hkv", DType::kInt32);
  check.tensor("seen", layer.seen, "B", DType::kInt32);
  check.tensor("fresh_pages", layer.fresh_pages, "B Hkv F", DType::kInt32);
  check.require(check.size("F") >= 1, "fresh_pages must have at least one column, got ",
                layer.fresh_pages.shape_string());
  const int64_t p = check.size("P"), d = check.size("D");
  check.require(p >= 8 && p <= 256 && (p & (p - 1)) == 0,
                "page size P must be a power of two from 8 to 256, got ", p);
  if (layer.page_biases) check_page_parts(check, "page_biases", layer.page_biases);
  check_values(check, layer);
  if (format != PageFormat::kPlain) return check_quantised(check, layer);
  if (layer.value_pages) return;
  const int64_t* stride = layer.pages.stride;
  check.require(
      check.size("N") == 0 || (stride[2] == d && stride[1] == p * d && stride[0] == 2 * p * d),
      "pages must be contiguous");
}

void check_held_layer(Checker& check, const LayerView& layer) {
  const bool is_plain = layer.format() == PageFormat::kPlain;
  if (is_plain) {
    check.floats("pages", layer.pages, dims_of_pages(layer));
  } else {
    check.tensor("pages", layer.pages, dims_of_pages(layer), layer.pages.dtype);
    check.floats("key_scales", layer.key_scales,
                 layer.format() == PageFormat::kInt8 ? "N P 2Z" : "N P Z");
  }
  check_head_dim(check);
  check_layer(check, layer);
  check_page_parts(check, "pages", layer.pages);
  check_page_parts(check, "page_positions", layer.page_positions);
}

void check_any_layer(Checker& check, const LayerView& layer) {
  if (!layer.tails) return check_held_layer(check, layer);
  check.floats("tails", layer.tails, "B Hkv 2P D");
  check_head_dim(check);
  check_layer(check, layer);
  check_page_parts(check, "page_positions", layer.page_positions);
}

}  // namespace adakv
