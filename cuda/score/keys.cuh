// Where score's keys lie: in a tensor, or in the pages of what rows hold. There a key is as in a
// tensor, or codes that become elements on their way to shared memory.
#pragma once

#include "common/codes.cuh"
#include "common/tile.cuh"
#include "score/score.cuh"

namespace adakv {

/// A key: elements, or codes with their scales.
template <typename Element>
struct KeyRow {
  const char* data;        // null: no key
  const uint16_t* scales;  // of codes, else null
  bool is_fp8;

  __device__ explicit operator bool() const { return data != nullptr; }
};

/// The page that key t of a row is in.
__device__ inline int32_t page_of(const LayerRows& held, int32_t b, int32_t h, int32_t t) {
  return __ldg(held.block_table.at(b, h) + (t >> held.page_shift));
}

/// Key t of a row, which lies in that page.
template <typename Element>
__device__ inline KeyRow<Element> key_in_page(const ScoreParams& params, int32_t page, int32_t t) {
  const LayerRows& held = params.held;
  const int32_t slot = t & (held.page_size - 1);
  const char* scales = held.key_scales.data ? held.key_scales.at(page, slot) : nullptr;
  return {held.key(page, slot), reinterpret_cast<const uint16_t*>(scales), params.is_fp8};
}

/// Key t of a row, which is there.
template <typename Element>
__device__ inline KeyRow<Element> key_row(const ScoreParams& params,
                                          int32_t b,
                                          int32_t h,
                                          int32_t t) {
  if (params.held.pages) return key_in_page<Element>(params, page_of(params.held, b, h, t), t);
  const int64_t* stride = params.key_stride;
  const int64_t offset = b * stride[0] + h * stride[1] + t * stride[2];
  return {static_cast<const char*>(params.keys) + offset * sizeof(Element), nullptr, false};
}

/// Eight codes and the bits of their scale and zero. Nothing but zeros stands for zeros.
struct KeyCodes {
  uint2 codes;
  uint16_t scale, zero;
};

template <typename Element>
__device__ inline KeyCodes codes_of(const KeyRow<Element>& row, int column) {
  const int group = column / kGroupSize;
  return {__ldg(reinterpret_cast<const uint2*>(row.data + column)),
          __ldg(row.scales + (row.is_fp8 ? group : 2 * group)),
          row.is_fp8 ? uint16_t{0} : __ldg(row.scales + 2 * group + 1)};
}

/// Eight elements of codes.
template <typename Element>
__device__ inline uint4 decoded(const KeyCodes& row, bool is_fp8) {
  const float scale = bits_to_float<Element>(row.scale), zero = bits_to_float<Element>(row.zero);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float pair[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int k = 2 * i + j;
      const auto code = static_cast<uint8_t>((k < 4 ? row.codes.x : row.codes.y) >> 8 * (k % 4));
      pair[j] = fmaf(scale, is_fp8 ? decode<Fp8>(code) : decode<Int8>(code), zero);
    }
    words[i] = pack<Element>(pair[0], pair[1]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

/// 16 bytes of a key to shared memory, or zeros, for copy_rows.
template <typename Element>
__device__ inline void copy_chunk(Element* to,
                                  const KeyRow<Element>& row,
                                  int column,
                                  bool is_valid,
                                  bool is_aligned,
                                  const void* anywhere) {
  if constexpr (sizeof(Element) == 2) {
    if (row.scales) {
      const KeyCodes codes = is_valid ? codes_of(row, column) : KeyCodes{};
      *reinterpret_cast<uint4*>(to) = decoded<Element>(codes, row.is_fp8);
      return;
    }
  }
  copy_chunk(to, reinterpret_cast<const Element*>(row.data), column, is_valid, is_aligned,
             anywhere);
}

}  // namespace adakv
