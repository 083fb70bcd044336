// attend against plain attention in double, over rows that compact and append have filled.
#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include "layer.h"
#include "tensors.h"

namespace adakv {
namespace {

struct Options {
  float scale = 0, softcap = 0;
  bool has_sinks = false;
  Accumulate accumulate = Accumulate::kSum;
  Reduce group_reduce = Reduce::kMean;
  float decay = 1, threshold = 0;
};

// A cache with one layer and two sequences of two kv heads, whose rows keep the given numbers of
// entries of a prompt.
class Attending {
 public:
  Attending(Format format, int group, const std::vector<int32_t>& kept)
      : format_(format), group_(group), cache_(config(format), device_memory({})) {
    int32_t total = 0;
    std::vector<int32_t> indptr = {0}, positions;
    for (const int32_t n : kept) {
      for (int32_t i = 0; i < n; ++i) positions.push_back(i * 2);
      indptr.push_back(total += n);
    }
    const Tensor keys({2, 2, kPrompt, format.head_dim}, format.dtype, random_),
        values({2, 2, kPrompt, format.head_dim}, format.dtype, random_);
    const PageList pages =
        cache_.begin(0, 0, {kept[0] + kept[1], kept[2] + kept[3]}, {kPrompt / 2, kPrompt / 2});
    const Tensor kept_positions({total}, positions), kept_indptr({5}, indptr),
        ids({static_cast<int64_t>(pages.ids.size())}, pages.ids), id_indptr({3}, pages.indptr);
    CompactArgs args;
    args.keys = keys.view;
    args.values = values.view;
    args.positions = kept_positions.view;
    args.indptr = kept_indptr.view;
    args.page_ids = ids.view;
    args.page_indptr = id_indptr.view;
    args.layer = cache_.layer(0);
    run(&compact, args);
  }

  // Appends columns and attends to them; all of it is checked.
  void step(int columns, const std::vector<int32_t>& num_new, Options options = {}) {
    const int64_t dim = format_.head_dim, heads = 2 * group_;
    ASSERT_EQ(cache_.grow(num_new, columns), columns);
    const Tensor counts({2}, num_new), keys({2, 2, columns, dim}, format_.dtype, random_),
        values({2, 2, columns, dim}, format_.dtype, random_),
        queries({2, heads, columns, dim}, format_.dtype, random_),
        sinks({heads}, DType::kFloat32, random_), out({2, heads, columns, dim}, format_.dtype),
        lse({2, heads, columns}, DType::kFloat32);
    const int workers = default_num_workers({});
    const Tensor schedule({1, schedule_size(4, workers)}, DType::kInt32);
    PlanArgs plan_args;
    plan_args.lengths = cache_.all_layers().lengths;
    plan_args.block_table = cache_.all_layers().block_table;
    plan_args.fresh_pages = cache_.all_layers().fresh_pages;
    plan_args.num_new = counts.view;
    plan_args.new_tokens = columns;
    plan_args.page_size = cache_.config().page_size;
    plan_args.num_workers = workers;
    plan_args.schedule = schedule.view;
    plan(plan_args);

    AttendArgs args;
    args.queries = queries.view;
    args.layer = cache_.layer(0);
    args.schedule = schedule.view.select(0);
    args.keys = keys.view;
    args.values = values.view;
    args.num_new = counts.view;
    if (options.has_sinks) args.sink_logits = sinks.view;
    args.scale = options.scale;
    args.softcap = options.softcap;
    args.num_workers = workers;
    args.out = out.view;
    args.lse = lse.view;
    args.accumulate = options.accumulate;
    args.group_reduce = options.group_reduce;
    args.decay = options.decay;
    args.threshold = options.threshold;
    args.accumulated = accumulated_.view;
    std::vector<double> before;
    for (int64_t i = 0; i < 4 * kMostSlots; ++i) before.push_back(accumulated_.get(i));
    run(&attend, args);
    check(args, queries, out, lse);
    check_accumulated(args, queries, before);
    if (columns == 1 && !options.has_sinks) check_twice(args, out, lse);
  }

 private:
  static constexpr int kPrompt = 700, kMostSlots = 60 * 16;

  static CacheConfig config(Format format) {
    CacheConfig config;
    config.num_layers = 1;
    config.num_sequences = 2;
    config.num_kv_heads = 2;
    config.head_dim = format.head_dim;
    config.num_pages = 200;
    config.max_row_pages = 60;
    config.page_size = 16;
    config.dtype = format.dtype;
    return config;
  }

  void check(const AttendArgs& args, const Tensor& queries, const Tensor& out, const Tensor& lse) {
    std::vector<double> outs, lses;
    const int64_t columns = args.queries.shape[2], dim = format_.head_dim, heads = 2 * group_;
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t q = 0; q < heads; ++q) {
        const std::vector<Entry> held = entries_of(args.layer, b, q / group_);
        for (int64_t s = 0; s < columns; ++s) {
          std::vector<double> result(dim);
          const bool is_padding = s < columns - args.num_new.ptr<int32_t>()[b];
          const int64_t visible =
              is_padding ? 0 : static_cast<int64_t>(held.size()) - columns + s + 1;
          double sum =
              visible > 0 && args.sink_logits ? std::exp(args.sink_logits.ptr<float>()[q]) : 0;
          for (int64_t i = 0; i < visible; ++i) {
            double z = 0;
            for (int64_t d = 0; d < dim; ++d) {
              z += double(queries.get(((b * heads + q) * columns + s) * dim + d)) * held[i].key[d];
            }
            z *= args.scale != 0 ? args.scale : 1 / std::sqrt(double(dim));
            if (args.softcap > 0) z = args.softcap * std::tanh(z / args.softcap);
            sum += std::exp(z);
            for (int64_t d = 0; d < dim; ++d) result[d] += std::exp(z) * held[i].value[d];
          }
          for (double& x : result) x = sum > 0 ? x / sum : 0;
          outs.insert(outs.end(), result.begin(), result.end());
          lses.push_back(visible > 0 ? std::log(sum) : -INFINITY);
        }
      }
    }
    expect_close(out, outs);
    expect_close(lse, lses);
  }

