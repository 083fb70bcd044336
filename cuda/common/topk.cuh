// The k best of lists of keys without sorting: the key of the last one that gets in is found digit
// by digit, 11 + 11 + 10 bits, from histograms.
#pragma once

#include <cstdint>

#include "common/reduce.cuh"
#include "ops/order_key.h"

namespace adakv::top_k {

constexpr int kBins = 2048;
constexpr int kKeyLevels = 3;

/// Bits below the digit of a level of the key.
__device__ constexpr int key_shift(int level) {
  return level == 0 ? 21 : level == 1 ? 10 : 0;
}

/// Digit of a key. The last level has 10 bits: half of its bins stay empty.
__device__ inline uint32_t key_digit(uint32_t key, int level) {
  return key >> key_shift(level) & (level == 2 ? 1023 : 2047);
}

/// Whether a key has the digits above `level` that `prefix` has.
__device__ inline bool has_prefix(uint32_t key, uint32_t prefix, int level) {
  return level == 0 || key >> key_shift(level - 1) == prefix >> key_shift(level - 1);
}

/// Sum over the lanes from this one on.
__device__ inline int32_t warp_suffix_sum(int32_t x) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int32_t above = __shfl_down_sync(kFullWarp, x, step);
    if (lane + step < kWarpSize) x += above;
  }
  return x;
}

}  // namespace adakv::top_k
