// The total order of entries as numbers of 64 bits, no two of which are equal: order_key of the
// score, then the place (position * heads + head) from high to low. The lowest of its 32 bits are
// free, so that the digits of the place follow those of the key.
#pragma once

#include <cstdint>

#include "ops/order_key.h"

namespace adakv {

class EntryOrder {
 public:
  /// Of `length` positions of each of `heads`; heads * length < 2^31.
  __device__ EntryOrder(int32_t heads, int32_t length) : heads_(heads) {
    free_bits_ = __clz(heads * length);
  }

  __device__ uint64_t operator()(uint32_t key, int32_t position, int32_t head = 0) const {
    const uint32_t place = static_cast<uint32_t>(position) * heads_ + head;
    return static_cast<uint64_t>(key) << 32 | (~place << free_bits_);
  }

  __device__ int32_t place_of(uint64_t order) const {
    return static_cast<int32_t>(~static_cast<uint32_t>(order) >> free_bits_);
  }

 private:
  int32_t heads_;
  int free_bits_;
};

}  // namespace adakv