  // With the same entries as another tier, each counts twice: the same out, and lse is larger by log 2.
  void check_twice(AttendArgs args, const Tensor& out, const Tensor& lse) const {
    const Tensor out_of_both({2, 2 * group_, 1, format_.head_dim}, format_.dtype),
        lse_of_both({2, 2 * group_, 1}, DType::kFloat32);
    args.keys = args.values = args.accumulated = TensorView();
    args.others = {{args.layer, args.schedule, TensorView(), 0}};
    args.out = out_of_both.view;
    args.lse = lse_of_both.view;
    run(&attend, args);
    std::vector<double> outs, lses;
    for (int64_t i = 0; i < 4 * group_ * format_.head_dim; ++i) outs.push_back(out.get(i));
    for (int64_t i = 0; i < 4 * group_; ++i) lses.push_back(lse.get(i) + std::log(2.0));
    expect_close(out_of_both, outs);
    expect_close(lse_of_both, lses);
  }

  // From what was there before, by the lse that was checked.
  void check_accumulated(const AttendArgs& args,
                         const Tensor& queries,
                         std::vector<double> expected) const {
    const int64_t columns = args.queries.shape[2], dim = format_.head_dim, heads = 2 * group_;
    for (int64_t row = 0; row < 4; ++row) {
      const int64_t b = row / 2, count = args.num_new.ptr<int32_t>()[b];
      const std::vector<Entry> held = entries_of(args.layer, b, row % 2);
      const int64_t length = static_cast<int64_t>(held.size());
      double* slots = expected.data() + row * kMostSlots;
      std::fill(slots + length - count, slots + length, 0);
      for (int64_t s = columns - count; s < columns; ++s) {
        const double number = args.layer.seen.ptr<int32_t>()[b] - (columns - 1 - s);
        for (int64_t i = 0; i < length - columns + s + 1; ++i) {
          double sum = 0, most = 0;
          for (int64_t g = 0; g < group_; ++g) {
            const int64_t query = (b * heads + row % 2 * group_ + g) * columns + s;
            double z = 0;
            for (int64_t d = 0; d < dim; ++d) {
              z += double(queries.get(query * dim + d)) * held[i].key[d];
            }
            z *= args.scale != 0 ? args.scale : 1 / std::sqrt(double(dim));
            if (args.softcap > 0) z = args.softcap * std::tanh(z / args.softcap);
            const double p = std::exp(z - double(args.lse.ptr<float>()[query]));
            sum += p;
            most = std::max(most, p);
          }
          const double given = args.group_reduce == Reduce::kMax   ? most
                               : args.group_reduce == Reduce::kSum ? sum
                                                                   : sum / double(group_);
          if (args.accumulate == Accumulate::kSum) slots[i] = slots[i] * args.decay + given;
          if (args.accumulate == Accumulate::kMax) slots[i] = std::max(slots[i], given);
          const double threshold = args.threshold > 0 ? args.threshold : 1 / number;
          if (args.accumulate == Accumulate::kLast && given >= threshold) slots[i] = number;
        }
      }
    }
    expect_close(accumulated_, expected);
  }

  Format format_;
  int64_t group_;
  std::mt19937 random_{0};
  KVCache cache_;
  const Tensor accumulated_{{2, 2, kMostSlots}, DType::kFloat32};
};

class AttendFormats : public testing::TestWithParam<Format> {};
INSTANTIATE_TEST_SUITE_P(All, AttendFormats, testing::ValuesIn(formats()));

TEST_P(AttendFormats, FollowsTheFormula) {
  Attending attending(GetParam(), 3, {300, 5, 0, 37});
  attending.step(1, {1, 1});     // decoding
  attending.step(4, {4, 2});     // a few tokens, padded
  attending.step(11, {11, 11});  // more queries than one span takes
}

TEST(Attend, TakesEveryOption) {
  Attending attending({DType::kFloat32, 16}, 4, {20, 100, 3, 0});
  attending.step(1, {1, 1}, {0.7f, 2.f, true});
  attending.step(1, {0, 1}, {0.f, 0.f, true});
  attending.step(2, {2, 1}, {0.f, 5.f, false});
}

TEST(Attend, AccumulatesInEveryWay) {
  Attending attending({DType::kFloat32, 16}, 4, {20, 100, 3, 0});
  attending.step(1, {1, 1}, {0.f, 0.f, true, Accumulate::kSum, Reduce::kSum, 0.5f});
  attending.step(3, {2, 3}, {0.f, 0.f, false, Accumulate::kSum, Reduce::kMean, 0.5f});
  attending.step(1, {1, 0}, {0.f, 2.f, false, Accumulate::kMax, Reduce::kMax});
  attending.step(11, {11, 4}, {0.f, 0.f, false, Accumulate::kLast, Reduce::kMean, 1, 0.2f});
  attending.step(1, {1, 1}, {0.f, 0.f, false, Accumulate::kLast, Reduce::kMax});
}

}  // namespace
}  // namespace adakv
