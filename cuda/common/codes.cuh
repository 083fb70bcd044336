// How pages hold entries: as they come, or as codes of 8, 4 or 2 bits. A group is 64 elements of a key
// or value along the head dim, in int2 32 (the last one may be shorter); it has a scale, and a zero but
// in fp8.
//
//   int8:  x = scale * code + zero   zero: the least element; scale: the range / 255, rounded up
//   fp8:   x = scale * code          code: e4m3; scale: the largest magnitude / 448, rounded up
//   int4:  x = scale * code + zero   scale: the range / 15, rounded up; keys have their scales and
//                                    zeros by dimension instead (int4_page.cuh)
//   int2:  as int4                   scale: the range / 3, rounded up
//
// Scales and zeros have the dtype of keys. A group that is not finite has scale NaN and codes 0.
#pragma once

#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>

#include "common/dispatch.cuh"
#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"

namespace adakv {

constexpr int kGroupSize = kScaleGroup;  // elements that share a scale, but for int2
constexpr int kChunkElements = 8;        // that a lane quantises

/// What a page format tells kernels.
template <PageFormat kOf>
struct FormatOf {
  static constexpr PageFormat kFormat = kOf;
  static constexpr int kScales = facts_of(kOf).num_scales;  // of a group: scale and zero
  static constexpr int kBits = kScales > 0 ? facts_of(kOf).code_bits : 16;
  static constexpr int kGroup = facts_of(kOf).group;  // elements that share a scale
  static constexpr bool kHasTails = facts_of(kOf).has_tails;
};

/// Pages of elements as they come.
struct Plain : FormatOf<PageFormat::kPlain> {};

/// Pages of codes 0 .. 255.
struct Int8 : FormatOf<PageFormat::kInt8> {
  static constexpr float kMostCode = 255;
};

/// Pages of float8 e4m3.
struct Fp8 : FormatOf<PageFormat::kFp8> {
  static constexpr float kMostCode = 448;
};

/// Pages of codes 0 .. 15, two in a byte: that of the dimension before in the low half.
struct Int4 : FormatOf<PageFormat::kInt4> {
  static constexpr float kMostCode = 15;
};

/// Pages of codes 0 .. 3, four in a byte: the first in the lowest bits.
struct Int2 : FormatOf<PageFormat::kInt2> {
  static constexpr float kMostCode = 3;
};

/// What has the facts of a page format.
template <PageFormat kOf>
struct FormatTypeOf;
template <>
struct FormatTypeOf<PageFormat::kPlain> : TypeTag<Plain> {};
template <>
struct FormatTypeOf<PageFormat::kInt8> : TypeTag<Int8> {};
template <>
struct FormatTypeOf<PageFormat::kFp8> : TypeTag<Fp8> {};
template <>
struct FormatTypeOf<PageFormat::kInt4> : TypeTag<Int4> {};
template <>
struct FormatTypeOf<PageFormat::kInt2> : TypeTag<Int2> {};
template <PageFormat kOf>
using FormatFor = typename FormatTypeOf<kOf>::type;

/// The head dim as groups fill it.
constexpr __host__ __device__ int padded_head_dim(int head_dim) {
  return (head_dim + kGroupSize - 1) / kGroupSize * kGroupSize;
}

template <typename Element>
__device__ inline Element round_up(float x);
template <>
__device__ inline __half round_up<__half>(float x) {
  return __float2half_ru(x);
}
template <>
__device__ inline __nv_bfloat16 round_up<__nv_bfloat16>(float x) {
  return __float2bfloat16_ru(x);
}

/// Eight elements of a group as codes.
struct CodedChunk {
  uint2 codes;           // in int4 and int2 only x
  uint16_t scale, zero;  // of the group, as bits of its dtype
};

/// a / b as IEEE rounds it, by the reciprocal of b as IEEE rounds it (Markstein); for results that
/// are normal, and b not all ones.
__device__ inline float divide(float a, float b, float reciprocal) {
  const float quotient = a * reciprocal;
  return __fmaf_rn(__fmaf_rn(-quotient, b, a), reciprocal, quotient);
}

/// What to multiply numbers by that are too small for that, or 1.
__device__ inline float unit_of(float x) {
  return x < 0x1p-100f ? 0x1p100f : 1.f;
}

/// Extremes over the lanes of a group, of several groups at once: shuffles of one needn't wait for
/// those of another.
template <int kLanes, int kCount>
__device__ inline void group_max(float (&x)[kCount]) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaxf(x[i], __shfl_xor_sync(kFullWarp, x[i], step));
  }
}

/// Element i of eight.
template <typename Element>
__device__ inline float element(const uint4& chunk, int i) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  return bits_to_float<Element>(words[i / 2] >> 16 * (i % 2));
}

