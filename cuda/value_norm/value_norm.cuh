// What the kernels of value_norm share: those for any device (any.cu, gram.cu) and that for sm_90
// (sm90/value_norm.cu).
#pragma once

#include "adakv/ops.h"

namespace adakv {

struct ValueNormParams {
  const void* values;       // [B, Hkv, T, D]
  const void* w_o;          // [E, Hq * D]
  const int32_t* seq_lens;  // [B] or null
  float* norms;             // [B, Hkv, T]
  int64_t value_stride[3], w_o_stride, norm_stride[2];
  int32_t length, group, kv_heads, head_dim, width;  // width: E
  bool is_aligned;  // rows of values and w_o lie at multiples of 16 bytes
  // l2_gram only:
  float* partials;     // [splits, Hkv, D, D]   sums over some rows of w_o
  void* gram;          // [Hkv, D, D], in the dtype of values, times gram_scale
  float* gram_scales;  // [Hkv]                 powers of two
  int32_t num_splits;
};

/// l1 of whatever the kernel for sm_90 doesn't take (any.cu); `early`: as LaunchShape has it.
void any_value_norm(const ValueNormArgs& args, const ValueNormParams& params, bool early);

/// l2_gram (gram.cu).
void value_norm_gram(const ValueNormArgs& args, const ValueNormParams& params, bool early);

/// The kernel of sm90/value_norm.cu: kL1, D 64 or 128 of 16 bits.
bool sm90_value_norm_fits(const ValueNormArgs& args);
void sm90_value_norm(const ValueNormArgs& args, const ValueNormParams& params);

}  // namespace adakv
