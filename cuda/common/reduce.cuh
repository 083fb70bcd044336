// Reductions and prefix sums over the threads of a warp or a block, in a fixed order.
#pragma once

#include <cstdint>

namespace adakv {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  }
  return x;
}

template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

/// The maximum, or the sum, over the four lanes that share rows of a product.
template <bool kIsMax>
__device__ inline float reduce_quad(float x) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const float other = __shfl_xor_sync(kFullWarp, x, step);
    x = kIsMax ? fmaxf(x, other) : x + other;
  }
  return x;
}

/// Sum over the lanes up to and including this one.
__device__ inline int32_t warp_inclusive_sum(int32_t x) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int32_t below = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

/// Prefix sums over `count` items by one block of kThreads threads: store(i, sum of value(0) to
/// value(i - 1)) for every item. All threads call it and get the sum of all items. `scratch` is
/// shared memory, [kThreads / 32 + 1].
template <int kThreads, typename Value, typename Store>
__device__ inline int32_t block_exclusive_sum(int32_t count,
                                              const Value& value,
                                              const Store& store,
                                              int32_t* scratch) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kWarps <= kWarpSize, "one warp adds up the others");
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int32_t carry = 0;
  for (int32_t begin = 0; begin < count; begin += kThreads) {
    const int32_t i = begin + static_cast<int32_t>(threadIdx.x);
    const int32_t mine = i < count ? value(i) : 0;
    const int32_t inclusive = warp_inclusive_sum(mine);
    if (lane == kWarpSize - 1) scratch[warp] = inclusive;
    __syncthreads();
    if (warp == 0) {
      const int32_t sum = warp_inclusive_sum(lane < kWarps ? scratch[lane] : 0);
      __syncwarp();  // all have read what is overwritten now
      if (lane < kWarps) scratch[lane + 1] = sum;
      __syncwarp();
      if (lane == 0) scratch[0] = 0;
    }
    __syncthreads();
    if (i < count) store(i, carry + scratch[warp] + inclusive - mine);
    carry += scratch[kWarps];
    __syncthreads();
  }
  return carry;
}

}  // namespace adakv
