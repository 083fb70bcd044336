// Entries of a row one by one, of any dtype and format: for kernels that take whatever comes. What
// they are made of has a layer.
#pragma once

#include "attend/attend.h"
#include "common/dispatch.cuh"
#include "common/dtype.cuh"

namespace adakv {

/// A query, and the row that it looks at.
struct Query {
  int32_t b, h, head, token;
  int32_t length;   // entries of the row
  int32_t visible;  // slots before this are seen; 0 for padding

  /// The page of a slot of its row.
  __device__ int32_t page(const LayerRows& layer, int32_t slot) const {
    return layer.block_table.at(b, h)[slot / layer.page_size];
  }
};

/// Where a key and its value lie, as they are.
template <typename Element>
struct Entry {
  static constexpr int kLoads = 16;  // of a lane on their way at a time

  const char* at = nullptr;
  int64_t to_value = 0;  // from the key, in bytes

  Entry() = default;
  template <typename Params>
  __device__ Entry(const Params& p, const Query& query, int32_t slot) {
    const int32_t page = query.page(p.layer, slot), in_page = slot % p.layer.page_size;
    at = p.layer.key(page, in_page);
    to_value = p.layer.value(page, in_page) - at;
  }

  __device__ Entry of_lane(int32_t lane) const {
    Entry entry;
    entry.at =
        reinterpret_cast<const char*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(at), lane));
    entry.to_value = __shfl_sync(kFullWarp, static_cast<long long>(to_value), lane);
    return entry;
  }

  __device__ float key(const LayerRows&, int32_t d) const {
    return to_float(reinterpret_cast<const Element*>(at)[d]);
  }

  __device__ float value(const LayerRows&, int32_t d) const {
    return to_float(reinterpret_cast<const Element*>(at + to_value)[d]);
  }
};

/// The same with the bias of its logit.
template <typename Element>
struct BiasedEntry : Entry<Element> {
  float bias = 0;

  BiasedEntry() = default;
  template <typename Params>
  __device__ BiasedEntry(const Params& p, const Query& query, int32_t slot)
      : Entry<Element>(p, query, slot) {
    const int64_t page = query.page(p.layer, slot) * p.layer.biases_stride;
    bias = bits_to_float<__half>(p.layer.page_biases[page + slot % p.layer.page_size]);
  }
};

/// The same of codes, with scales of the dtype Element.
template <typename Element, typename Format>
struct CodedEntry {
  static constexpr int kLoads = 8;

  int32_t page = 0, slot = 0;

  CodedEntry() = default;
  template <typename Params>
  __device__ CodedEntry(const Params& p, const Query& query, int32_t slot)
      : page(query.page(p.layer, slot)), slot(slot % p.layer.page_size) {}

  __device__ CodedEntry of_lane(int32_t lane) const {
    CodedEntry entry;
    entry.page = __shfl_sync(kFullWarp, page, lane);
    entry.slot = __shfl_sync(kFullWarp, slot, lane);
    return entry;
  }

  __device__ float key(const LayerRows& layer, int32_t d) const {
    return element(layer.key(page, slot) + d, layer.key_scales, d);
  }

  __device__ float value(const LayerRows& layer, int32_t d) const {
    return element(layer.value(page, slot) + d, layer.value_scales, d);
  }

 private:
  __device__ float element(const char* code, const ScaleRows& scales, int32_t d) const {
    const Element* scale =
        reinterpret_cast<const Element*>(scales.at(page, slot)) + d / kGroupSize * Format::kScales;
    const float x = decode<Format>(*reinterpret_cast<const uint8_t*>(code));
    return to_float(scale[0]) * x + (Format::kScales == 2 ? to_float(scale[1]) : 0.f);
  }
};

/// Of formats whose last entries are in the row's tail; kMixed: keys as KeyDims say. They are read page
/// by page (slots.cuh).
template <typename Element, typename Format, bool kMixed>
struct TailedEntry {};

/// Calls the body with the columns of a head dim that a lane holds.
template <typename Body>
void dispatch_columns(int64_t head_dim, const Body& body) {
  if (head_dim <= 1 * kWarpSize) return body(IntTag<1>{});
  if (head_dim <= 2 * kWarpSize) return body(IntTag<2>{});
  if (head_dim <= 4 * kWarpSize) return body(IntTag<4>{});
  body(IntTag<8>{});
}

/// Calls the body with the dtype, the kind of entry and the columns of a lane that a call is about,
/// for entries of up to `width` elements.
template <typename Body>
void dispatch_entries(const AttendArgs& args, int64_t width, const Body& body) {
  const auto run = [&](auto element, auto entry) {
    dispatch_columns(width, [&](auto columns) { body(element, entry, columns); });
  };
  const PageFormat format = args.layer.format();
  if (format == PageFormat::kPlain) {
    dispatch_dtype(args.queries.dtype, [&](auto element) {
      run(element, TypeTag<Entry<typename decltype(element)::type>>{});
    });
  } else {
    dispatch_codes(args.queries.dtype, format, [&](auto element, auto codes) {
      using Element = typename decltype(element)::type;
      using Format = typename decltype(codes)::type;
      if constexpr (std::is_same_v<Format, Int2>) {
        run(element, TypeTag<TailedEntry<Element, Int2, true>>{});
      } else if constexpr (std::is_same_v<Format, Int4>) {
        if (args.layer.key_dims().are_mixed()) {
          run(element, TypeTag<TailedEntry<Element, Int4, true>>{});
        } else {
          run(element, TypeTag<TailedEntry<Element, Int4, false>>{});
        }
      } else {
        run(element, TypeTag<CodedEntry<Element, Format>>{});
      }
    });
  }
}

}  // namespace adakv
