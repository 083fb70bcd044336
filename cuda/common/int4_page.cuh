// How a page of int4 or int2 gets its codes, all at once: keys by dimension over the page's 32 entries, values by
// groups (codes.cuh). What is not a whole page waits in 16 bits, in the row's tail.
//
// A key that is not finite takes no part in the scales, and its value is read as NaN.
#pragma once

#include "common/codes.cuh"

namespace adakv {

constexpr int kPageSlots = 32;

/// Which eight dimensions of which values a lane has: as many entries at a time as a warp has lanes
/// for.
struct PageLane {
  int32_t entry_lanes, at_once;  // lanes of an entry (8, 16, 24 or 32), entries at a time
  int32_t entry, element;        // this lane's among those, and the first of its dimensions
  bool has_elements;

  __device__ explicit PageLane(int32_t head_dim) {
    const int32_t lane = threadIdx.x % kWarpSize;
    entry_lanes = padded_head_dim(head_dim) / kChunkElements;
    at_once = kWarpSize / entry_lanes;
    entry = lane / entry_lanes;
    element = (lane - entry * entry_lanes) * kChunkElements;
    has_elements = entry < at_once && element < head_dim;
    if (has_elements) return;
    entry = element = 0;  // what it reads isn't used
  }
};

/// Pairs of 16-bit elements.
template <typename Element>
struct PairOf {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

template <typename Element>
__device__ inline typename PairOf<Element>::type pair_of(uint32_t bits) {
  return reinterpret_cast<const typename PairOf<Element>::type&>(bits);
}
template <typename Pair>
__device__ inline uint32_t bits_of(Pair pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}

/// A bit for each key of a page that is finite; lane i looks at entry i.
template <typename Element, typename Load>
__device__ inline uint32_t find_finite(int32_t head_dim, const Load& load) {
  const auto zero = pair_of<Element>(0);
  auto sum = zero;  // NaN unless all are finite
#pragma unroll 4
  for (int32_t element = 0; element < head_dim; element += kChunkElements) {
    const uint4 data = load(false, threadIdx.x % kWarpSize, element);
    const uint32_t words[4] = {data.x, data.y, data.z, data.w};
    for (int i = 0; i < 4; ++i) sum = __hfma2(pair_of<Element>(words[i]), zero, sum);
  }
  return __ballot_sync(kFullWarp, (bits_of(sum) & 0x7fff7fff) == 0);
}

/// Stores eight dimensions of a key from one on, as mixed KeyDims have them, and their scales and zeros
/// by two lanes; lane i has entry i. `words` are the dimensions as they are, `codes` four bits of each.
/// Keys begin at even addresses.
__device__ inline void store_mixed_keys(const LayerRows& layer,
                                        int32_t page,
                                        int32_t element,
                                        const uint32_t (&words)[4],
                                        uint32_t codes,
                                        const uint32_t (&numbers)[4]) {
  const int32_t lane = threadIdx.x % kWarpSize, in_16 = layer.key_dims.in_16;
  const int32_t in_4_end = layer.head_dim - layer.key_dims.in_2;
  uint16_t* key = reinterpret_cast<uint16_t*>(layer.key(page, lane));
  uint16_t* of_codes = key + in_16;
  if (element >= in_4_end) {
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < kChunkElements; ++i) packed |= (codes >> 4 * i & 3) << 2 * i;
    of_codes[(in_4_end - in_16) / 4 + (element - in_4_end) / 8] = static_cast<uint16_t>(packed);
  } else {
#pragma unroll
    for (int i = 0; i < kChunkElements; i += 4) {
      const int32_t d = element + i;
      if (d < in_16) {
        for (int j = 0; j < 4; ++j) {
          key[d + j] = static_cast<uint16_t>(words[(i + j) / 2] >> 16 * (j % 2));
        }
      } else {
        of_codes[(d - in_16) / 4] = static_cast<uint16_t>(codes >> 4 * i);
      }
    }
  }
  if (lane > 1) return;
  uint16_t* scales = reinterpret_cast<uint16_t*>(layer.key_scales.at(page, lane));
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    const int32_t d = element + i - in_16;
    if (d >= 0) scales[d] = static_cast<uint16_t>(numbers[i / 2] >> 16 * (i % 2));
  }
}

