// Logits as the warpgroup instructions leave them: x[4 j + 0..1] of a row g, x[4 j + 2..3] of the
// row g + 8.
#pragma once

#include "score/score.cuh"

namespace adakv {

/// Takes the 32 logits x[first], x[first + 1], x[first + 4], ... of a row into its maximum and sum.
__device__ inline void add_logits(float2& sum, const float (&x)[64], int first, float multiplier) {
  float even = x[first], odd = x[first + 1];
#pragma unroll
  for (int j = 4; j < 64; j += 4) {
    even = fmaxf(even, x[first + j]);
    odd = fmaxf(odd, x[first + j + 1]);
  }
  const float highest = fmaxf(sum.x, fmaxf(even, odd) * multiplier);
  sum.y *= fast_exp2(sum.x - highest);
  sum.x = highest;
  even = odd = 0.f;
#pragma unroll
  for (int j = 0; j < 64; j += 4) {
    even += fast_exp2(fmaf(x[first + j], multiplier, -highest));
    odd += fast_exp2(fmaf(x[first + j + 1], multiplier, -highest));
  }
  sum.y += even + odd;
}

}  // namespace adakv
