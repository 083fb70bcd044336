// accumulate_span: what one token's q heads of a group give each slot, behind the softmax.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace adakv::ADAKV_ISA {

/// The group's probabilities of kLanes slots from `slot` on, as one.
inline F32 reduced_probabilities(const AccumulateSpan& span, const float* bases, int slot) {
  F32 result = {};
  for (int g = 0; g < span.group; ++g) {
    F32 z = load(span.logits + g * span.logits_stride + slot) * span.scale;
    if (span.softcap > 0) z = span.softcap * tanh(z / span.softcap);
    const F32 p = exp(z - bases[g]);
    result = span.group_reduce == Reduce::kMax ? max(result, p) : result + p;
  }
  return span.group_reduce == Reduce::kMean ? result / static_cast<float>(span.group) : result;
}

/// What slots have behind the token, which gave them `given`.
inline F32 joined(const AccumulateSpan& span, F32 before, F32 given) {
  if (span.accumulate == Accumulate::kSum) return before * span.decay + given;
  if (span.accumulate == Accumulate::kMax) return max(before, given);
  const float threshold = span.threshold > 0 ? span.threshold : 1 / span.number;
  return choose(given >= threshold, broadcast(span.number), before);
}

inline void accumulate_span(const AccumulateSpan& span) {
  float bases[kMaxSpanQueries];
  for (int g = 0; g < span.group; ++g) {
    bases[g] = span.lse[g] == -kInfinity ? kInfinity : span.lse[g];  // nothing was given
  }
  int slot = 0;
  for (; slot + kLanes <= span.num_slots; slot += kLanes) {
    float* to = span.accumulated + slot;
    store(to, joined(span, load(to), reduced_probabilities(span, bases, slot)));
  }
  const int count = span.num_slots - slot;
  if (count <= 0) return;
  float lanes[kLanes] = {};
  __builtin_memcpy(lanes, span.accumulated + slot, count * sizeof(float));
  store(lanes, joined(span, load(lanes), reduced_probabilities(span, bases, slot)));
  __builtin_memcpy(span.accumulated + slot, lanes, count * sizeof(float));
}

}  // namespace adakv::ADAKV_ISA