/// Codes and scales of eight dimensions of a page's keys; lane i has entry i.
template <typename Element, bool kMixed, typename Load>
__device__ inline void quantise_keys(
    const LayerRows& layer, int32_t page, int32_t element, uint32_t finite, const Load& load) {
  constexpr uint32_t kInfinities = std::is_same_v<Element, __half> ? 0x7c007c00 : 0x7f807f80;
  const int32_t lane = threadIdx.x % kWarpSize;
  const bool is_finite = finite >> lane & 1;
  const uint4 data = load(false, lane, element);
  uint32_t words[4] = {data.x, data.y, data.z, data.w}, most[4], least[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    most[i] = is_finite ? words[i] : kInfinities | 0x80008000;
    least[i] = is_finite ? words[i] : kInfinities;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const uint32_t more = __shfl_xor_sync(kFullWarp, most[i], step);
      const uint32_t less = __shfl_xor_sync(kFullWarp, least[i], step);
      most[i] = bits_of(__hmax2(pair_of<Element>(most[i]), pair_of<Element>(more)));
      least[i] = bits_of(__hmin2(pair_of<Element>(least[i]), pair_of<Element>(less)));
    }
    if (finite == 0) most[i] = least[i] = 0;
  }
  uint32_t scales[4] = {}, codes = 0;
  const bool has_two_bits = kMixed && element >= layer.head_dim - layer.key_dims.in_2;
  const float most_code = has_two_bits ? 3.f : Int4::kMostCode;
  const float steps = most_code / 2;  // halves, because all of a range may be too much
  const float step = has_two_bits ? 1 / 1.5f : 1 / (Int4::kMostCode / 2);
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    const int shift = 16 * (i % 2);
    const float low = bits_to_float<Element>(least[i / 2] >> shift);
    const float high = bits_to_float<Element>(most[i / 2] >> shift);
    const float range = high / 2 - low / 2, range_unit = unit_of(range);
    const Element scale =
        round_up<Element>(divide(range * range_unit, steps, step) * (1 / range_unit));
    scales[i / 2] |= uint32_t{reinterpret_cast<const uint16_t&>(scale)} << shift;
    const float half = to_float(scale) / 2, unit = unit_of(half), divisor = half * unit;
    const float x = bits_to_float<Element>(words[i / 2] >> shift) / 2 - low / 2;
    const float ratio = divide(x * unit, divisor, __frcp_rn(divisor));
    const float code = divisor > 0 ? fminf(fmaxf(ratio, 0.f), most_code) : 0.f;
    codes |= static_cast<uint32_t>(__float2int_rn(code)) << 4 * i;
  }
  const uint32_t(&numbers)[4] = lane == 0 ? scales : least;
  if constexpr (kMixed) {
    for (uint32_t& word : words) word = is_finite ? word : 0;
    store_mixed_keys(layer, page, element, words, is_finite ? codes : 0, numbers);
    return;
  }
  *reinterpret_cast<uint32_t*>(layer.key(page, lane) + element / 2) = is_finite ? codes : 0;
  if (lane > 1) return;
  *reinterpret_cast<uint4*>(layer.key_scales.at(page, lane) + element * 2) =
      make_uint4(numbers[0], numbers[1], numbers[2], numbers[3]);
}

/// Codes and scales of a page's values, by warps: `warp` of `num_warps`; of those whose key is `finite`.
template <typename Format, typename Element, typename Load>
__device__ inline void quantise_values(const LayerRows& layer,
                                       int32_t page,
                                       uint32_t finite,
                                       const Load& load,
                                       int32_t warp,
                                       int32_t num_warps) {
  const PageLane lane(layer.head_dim);
  const Element none = from_float<Element>(NAN);
#pragma unroll 1
  for (int32_t first = warp * lane.at_once; first < kPageSlots; first += num_warps * lane.at_once) {
    const int32_t slot = first + lane.entry;
    CodedChunk chunks[1];
    quantise<Format, Element>({load(true, slot, lane.element)}, lane.has_elements, chunks);
    if (!(finite >> slot & 1)) {
      chunks[0] = {make_uint2(0, 0), reinterpret_cast<const uint16_t&>(none), 0};
    }
    store_chunk<Format>(layer, page, slot, {lane.element, true, lane.has_elements}, chunks[0]);
  }
}

/// Codes and scales of a page, by warps: `warp` of `num_warps`. load(is_value, slot, element) gives
/// eight elements of an entry.
template <typename Element, bool kIsInt4 = false, typename Load>
__device__ inline void quantise_page(
    const LayerRows& layer, int32_t page, const Load& load, int32_t warp, int32_t num_warps) {
  const uint32_t finite = find_finite<Element>(layer.head_dim, load);
#pragma unroll 1
  for (int32_t element = warp * kChunkElements; element < layer.head_dim;
       element += num_warps * kChunkElements) {
    if (!kIsInt4 && layer.key_dims.are_mixed()) {
      quantise_keys<Element, true>(layer, page, element, finite, load);
    } else {
      quantise_keys<Element, false>(layer, page, element, finite, load);
    }
  }
  if (!kIsInt4 && layer.value_bytes * 4 == layer.head_dim) {
    quantise_values<Int2, Element>(layer, page, finite, load, warp, num_warps);
  } else {
    quantise_values<Int4, Element>(layer, page, finite, load, warp, num_warps);
  }
}

/// Calls the body with the type of 16-bit elements.
template <typename Body>
void dispatch_16_bits(DType dtype, const Body& body) {
  if (dtype == DType::kFloat16) return body(TypeTag<__half>{});
  body(TypeTag<__nv_bfloat16>{});
}

}  // namespace adakv
