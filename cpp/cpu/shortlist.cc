// Pages of each row that a step reads; see ops.h. A row at a time, by three loops over its pages:
//   1. z of every query and page, and what a query needs for the softmax over them
//   2. the most weight that any query gives to each page
//   3. the best of these, ascending, and then the newest pages
#include "ops/listing.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/cpu_backend.h"
#include "cpu/float16.h"
#include "cpu/page_check.h"
#include "cpu/parallel.h"
#include "ops/scale.h"

namespace adakv {
namespace {

constexpr int kLanes = 16;  // sums side by side, which compilers make vectors of
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One row, whose queries [R] are those of its group and of all tokens that are no padding.
template <typename Element>
class RowPages {
 public:
  RowPages(const ShortlistArgs& args, int64_t b, int64_t h)
      : args_(args),
        rule_(args),
        width_(2 * args.queries.shape[3]),
        table_(args.block_table.ptr<int32_t>() + b * args.block_table.stride[0] +
               h * args.block_table.stride[1]),
        length_(
            args.lengths.ptr<int32_t>()[b * args.lengths.stride[0] + h * args.lengths.stride[1]]),
        row_(rule_.of(length_)) {
    gather_queries(b, h);
  }

  /// Writes its pages [X], and gives the entries that these hold.
  int32_t list(int32_t* listed) {
    std::vector<float> worth(static_cast<size_t>(row_.older), -1.f);
    if (row_.wanted >= row_.older && args_.mass == 1) {
      std::fill(worth.begin(), worth.end(), 0.f);
    } else if (row_.wanted > 0) {
      bound_products();
      for (int64_t r = 0; r < num_queries_; ++r) weigh(z_.data() + r * row_.older, worth);
    }
    std::vector<int32_t> best;
    for (int32_t p = 0; p < row_.older; ++p) {
      if (worth[p] >= 0) best.push_back(p);
    }
    if (best.size() > static_cast<size_t>(row_.wanted)) {
      const auto is_better = [&](int32_t a, int32_t c) {
        return worth[a] != worth[c] ? worth[a] > worth[c] : a < c;
      };
      std::nth_element(best.begin(), best.begin() + row_.wanted, best.end(), is_better);
      best.resize(row_.wanted);
      std::sort(best.begin(), best.end());
    }
    int32_t* end = listed;
    for (const int32_t p : best) *end++ = table_[p];
    for (int32_t p = row_.older; p < row_.total; ++p) *end++ = table_[p];
    std::fill(end, listed + rule_.most, -1);
    return length_ - (row_.older - static_cast<int32_t>(best.size())) * rule_.page_size;
  }

 private:
  // The positive part of each query, and then the negative one: times the largest and the smallest
  // numbers of a page that is the sum of the larger products.
  void gather_queries(int64_t b, int64_t h) {
    const TensorView& q = args_.queries;
    const int64_t group = q.shape[1] / args_.lengths.shape[1], tokens = q.shape[2];
    const int64_t dim = q.shape[3];
    const int64_t count = args_.num_new ? args_.num_new.ptr<int32_t>()[b] : tokens;
    num_queries_ = group * count;
    queries_.resize(static_cast<size_t>(num_queries_ * width_));
    float* to = queries_.data();
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t s = tokens - count; s < tokens; ++s, to += width_) {
        const Element* from =
            q.ptr<Element>() + b * q.stride[0] + (h * group + g) * q.stride[1] + s * q.stride[2];
        for (int64_t d = 0; d < dim; ++d) {
          const float x = to_float(from[d]);
          to[d] = x > 0 ? x : 0;
          to[dim + d] = x < 0 ? x : 0;
        }
      }
    }
  }

