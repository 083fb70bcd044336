// Vectors of float32 in the compiler's own vector extensions (GCC and Clang), as wide as the
// instruction set that the including file is compiled for. Only the simd_<isa>.cc files include
// this; each sets ADAKV_ISA, so that no symbol is shared between them: the linker must never pick,
// say, the AVX-512 copy of a function for a machine without it. For the same reason the kernels use
// no functions of the standard library.
//
// Vectors of a row are loaded in pairs of 2 * kLanes elements. In which order a pair's elements lie
// in its two vectors is left to the element type: bfloat16 widens for next to nothing into the even
// and the odd elements, but not in order. Dot products don't care, as long as both sides were
// loaded with load_pair; store_pair restores the order.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "cpu/float16.h"

namespace adakv::ADAKV_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kNumRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kNumRegisters = 16;
#elif defined(__ARM_NEON)
constexpr int kLanes = 4;
constexpr int kNumRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kNumRegisters = 16;
#endif
constexpr int kPair = 2 * kLanes;

using F32 = float __attribute__((vector_size(kLanes * 4)));
using I32 = int32_t __attribute__((vector_size(kLanes * 4)));
using U32 = uint32_t __attribute__((vector_size(kLanes * 4)));
using U16 = uint16_t __attribute__((vector_size(kLanes * 2)));
using U8 = uint8_t __attribute__((vector_size(kLanes)));
using LaneNumbers = std::make_integer_sequence<int, kLanes>;

struct F32Pair {
  F32 first, second;
};

// --- moving ---

template <typename Vector>
inline Vector load_as(const void* data) {
  Vector v;
  __builtin_memcpy(&v, data, sizeof v);
  return v;
}

inline F32 load(const float* data) {
  return load_as<F32>(data);
}
inline void store(float* data, F32 v) {
  __builtin_memcpy(data, &v, sizeof v);
}
inline F32 broadcast(float x) {
  return x - F32{};
}

template <int... kLane>
inline I32 lane_numbers(std::integer_sequence<int, kLane...>) {
  return I32{kLane...};
}

/// 0, 1, 2, ...
inline I32 lane_numbers() {
  return lane_numbers(LaneNumbers{});
}

inline F32Pair load_pair(const float* data) {
  return {load(data), load(data + kLanes)};
}

inline F32Pair load_pair(const BFloat16* data) {
  const U32 bits = load_as<U32>(data);
  return {(F32)(bits << 16), (F32)(bits & 0xffff0000u)};
}

inline F32Pair load_pair(const Float16* data) {
#if defined(__AVX512F__)
  const auto widen = [](const Float16* half) {
    return (F32)_mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(half));
  };
  return {widen(data), widen(data + kLanes)};
#elif defined(__AVX2__)
  return {(F32)_mm256_cvtph_ps(load_as<__m128i>(data)),
          (F32)_mm256_cvtph_ps(load_as<__m128i>(data + kLanes))};
#elif defined(__ARM_NEON)
  const float16x8_t halves = load_as<float16x8_t>(data);
  return {(F32)vcvt_f32_f16(vget_low_f16(halves)), (F32)vcvt_f32_f16(vget_high_f16(halves))};
#else
  // Shifted into place the exponent is 112 too small, which a multiplication mends; infinities and
  // NaN need theirs set.
  const auto widen = [](U16 narrow) {
    const U32 bits = __builtin_convertvector(narrow, U32);
    const U32 magnitude = (bits & 0x7fff) << 13;
    const U32 is_special = (U32)(magnitude >= 0x0f800000);
    const U32 scaled = (U32)((F32)magnitude * 0x1p112f);
    return (F32)(scaled | (is_special & 0x7f800000) | (bits & 0x8000) << 16);
  };
  return {widen(load_as<U16>(data)), widen(load_as<U16>(data + kLanes))};
#endif
}

// The widening of integers is written out: GCC 12 takes vectors narrower than a register apart.

/// kLanes unsigned numbers of 8 or 16 bits.
inline U32 widen_bytes(const void* data) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu8_epi32(load_as<__m128i>(data));
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(data)));
#else
  return __builtin_convertvector(load_as<U8>(data), U32);
#endif
}
inline U32 widen_halves(const void* data) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu16_epi32(load_as<__m256i>(data));
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32(load_as<__m128i>(data));
#else
  return __builtin_convertvector(load_as<U16>(data), U32);
#endif
}

