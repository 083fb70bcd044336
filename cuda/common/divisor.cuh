// Division by a number that is known when a kernel is launched, in two instructions.
#pragma once

#include <cstdint>

namespace adakv {

/// Exact for 0 <= x with x * divisor < 2^32.
struct Divisor {
  uint64_t magic;  // ceil(2^32 / divisor)
  int32_t value;

  static Divisor of(int64_t divisor) {
    const uint64_t d = static_cast<uint64_t>(divisor);
    return {((uint64_t{1} << 32) + d - 1) / d, static_cast<int32_t>(divisor)};
  }

  __device__ int32_t quotient(int32_t x) const {
    return static_cast<int32_t>(static_cast<uint32_t>(x) * magic >> 32);
  }

  __device__ int32_t remainder(int32_t x) const { return x - quotient(x) * value; }
};

}  // namespace adakv
