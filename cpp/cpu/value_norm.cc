// value_norm: for each q head of a group the norm of v Wo, averaged over the group. An item is some
// values of one row; the products are added up as they are computed and never stored.
#include <algorithm>
#include <cmath>

#include "cpu/cpu_backend.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace adakv {
namespace {

constexpr int64_t kChunk = 128;  // values of an item

class ValueNorms {
 public:
  explicit ValueNorms(const ValueNormArgs& args)
      : args_(args),
        num_kv_heads_(args.values.shape[1]),
        length_(args.values.shape[2]),
        head_dim_(args.values.shape[3]),
        width_(args.w_o.shape[0]),
        group_(num_kv_heads_ > 0 ? args.w_o.shape[1] / head_dim_ / num_kv_heads_ : 0),
        num_chunks_((length_ + kChunk - 1) / kChunk),
        dtype_(static_cast<int>(args.values.dtype)) {}

  void run() const {
    if (args_.norm == Norm::kL2Gram) {
      parallel_for(num_kv_heads_, [&](int64_t h) { make_gram(h); });
    }
    parallel_for(args_.values.shape[0] * num_kv_heads_ * num_chunks_,
                 [&](int64_t item) { run_chunk(item / num_chunks_, item % num_chunks_ * kChunk); });
  }

 private:
  const void* w_o(int64_t q) const {
    return args_.w_o.ptr<const char>() +
           q * head_dim_ * static_cast<int64_t>(dtype_size(args_.w_o.dtype));
  }

  float* gram(int64_t h) const { return args_.workspace.ptr<float>() + h * kGramFloats; }

  void make_gram(int64_t h) const {
    GramSpan span;
    span.w_o = w_o(h * group_);
    span.w_o_stride = args_.w_o.stride[0];
    span.width = static_cast<int>(width_);
    span.group = static_cast<int>(group_);
    span.head_dim = static_cast<int>(head_dim_);
    span.gram = gram(h);
    kernels().gram_span[dtype_](span);
  }

  void run_chunk(int64_t row, int64_t begin) const {
    const int64_t b = row / num_kv_heads_, h = row % num_kv_heads_;
    const int64_t seq_len = args_.seq_lens
                                ? args_.seq_lens.ptr<const int32_t>()[b * args_.seq_lens.stride[0]]
                                : length_;
    const int64_t end = std::min(length_, begin + kChunk);
    const int64_t count = std::max<int64_t>(0, std::min(seq_len, end) - begin);
    float* norms =
        args_.norms.ptr<float>() + b * args_.norms.stride[0] + h * args_.norms.stride[1] + begin;
    std::fill(norms + count, norms + (end - begin), -INFINITY);
    if (count == 0) return;
    const TensorView& v = args_.values;
    const int64_t offset = b * v.stride[0] + h * v.stride[1] + begin * v.stride[2];
    const void* values = v.ptr<const char>() + offset * static_cast<int64_t>(dtype_size(v.dtype));
    if (args_.norm == Norm::kL1) {
      l1(values, h, count, norms);
    } else {
      GramNormSpan span;
      span.values = values;
      span.value_stride = v.stride[2];
      span.num_values = static_cast<int>(count);
      span.head_dim = static_cast<int>(head_dim_);
      span.gram = gram(h);
      span.norms = norms;
      kernels().gram_norm_span[dtype_](span);
    }
  }

  void l1(const void* values, int64_t h, int64_t count, float* norms) const {
    float head_norms[kChunk];
    std::fill_n(norms, count, 0.f);
    for (int64_t g = 0; g < group_; ++g) {
      ValueNormSpan span;
      span.values = values;
      span.w_o = w_o(h * group_ + g);
      span.value_stride = args_.values.stride[2];
      span.w_o_stride = args_.w_o.stride[0];
      span.num_values = static_cast<int>(count);
      span.width = static_cast<int>(width_);
      span.head_dim = static_cast<int>(head_dim_);
      span.norms = head_norms;
      kernels().value_norm_span[dtype_](span);
      for (int64_t t = 0; t < count; ++t) norms[t] += head_norms[t];
    }
    for (int64_t t = 0; t < count; ++t) norms[t] /= static_cast<float>(group_);
  }

  const ValueNormArgs& args_;
  const int64_t num_kv_heads_, length_, head_dim_, width_, group_, num_chunks_;
  const int dtype_;
};

}  // namespace

void CpuBackend::value_norm(const ValueNormArgs& args) {
  ValueNorms(args).run();
}

size_t CpuBackend::workspace_bytes(const ValueNormArgs& args) const {
  if (args.norm != Norm::kL2Gram) return 0;
  return static_cast<size_t>(args.values.shape[1]) * kGramFloats * sizeof(float);
}

}  // namespace adakv