  // z [R, older].
  void bound_products() {
    z_.resize(static_cast<size_t>(num_queries_ * row_.older));
    const float scale = scale_of(args_);
    std::vector<float> bounds(static_cast<size_t>(width_));
    for (int32_t p = 0; p < row_.older; ++p) {
      const Element* page = args_.bounds.ptr<Element>() + table_[p] * args_.bounds.stride[0];
      for (int64_t d = 0; d < width_; ++d) bounds[d] = to_float(page[d]);
      for (int64_t r = 0; r < num_queries_; ++r) {
        float z = product(queries_.data() + r * width_, bounds.data()) * scale;
        if (args_.softcap > 0) z = args_.softcap * std::tanh(z / args_.softcap);
        z_[r * row_.older + p] =
            z >= -kInfinity ? std::min(z, std::numeric_limits<float>::max()) : -kInfinity;  // NaN
      }
    }
  }

  float product(const float* a, const float* b) const {
    float lanes[kLanes] = {};
    for (int64_t d = 0; d < width_; d += kLanes) {
      for (int i = 0; i < kLanes; ++i) lanes[i] += a[d + i] * b[d + i];
    }
    float sum = 0;
    for (const float lane : lanes) sum += lane;
    return sum;
  }

  // What a query with z [older] gives to each page, if it is more than the others gave.
  void weigh(float* z, std::vector<float>& worth) const {
    const int32_t n = row_.older;
    const float max = *std::max_element(z, z + n);
    if (max == -kInfinity) {
      std::fill(z, z + n, 0.f);
    } else {
      float sum = 0;
      for (int32_t p = 0; p < n; ++p) sum += z[p] = std::exp(z[p] - max);
      for (int32_t p = 0; p < n; ++p) z[p] /= sum;
    }
    const float least = threshold(z);
    for (int32_t p = 0; p < n; ++p) {
      if (z[p] >= least) worth[p] = std::max(worth[p], z[p]);
    }
  }

  float threshold(const float* weights) const {
    if (args_.mass == 1) return 0;
    const int32_t n = row_.older;
    const auto sum_from = [&](float least) {
      float sum = 0;
      for (int32_t p = 0; p < n; ++p) sum += weights[p] >= least ? weights[p] : 0;
      return sum;
    };
    const float wanted = static_cast<float>(args_.mass) * sum_from(0);
    float low = 0, high = *std::max_element(weights, weights + n);
    for (int i = 0; i < listing::kBisections; ++i) {
      const float middle = (low + high) / 2;
      (sum_from(middle) >= wanted ? low : high) = middle;
    }
    return low;
  }

  const ShortlistArgs& args_;
  const listing::Rule rule_;
  const int64_t width_;  // 2 D
  const int32_t* table_;
  const int32_t length_;
  const listing::Row row_;
  int64_t num_queries_ = 0;
  std::vector<float> queries_, z_;
};

template <typename Element>
void shortlist_rows(const ShortlistArgs& args) {
  const int64_t heads = args.lengths.shape[1];
  parallel_for(args.lengths.shape[0] * heads, [&](int64_t r) {
    const int64_t b = r / heads, h = r % heads;
    const auto place = [&](const TensorView& x) { return b * x.stride[0] + h * x.stride[1]; };
    int32_t* listed = args.listed.ptr<int32_t>() + place(args.listed);
    const int32_t length = RowPages<Element>(args, b, h).list(listed);
    args.listed_lengths.ptr<int32_t>()[place(args.listed_lengths)] = length;
  });
}

}  // namespace

void CpuBackend::shortlist(const ShortlistArgs& args) {
  check_pages("shortlist", args.block_table, args.lengths, args.bounds.shape[0], args.page_size);
  switch (args.queries.dtype) {
    case DType::kFloat16:
      return shortlist_rows<Float16>(args);
    case DType::kBFloat16:
      return shortlist_rows<BFloat16>(args);
    default:
      return shortlist_rows<float>(args);
  }
}

size_t CpuBackend::workspace_bytes(const ShortlistArgs&) const {
  return 0;
}

}  // namespace adakv