/// Quantises groups: each of the adjacent lanes that a group takes has eight elements of it, or none.
/// By whole warps.
template <typename Format, typename Element, int kCount>
__device__ inline void quantise(const uint4 (&data)[kCount],
                                bool has_elements,
                                CodedChunk (&chunks)[kCount]) {
  constexpr bool kHasZero = Format::kScales == 2;
  constexpr float kMostCode = Format::kMostCode;
  constexpr int kCodesOfWord = 32 / Format::kBits, kGroupLanes = Format::kGroup / kChunkElements;
  float most[kCount], least[kCount];  // the least with the other sign
  uint32_t bad_lanes[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    most[k] = least[k] = -INFINITY;
    float excess = 0;  // NaN unless all are finite
#pragma unroll
    for (int i = 0; i < kChunkElements; ++i) {
      const float x = element<Element>(data[k], i);
      excess += x - x;
      most[k] = fmaxf(most[k], x);
      least[k] = fmaxf(least[k], -x);
    }
    if (!has_elements) most[k] = least[k] = -INFINITY;
    bad_lanes[k] = __ballot_sync(kFullWarp, has_elements && excess != 0);
  }
  group_max<kGroupLanes>(most);
  group_max<kGroupLanes>(least);
  const int first_lane = threadIdx.x % kWarpSize / kGroupLanes * kGroupLanes;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float base = kHasZero ? -least[k] : 0.f;
    const float range = kHasZero ? most[k] - base : fabsf(fmaxf(most[k], least[k]));
    const bool is_bad = bad_lanes[k] >> first_lane & ((1u << kGroupLanes) - 1);
    const bool is_finite = !is_bad && range - range == 0;
    const float range_unit = unit_of(range);
    const Element scale =
        round_up<Element>(divide(range * range_unit, kMostCode, 1 / kMostCode) * (1 / range_unit));
    const float unit = unit_of(to_float(scale));
    const float divisor = to_float(scale) * unit, reciprocal = __frcp_rn(divisor);
    const bool has_codes = is_finite && divisor > 0;
    uint32_t words[2] = {};
#pragma unroll
    for (int i = 0; i < kChunkElements; ++i) {
      const float x = element<Element>(data[k], i);
      const float ratio = has_codes ? divide((x - base) * unit, divisor, reciprocal) : 0.f;
      uint32_t code;
      if constexpr (kHasZero) {
        code = __float2int_rn(fminf(fmaxf(ratio, 0.f), kMostCode));
      } else {
        code = __nv_cvt_float_to_fp8(ratio, __NV_SATFINITE, __NV_E4M3);
      }
      words[i / kCodesOfWord] |= code << Format::kBits * (i % kCodesOfWord);
    }
    const Element zero = from_float<Element>(is_finite ? base : 0.f);
    const Element stored = is_finite ? scale : from_float<Element>(NAN);
    chunks[k].codes = make_uint2(words[0], words[1]);
    chunks[k].scale = reinterpret_cast<const uint16_t&>(stored);
    chunks[k].zero = reinterpret_cast<const uint16_t&>(zero);
  }
}

/// What a code stands for, before its scale.
template <typename Format>
__device__ inline float decode(uint8_t code) {
  if constexpr (std::is_same_v<Format, Int8>) {
    return code;
  } else {
    return __half2float(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3));
  }
}

/// Which eight elements of an entry a lane has. An entry is its key and then its value, each padded as
/// groups fill it, in pieces of 32 lanes.
struct EntryPart {
  int32_t element;  // the first of them, of the key or value
  bool is_value, is_there;

  static constexpr __host__ __device__ int pieces(int padded) {  // of keys and values together
    return (padded + kWarpSize * kChunkElements - 1) / (kWarpSize * kChunkElements);
  }

  static __device__ EntryPart of(int head_dim, int padded, int value_dim, int piece) {
    const int32_t index = (piece * kWarpSize + threadIdx.x % kWarpSize) * kChunkElements;
    EntryPart part;
    part.is_value = index >= padded;
    part.element = index - (part.is_value ? padded : 0);
    part.is_there = part.element < (part.is_value ? value_dim : head_dim);
    return part;
  }
};

/// Eight elements from memory that may begin at any of them.
template <typename Element>
__device__ inline uint4 load_chunk(const char* from) {
  if (reinterpret_cast<uint64_t>(from) % sizeof(uint4) == 0) {
    return __ldg(reinterpret_cast<const uint4*>(from));
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint16_t* pair = reinterpret_cast<const uint16_t*>(from) + 2 * i;
    words[i] = __ldg(pair) | uint32_t{__ldg(pair + 1)} << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

/// Writes what a lane has quantised to a slot of a page.
template <typename Format>
__device__ inline void store_chunk(const LayerRows& layer,
                                   int32_t page,
                                   int32_t slot,
                                   const EntryPart& part,
                                   const CodedChunk& chunk) {
  if (!part.is_there) return;
  char* codes = part.is_value ? layer.value(page, slot) : layer.key(page, slot);
  if constexpr (Format::kBits == 2) {
    *reinterpret_cast<uint16_t*>(codes + part.element / 4) = static_cast<uint16_t>(chunk.codes.x);
  } else if constexpr (Format::kBits == 4) {
    *reinterpret_cast<uint32_t*>(codes + part.element / 2) = chunk.codes.x;
  } else {
    *reinterpret_cast<uint2*>(codes + part.element) = chunk.codes;
  }
  if (part.element % Format::kGroup > 0) return;
  const ScaleRows& rows = part.is_value ? layer.value_scales : layer.key_scales;
  uint16_t* scales = reinterpret_cast<uint16_t*>(rows.at(page, slot)) +
                     part.element / Format::kGroup * Format::kScales;
  scales[0] = chunk.scale;
  if constexpr (Format::kScales == 2) scales[1] = chunk.zero;
}

/// Calls the body with a page format.
template <typename Body>
void dispatch_format(PageFormat format, const Body& body) {
  if (format == PageFormat::kInt2) return body(TypeTag<Int2>{});
  if (format == PageFormat::kInt4) return body(TypeTag<Int4>{});
  if (format == PageFormat::kFp8) return body(TypeTag<Fp8>{});
  if (format == PageFormat::kInt8) return body(TypeTag<Int8>{});
  body(TypeTag<Plain>{});
}

/// Calls the body with the types of elements and codes.
template <typename Body>
void dispatch_codes(DType elements, PageFormat format, const Body& body) {
  dispatch_dtype(elements, [&](auto element) {
    dispatch_format(format, [&](auto codes) {
      using Element = typename decltype(element)::type;
      using Format = typename decltype(codes)::type;
      if constexpr (!std::is_same_v<Element, float> && Format::kScales > 0) body(element, codes);
    });
  });
}

}  // namespace adakv