/// Numbers that are positive as int32.
inline F32 to_float(U32 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtepi32_ps((__m512i)x);
#elif defined(__AVX2__)
  return (F32)_mm256_cvtepi32_ps((__m256i)x);
#else
  return __builtin_convertvector((I32)x, F32);
#endif
}

/// Stores the low bytes of all lanes.
inline void store_bytes(uint8_t* out, U32 x) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)x);
  __builtin_memcpy(out, &bytes, kLanes);
#elif defined(__AVX2__)
  const __m256i halves = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // of 0 .. 255
  const __m128i both =
      _mm_unpacklo_epi64(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  const __m128i bytes = _mm_packus_epi16(both, both);
  __builtin_memcpy(out, &bytes, kLanes);
#else
  const U8 bytes = __builtin_convertvector(x, U8);
  __builtin_memcpy(out, &bytes, kLanes);
#endif
}

inline F32Pair load_pair(const Int8Code* data) {
  return {to_float(widen_bytes(data)), to_float(widen_bytes(data + kLanes))};
}

inline F32Pair load_pair(const Int4Codes* data) {
  const U32 both = widen_bytes(data);
#if defined(__AVX512F__)
  const __m512 numbers = (__m512) __builtin_convertvector(lane_numbers(), F32);
  const auto number = [&](U32 code) {  // of which the lowest four bits count
    return (F32)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)code, numbers);
  };
  return {number(both), number(both >> 4)};
#else
  return {to_float(both & 0xf), to_float(both >> 4)};
#endif
}

/// A Float16 whose pairs have the even and the odd elements, as those of BFloat16 and Int4Codes do.
struct EvenOddFloat16 {
  uint16_t bits;
};

template <typename Element>
using EvenOdd = std::conditional_t<std::is_same_v<Element, Float16>, EvenOddFloat16, Element>;

template <int kFirst, int... kLane>
inline F32 every_other(F32Pair pair, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(pair.first, pair.second, (2 * kLane + kFirst)...);
}

inline F32Pair load_pair(const EvenOddFloat16* data) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i halves = _mm256_shuffle_epi8(load_as<__m256i>(data), order);
  const __m256i sorted = _mm256_permute4x64_epi64(halves, 0xd8);
  return {(F32)_mm256_cvtph_ps(_mm256_castsi256_si128(sorted)),
          (F32)_mm256_cvtph_ps(_mm256_extracti128_si256(sorted, 1))};
#else
  const F32Pair in_order = load_pair(reinterpret_cast<const Float16*>(data));
  return {every_other<0>(in_order, LaneNumbers{}), every_other<1>(in_order, LaneNumbers{})};
#endif
}

