// Integers that sort like scores.
//
// The total order of entries is: score descending, then position ascending, then kv head ascending.
// NaN counts as -inf, and -0.0 equals +0.0. Where the order has to be one number, take
// (order_key(score) << 32) | ~(position * num_heads + head): higher is better.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops/host_device.h"

namespace adakv {

constexpr uint32_t kLowestKey = 0x00800000u;   // of -inf and NaN; lower keys are free for marks
constexpr uint32_t kHighestKey = 0xff800000u;  // of +inf; higher keys are free for marks

/// A key that is higher for higher scores and equal for equal ones.
ADAKV_HOST_DEVICE inline uint32_t order_key(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof(bits));
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return kLowestKey;
  return bits >> 31 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
}

/// What the second stage of select ranks by (CriticalKV, arXiv 2502.03805, Algorithm 1); a score
/// of +inf pins its entry, whatever the norm is.
ADAKV_HOST_DEVICE inline uint32_t second_stage_key(float score, float norm, float eps) {
  const uint32_t product = order_key((score + eps) * norm);
  return order_key(score) == kHighestKey ? kHighestKey : product;
}

}  // namespace adakv
