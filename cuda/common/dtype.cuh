// Element types on the device: conversion to and from float, alone and in pairs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace adakv {

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

/// The number that 16 bits are.
template <typename Element>
__device__ inline float bits_to_float(uint16_t bits) {
  return to_float(reinterpret_cast<const Element&>(bits));
}

template <typename Element>
__device__ inline Element from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Two 16-bit elements in one register, `low` in the lower half.
template <typename Element>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

/// The two elements of pack().
template <typename Element>
__device__ inline float2 unpack(uint32_t pair) {
  return make_float2(bits_to_float<Element>(static_cast<uint16_t>(pair)),
                     bits_to_float<Element>(static_cast<uint16_t>(pair >> 16)));
}

}  // namespace adakv
