// How pages hold entries: as they come, or as codes of 8 bits. A group is 64 elements of a key or
// value along the head dim (the last one may be shorter); it has a scale, and a zero in int8.
//
//   int8:  x = scale * code + zero   zero: the least element; scale: the range / 255, rounded up
//   fp8:   x = scale * code          code: e4m3; scale: the largest magnitude / 448, rounded up
//
// Scales and zeros have the dtype of keys. A group that is not finite has scale NaN and codes 0.
#pragma once

#include <cuda_fp8.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/dtype.cuh"
#include "common/dispatch.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"

namespace adakv {

constexpr int kGroupSize = 64;      // elements that share a scale
constexpr int kChunkElements = 8;   // that a lane quantises
constexpr int kGroupLanes = kGroupSize / kChunkElements;

/// Pages of elements as they come.
struct Plain {
  static constexpr int kCodeBytes = 2, kScales = 0;
};

/// Pages of codes 0 .. 255.
struct Int8 {
  static constexpr int kCodeBytes = 1, kScales = 2;  // of a group: scale and zero
};

/// Pages of float8 e4m3.
struct Fp8 {
  static constexpr int kCodeBytes = 1, kScales = 1;
};

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
  uint2 codes;
  uint16_t scale, zero;  // of the group, as bits of its dtype
};

/// a / b as IEEE rounds it, by the reciprocal of b as IEEE rounds it (Markstein); for results that
/// are normal, and b not all ones.
__device__ inline float divide(float a, float b, float reciprocal) {
  const float quotient = a * reciprocal;
  return __fmaf_rn(__fmaf_rn(-quotient, b, a), reciprocal, quotient);
}

/// Extremes over the lanes of a group.
__device__ inline float group_max(float x) {
#pragma unroll
  for (int step = 1; step < kGroupLanes; step *= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  }
  return x;
}

/// Quantises a group: each of kGroupLanes adjacent lanes has eight of its elements, or none. By
/// whole warps.
template <typename Format, typename Element>
__device__ inline CodedChunk quantise(const uint4& data, bool has_elements) {
  const uint32_t words[4] = {data.x, data.y, data.z, data.w};
  float x[kChunkElements];
  float most = -INFINITY, least = INFINITY, excess = 0;
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    const uint16_t bits = words[i / 2] >> 16 * (i % 2);
    x[i] = to_float(reinterpret_cast<const Element&>(bits));
    if (!has_elements) continue;
    most = fmaxf(most, x[i]);
    least = fminf(least, x[i]);
    excess += x[i] - x[i];  // NaN unless all are finite
  }
  most = group_max(most);
  least = -group_max(-least);
  constexpr bool kHasZero = std::is_same_v<Format, Int8>;
  const float base = kHasZero ? least : 0.f;
  const float range = kHasZero ? most - least : fmaxf(most, -least);
  const float is_bad = group_max(excess == 0 ? 0.f : 1.f);
  const bool is_finite = is_bad == 0 && range - range == 0;

  constexpr float kMostCode = kHasZero ? 255 : 448;
  const Element scale = round_up<Element>(divide(range, kMostCode, 1 / kMostCode));
  const float divisor = to_float(scale), reciprocal = __frcp_rn(divisor);
  const bool has_codes = is_finite && divisor >= FLT_MIN;
  uint8_t codes[kChunkElements];
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    const float ratio = has_codes ? divide(x[i] - base, divisor, reciprocal) : 0.f;
    if constexpr (kHasZero) {
      codes[i] = static_cast<uint8_t>(__float2int_rn(fminf(fmaxf(ratio, 0.f), 255.f)));
    } else {
      codes[i] = __nv_cvt_float_to_fp8(ratio, __NV_SATFINITE, __NV_E4M3);
    }
  }
  CodedChunk chunk;
  chunk.codes.x = codes[0] | codes[1] << 8 | codes[2] << 16 | uint32_t{codes[3]} << 24;
  chunk.codes.y = codes[4] | codes[5] << 8 | codes[6] << 16 | uint32_t{codes[7]} << 24;
  const Element zero = from_float<Element>(is_finite ? base : 0.f);
  const Element stored = is_finite ? scale : from_float<Element>(NAN);
  chunk.scale = reinterpret_cast<const uint16_t&>(stored);
  chunk.zero = reinterpret_cast<const uint16_t&>(zero);
  return chunk;
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

/// Which eight elements of an entry a lane has. An entry is its key and then its value, each padded
/// to `padded` elements, in pieces of 32 lanes.
struct EntryPart {
  int32_t element;  // the first of them, of the key or value
  bool is_value, is_there;

  static constexpr __host__ __device__ int pieces(int padded) {
    return (2 * padded + kWarpSize * kChunkElements - 1) / (kWarpSize * kChunkElements);
  }

  static __device__ EntryPart of(int head_dim, int padded, int piece) {
    const int32_t index = (piece * kWarpSize + threadIdx.x % kWarpSize) * kChunkElements;
    EntryPart part;
    part.is_value = index >= padded;
    part.element = index - (part.is_value ? padded : 0);
    part.is_there = part.element < head_dim;
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
  char* codes = layer.key(page, slot) + (part.is_value ? layer.half_page_bytes() : 0);
  *reinterpret_cast<uint2*>(codes + part.element) = chunk.codes;
  if (part.element % kGroupSize > 0) return;
  const ScaleRows& rows = part.is_value ? layer.value_scales : layer.key_scales;
  uint16_t* scales = reinterpret_cast<uint16_t*>(rows.at(page, slot)) +
                     part.element / kGroupSize * Format::kScales;
  scales[0] = chunk.scale;
  if constexpr (Format::kScales == 2) scales[1] = chunk.zero;
}

/// Calls the body with the types of elements and codes.
template <typename Body>
void dispatch_codes(DType elements, DType codes, const Body& body) {
  dispatch_dtype(elements, [&](auto element) {
    if constexpr (!std::is_same_v<typename decltype(element)::type, float>) {
      if (codes == DType::kFloat8) return body(element, TypeTag<Fp8>{});
      return body(element, TypeTag<Int8>{});
    }
  });
}

}  // namespace adakv