/// The numbers divided by 2^8: as the bits of a float16, their exponents are 8 too small.
inline F32Pair load_pair(const Float8* data) {
#if defined(__AVX512F__)
  const auto widen = [](const Float8* codes) {
    const __m256i x = _mm256_cvtepu8_epi16(load_as<__m128i>(codes));
    const __m256i sign = _mm256_and_si256(x, _mm256_set1_epi16(0x80));
    const __m256i bits = _mm256_slli_epi16(_mm256_add_epi16(x, sign), 7);
    return (F32)_mm512_maskz_cvtph_ps(0xffff, bits);
  };
  return {widen(data), widen(data + kLanes)};
#elif defined(__AVX2__)
  const __m256i x = _mm256_cvtepu8_epi16(load_as<__m128i>(data));
  const __m256i sign = _mm256_and_si256(x, _mm256_set1_epi16(0x80));
  const __m256i bits = _mm256_slli_epi16(_mm256_add_epi16(x, sign), 7);
  return {(F32)_mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
          (F32)_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
#else
  Float16 halves[kPair];
  for (int i = 0; i < kPair; ++i) {
    halves[i].bits = static_cast<uint16_t>((data[i].bits & 0x80) << 8 | (data[i].bits & 0x7f) << 7);
  }
  return load_pair(halves);
#endif
}

/// The first `count` elements of a pair, zeros behind them. Reads nothing beyond.
template <typename Element>
inline F32Pair load_pair(const Element* data, int count) {
  Element buffer[kPair] = {};
  __builtin_memcpy(buffer, data, count * sizeof(Element));
  return load_pair(buffer);
}

inline F32Pair load_pair(const Int4Codes* data, int count) {
  Int4Codes buffer[kLanes] = {};
  __builtin_memcpy(buffer, data, count / 2);
  return load_pair(buffer);
}

#if defined(__AVX512F__)
template <>
inline F32Pair load_pair(const BFloat16* data, int count) {
  const U32 bits = (U32)_mm512_maskz_loadu_epi16((1u << count) - 1, data);
  return {(F32)(bits << 16), (F32)(bits & 0xffff0000u)};
}
#endif

/// The same with the elements in order in both vectors.
inline F32Pair load_in_order(const Float16* data) {
  return load_pair(data);
}
inline F32Pair load_in_order(const BFloat16* data) {
  return {(F32)(widen_halves(data) << 16), (F32)(widen_halves(data + kLanes) << 16)};
}

inline void store_in_order(float* out, F32Pair pair, const BFloat16*) {
  for (int i = 0; i < kLanes; ++i) {
    out[2 * i] = pair.first[i];
    out[2 * i + 1] = pair.second[i];
  }
}

inline void store_in_order(float* out, F32Pair pair, const EvenOddFloat16*) {
  store_in_order(out, pair, static_cast<const BFloat16*>(nullptr));
}

inline void store_in_order(float* out, F32Pair pair, const void*) {
  store(out, pair.first);
  store(out + kLanes, pair.second);
}

/// Stores what load_pair(const Element*) loaded, in the elements' order.
template <typename Element>
inline void store_pair(float* out, F32Pair pair) {
  store_in_order(out, pair, static_cast<const Element*>(nullptr));
}

// --- computing ---

/// Lanes of `yes` where the mask is all ones, else of `no`.
inline F32 choose(I32 mask, F32 yes, F32 no) {
  return (F32)((mask & (I32)yes) | (~mask & (I32)no));
}

inline F32 max(F32 a, F32 b) {
  return a > b ? a : b;
}
inline F32 abs(F32 x) {
  return (F32)((U32)x & 0x7fffffffu);
}

constexpr float kInfinity = __builtin_inff();

template <int kStep, int... kLane>
inline F32 fold(F32 a, F32 b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane & kStep ? kLane - kStep + kLanes : kLane)...) +
         __builtin_shufflevector(a, b, (kLane & kStep ? kLane + kLanes : kLane + kStep)...);
}

/// Lane i of the result is the sum of the lanes of v[i]; overwrites v.
template <int kStep = kLanes / 2>
inline F32 sum_each(F32 (&v)[kLanes]) {
  for (int i = 0; i < kStep; ++i) v[i] = fold<kStep>(v[i], v[i + kStep], LaneNumbers{});
  if constexpr (kStep > 1) return sum_each<kStep / 2>(v);
  return v[0];
}

template <int kStep, int... kLane>
inline F32 rotate(F32 v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane + kStep) % kLanes...);
}

template <int kStep = kLanes / 2>
inline float sum(F32 v) {
  v += rotate<kStep>(v, LaneNumbers{});
  if constexpr (kStep > 1) return sum<kStep / 2>(v);
  return v[0];
}

template <int kStep = kLanes / 2>
inline float max_lane(F32 v) {
  v = max(v, rotate<kStep>(v, LaneNumbers{}));
  if constexpr (kStep > 1) return max_lane<kStep / 2>(v);
  return v[0];
}

/// e^x within 2 units in the last place; 0 below -87, where float32 runs out of normal numbers. For
/// x <= 88.
inline F32 exp(F32 x) {
  const F32 log2_e = broadcast(1.44269504f);
  const F32 shift =
      broadcast(0x1.8p23f);  // adding it rounds to an integer, which then stands in the low bits
  const F32 shifted = x * log2_e + shift;
  const F32 n = shifted - shift;
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n * ln(2), in two parts
  F32 p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const F32 scaled = (F32)((U32)p + ((U32)shifted << 23));  // wraps where it is not chosen
  return choose(x != x, x, choose(x < -87.0f, F32{}, scaled));
}

/// tanh(x); by a polynomial near 0, where the formula with exp would cancel.
inline F32 tanh(F32 x) {
  const F32 size = abs(x);
  const F32 square = x * x;
  F32 p = broadcast(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const F32 near = p * square * x + x;
  const F32 clamped = choose(size > 10.0f, broadcast(10.0f), size);
  const F32 far = 1.0f - 2.0f / (exp(2.0f * clamped) + 1.0f);
  const F32 signed_far = (F32)((U32)far | ((U32)x & 0x80000000u));
  return choose(size < 0.625f, near, signed_far);
}

}  // namespace adakv::ADAKV_ISA
