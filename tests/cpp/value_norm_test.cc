// value_norm against its two formulas in ops.h, in double.
#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include "tensors.h"

namespace adakv {
namespace {

constexpr int kGroup = 3, kKvHeads = 2, kLength = 21, kWidth = 37;

// The norm of v Wo[q], by what is summed up of each component.
template <typename Part>
double head_sum(
    const Tensor& values, const Tensor& w_o, int64_t entry, int64_t q, const Part& part) {
  const int64_t dim = values.view.shape[3], columns = w_o.view.shape[1];
  double sum = 0;
  for (int64_t e = 0; e < kWidth; ++e) {
    double component = 0;
    for (int64_t d = 0; d < dim; ++d) {
      component += double(values.get(entry * dim + d)) * w_o.get(e * columns + q * dim + d);
    }
    sum += part(component);
  }
  return sum;
}

class ValueNormFormats : public testing::TestWithParam<Format> {};
INSTANTIATE_TEST_SUITE_P(All, ValueNormFormats, testing::ValuesIn(formats()));

TEST_P(ValueNormFormats, FollowsTheFormula) {
  std::mt19937 random(0);
  const auto [dtype, dim] = GetParam();
  const Tensor values({2, kKvHeads, kLength, dim}, dtype, random);
  const Tensor w_o({kWidth, kGroup * kKvHeads * dim}, dtype, random);
  const Tensor seq_lens({2}, std::vector<int32_t>{kLength, 4});
  const Tensor norms({2, kKvHeads, kLength}, DType::kFloat32);
  for (const Norm norm : {Norm::kL1, Norm::kL2Gram}) {
    ValueNormArgs args;
    args.values = values.view;
    args.w_o = w_o.view;
    args.seq_lens = seq_lens.view;
    args.norm = norm;
    args.norms = norms.view;
    run(&value_norm, args);

    std::vector<double> expected;
    for (int64_t entry = 0; entry < norms.view.size(); ++entry) {
      const int64_t row = entry / kLength, t = entry % kLength;
      double sum = 0;
      for (int64_t g = 0; g < kGroup; ++g) {
        const int64_t q = row % kKvHeads * kGroup + g;
        sum += norm == Norm::kL1
                   ? head_sum(values, w_o, entry, q, [](double x) { return std::abs(x); })
                   : head_sum(values, w_o, entry, q, [](double x) { return x * x; });
      }
      const double mean = sum / kGroup;
      const bool is_there = t < seq_lens.ints()[row / kKvHeads];
      expected.push_back(!is_there ? -INFINITY : norm == Norm::kL1 ? mean : std::sqrt(mean));
    }
    expect_close(norms, expected);
  }
}

}  // namespace
}  // namespace adakv
