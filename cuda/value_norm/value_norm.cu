// How far an entry can move the layer's output; see ops.h. This file launches: l1 by the kernel of
// sm90/value_norm.cu or by that of any.cu, l2_gram by gram.cu.
#include <algorithm>

#include "common/device_guard.h"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "cuda_backend.h"
#include "value_norm/value_norm.cuh"

namespace adakv {
namespace {

constexpr int kGramSplits = 16;

// Scratch memory of l2_gram: partials, the Gram matrices (16-byte aligned) and their scales.
struct GramBytes {
  int64_t partials, gram, scales;
};

GramBytes gram_bytes(const ValueNormArgs& args) {
  const int64_t heads = args.values.shape[1], dim = args.values.shape[3];
  const int64_t size = heads * dim * dim;  // a multiple of 64
  return {kGramSplits * size * 4, size * static_cast<int64_t>(dtype_size(args.values.dtype)),
          heads * 4};
}

ValueNormParams make_params(const ValueNormArgs& args) {
  const TensorView& values = args.values;
  ValueNormParams params = {};
  params.values = values.data;
  params.w_o = args.w_o.data;
  params.seq_lens = args.seq_lens.ptr<int32_t>();
  params.norms = args.norms.ptr<float>();
  std::copy_n(values.stride, 3, params.value_stride);
  params.w_o_stride = args.w_o.stride[0];
  std::copy_n(args.norms.stride, 2, params.norm_stride);
  params.kv_heads = static_cast<int32_t>(values.shape[1]);
  params.length = static_cast<int32_t>(values.shape[2]);
  params.head_dim = static_cast<int32_t>(values.shape[3]);
  params.group = static_cast<int32_t>(args.w_o.shape[1]) / (params.kv_heads * params.head_dim);
  params.width = static_cast<int32_t>(args.w_o.shape[0]);
  params.is_aligned = rows_are_aligned(values, 16) && rows_are_aligned(args.w_o, 16);
  if (args.norm == Norm::kL2Gram) {
    const GramBytes bytes = gram_bytes(args);
    params.partials = args.workspace.ptr<float>();
    params.gram = args.workspace.ptr<char>() + bytes.partials;
    params.gram_scales =
        reinterpret_cast<float*>(args.workspace.ptr<char>() + bytes.partials + bytes.gram);
    params.num_splits = kGramSplits;
  }
  return params;
}

}  // namespace

void CudaBackend::value_norm(const ValueNormArgs& args) {
  const DeviceGuard guard(args.values.device);
  if (args.norms.size() == 0) return;
  const ValueNormParams params = make_params(args);
  if (sm90_value_norm_fits(args)) return sm90_value_norm(args, params);
  const bool early = has_sm90("value_norm", args.values.device.index);
  if (args.norm == Norm::kL2Gram) return value_norm_gram(args, params, early);
  any_value_norm(args, params, early);
}

size_t CudaBackend::workspace_bytes(const ValueNormArgs& args) const {
  if (args.norm != Norm::kL2Gram) return 0;
  const GramBytes bytes = gram_bytes(args);
  return bytes.partials + bytes.gram + bytes.scales;
}

}  // namespace adakv
