// How many entries a head gets, from how many of the layer's best entries lie in it (Ada-KV, arXiv
// 2407.11550, Algorithm 2). Shares are doubles rounded to nine decimals and then exact integers, so
// that every machine rounds them the same way, whether or not it fuses multiplications and
// additions.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops/host_device.h"

namespace adakv {

constexpr int64_t kNano = 1000000000;

/// (1 - floor) * in_top + given, in units of 1e-9.
ADAKV_HOST_DEVICE inline int64_t share_nanos(double floor, int64_t in_top, double given) {
  return llrint(((1 - floor) * static_cast<double>(in_top) + given) * static_cast<double>(kNano));
}

/// What the safeguards "hard_floor" and "official_round" give every head: int(floor * mean).
ADAKV_HOST_DEVICE inline int64_t whole_floor(double floor, int64_t mean) {
  return static_cast<int64_t>(floor * static_cast<double>(mean));
}

/// Nanos to the nearest whole number, halves to the even one.
ADAKV_HOST_DEVICE inline int64_t round_half_even(int64_t nanos) {
  const int64_t whole = nanos / kNano, twice = 2 * (nanos % kNano);
  return whole + (twice > kNano || (twice == kNano && whole % 2 == 1));
}

/// True if head i, whose share is `a` nanos above a whole number, gets a left-over entry before head
/// j with `b`: the larger remainder, then the lower head. (Largest remainder: every head gets its
/// whole entries, and each of the left-over ones goes to the next head in this order.)
ADAKV_HOST_DEVICE inline bool rounds_up_before(int64_t a, int64_t i, int64_t b, int64_t j) {
  return a > b || (a == b && i < j);
}

}  // namespace adakv
