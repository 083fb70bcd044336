// A warp's share of a row of scores: positions side by side, four to a lane, and their keys, in
// shared memory as far as it reaches and else made again from the scores.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "ops/order_key.h"

namespace adakv {

/// Four values of a row from a position on; 0 for those outside of the row.
__device__ inline float4 load_four(const float* row, int32_t position, int32_t length) {
  const float* from = row + position;
  float4 four = {};
  if (position >= 0 && position + 4 <= length && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    return *reinterpret_cast<const float4*>(from);
  }
  if (position >= 0 && position < length) four.x = from[0];
  if (position >= -1 && position + 1 < length) four.y = from[1];
  if (position >= -2 && position + 2 < length) four.z = from[2];
  if (position >= -3 && position + 3 < length) four.w = from[3];
  return four;
}

/// How a row's scores become keys.
struct ScoreKeys {
  const float* scores;  // [length]

  static constexpr int kBatch = 4;  // chunks that are loaded at a time
  using Loaded = float4;
  __device__ Loaded load(int32_t position, int32_t length) const {
    return load_four(scores, position, length);
  }
  __device__ uint4 make(const Loaded& four, int32_t) const {
    return make_uint4(order_key(four.x), order_key(four.y), order_key(four.z), order_key(four.w));
  }
};

template <int kThreads>
class Share {
 public:
  static constexpr int kChunk = 4 * kWarpSize;  // positions that a warp looks at together

  /// Part `part` of `num_parts` of a row. `cache` is the CTA's, [num_cached, kThreads]: the keys of
  /// every thread's first chunks.
  __device__ Share(
      const float* row, int32_t length, int part, int num_parts, uint4* cache, int num_cached)
      : length_(length), cache_(cache + threadIdx.x), num_cached_(num_cached) {
    // Loads of 16 bytes begin before a row that isn't aligned.
    const int32_t ahead = reinterpret_cast<uintptr_t>(row) / sizeof(float) % 4;
    const int32_t chunks = (length + ahead + kChunk - 1) / kChunk;
    const int32_t share = (chunks + num_parts - 1) / num_parts;
    first_ = part * share * kChunk - ahead + 4 * (threadIdx.x % kWarpSize);
    num_chunks_ = length > 0 ? max(min(share, chunks - part * share), 0) : 0;
  }

  /// Makes the keys: visit(key) for each; those of positions outside of the row are 0, below all.
  template <typename Keys, typename Visit>
  __device__ void make(const Keys& keys, const Visit& visit) const {
    constexpr int kBatch = Keys::kBatch;
    for (int i = 0; i < num_chunks_; i += kBatch) {
      typename Keys::Loaded loaded[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (i + j < num_chunks_) loaded[j] = keys.load(position_of(i + j), length_);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (i + j >= num_chunks_) break;
        const uint4 four = keys_inside(keys, loaded[j], position_of(i + j));
        if (i + j < num_cached_) cache_[(i + j) * kThreads] = four;
        visit(four.x), visit(four.y), visit(four.z), visit(four.w);
      }
    }
  }

  /// visit(four keys, position of the first) for every chunk; all lanes together.
  template <typename Keys, typename Visit>
  __device__ void for_each_four(const Keys& keys, const Visit& visit) const {
#pragma unroll 2
    for (int i = 0; i < num_chunks_; ++i) {
      const int32_t position = position_of(i);
      const uint4 four = i < num_cached_
                             ? cache_[i * kThreads]
                             : keys_inside(keys, keys.load(position, length_), position);
      visit(four, position);
    }
  }

 private:
  __device__ int32_t position_of(int chunk) const { return first_ + chunk * kChunk; }

  template <typename Keys>
  __device__ uint4 keys_inside(const Keys& keys,
                               const typename Keys::Loaded& loaded,
                               int32_t position) const {
    uint4 four = keys.make(loaded, position);
    const uint32_t length = length_, at = position;
    if (at >= length) four.x = 0;
    if (at + 1 >= length) four.y = 0;
    if (at + 2 >= length) four.z = 0;
    if (at + 3 >= length) four.w = 0;
    return four;
  }

  int32_t length_, first_, num_chunks_;
  uint4* cache_;
  int num_cached_;
};

/// Chunks of a warp at most, if a row of `length` is dealt to `num_parts` of them, that a CTA of
/// kThreads threads can hold in shared memory besides what it has declared.
inline int choose_num_cached(
    const char* verb, int device, int threads, int declared_bytes, int64_t length, int num_parts) {
  const int limit = device_attribute(verb, device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t chunks = (length + 3) / (4 * kWarpSize) + 1;
  const int64_t most = (limit - declared_bytes) / (threads * static_cast<int>(sizeof(uint4)));
  return static_cast<int>(std::min((chunks + num_parts - 1) / num_parts, most));
}

}  // namespace adakv
