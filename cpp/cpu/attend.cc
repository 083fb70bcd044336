// attend: workers go through their share of the pages (the schedule that plan made), each row's
// partial results are merged through their maximum and sum, in slot order: the same bits for any
// number of threads.
//
// With more queries per row than one span takes (a chunk of a prompt), there is work enough without
// cutting rows: then an item is one block of queries of one row, and nothing is merged.
//
// Where the entries of a row lie in several tiers, each of them is a tier's share of the work, by its own
// schedule, and all of their results are partial ones.
//
// What is accumulated waits for lse, which is known when the whole row has been read. So the products
// with keys are kept, 4 G bytes an entry beside the 4 D or so that it is read for, and gone through
// once more.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/attend_checks.h"
#include "cpu/cpu_backend.h"
#include "cpu/float16.h"
#include "cpu/kernels.h"
#include "cpu/page_check.h"
#include "cpu/parallel.h"
#include "cpu/tail_writer.h"
#include "cpu/tier_work.h"
#include "ops/schedule.h"

namespace adakv {
namespace {

/// What a span gives for its queries; see AttendSpan.
struct Partial {
  float* max;  // [R]
  float* sum;  // [R]
  float* acc;  // [R, Dv]

  Partial(float* data, int64_t num_queries)
      : max(data), sum(data + num_queries), acc(data + 2 * num_queries) {}

  static int64_t num_floats(int64_t num_queries, int64_t value_dim) {
    return num_queries * (2 + value_dim);
  }
};

/// Products of some queries with the keys of the slots from the first one on that a span takes;
/// see AttendSpan.
struct Logits {
  float* data = nullptr;
  int64_t stride = 0;
};

/// A Partial on the stack, of all columns of out.
struct LocalPartial : Partial {
  explicit LocalPartial(int64_t num_queries) : Partial(data, num_queries) {}
  float data[kMaxSpanQueries * (2 + 2 * kMaxHeadDim)];
};

int64_t num_new(const AttendArgs& args, int64_t b) {
  if (!args.num_new) return args.queries.shape[2];
  return args.num_new.ptr<const int32_t>()[b * args.num_new.stride[0]];
}

/// Whether a page that is filled by this call is read before it is quantised.
bool reads_filled_tails(const AttendArgs& args) {
  return args.layer.tails && args.keys && args.keys.shape[2] == 1;
}

/// Quantises the tails that one new token filled.
void quantise_filled(const AttendArgs& args) {
  const LayerView& layer = args.layer;
  const TailWriter tails(layer);
  const int64_t heads = layer.lengths.shape[1];
  parallel_for(layer.lengths.shape[0] * heads, [&](int64_t row) {
    const int64_t b = row / heads, h = row % heads;
    const auto at = [&](const TensorView& x) {
      return x.ptr<int32_t>() + b * x.stride[0] + h * x.stride[1];
    };
    const int32_t length = *at(layer.lengths);
    if (num_new(args, b) != 1 || length % kTailedPageSize != 0) return;
    tails.quantise(b, h, at(layer.block_table)[length / kTailedPageSize - 1]);
  });
}

class Attention {
 public:
  explicit Attention(const AttendArgs& args)
      : args_(args),
        num_kv_heads_(args.layer.lengths.shape[1]),
        num_rows_(args.layer.lengths.shape[0] * num_kv_heads_),
        group_(num_kv_heads_ > 0 ? args.queries.shape[1] / num_kv_heads_ : 0),
        num_tokens_(args.queries.shape[2]),
        width_(args.out.shape[3]) {
    tiers_.reserve(num_tiers(args));
    float* partials = args.workspace.ptr<float>();
    for (size_t i = 0; i < num_tiers(args); ++i) {
      tiers_.emplace_back(args, i).partials = partials;
      if (is_split(args)) partials += num_floats(args, tiers_.back().value_dim);
    }
    logits_ = partials;
  }

  /// Floats that the partial results of a tier take. With others all results are partial, also those
  /// of rows that one worker does.
  static int64_t num_floats(const AttendArgs& args, int64_t value_dim) {
    const int64_t num_queries =
        args.queries.shape[1] / args.layer.lengths.shape[1] * args.queries.shape[2];
    const int64_t whole_rows = args.others.empty() ? 0 : args.layer.lengths.size();
    return (schedule::max_partials(args.num_workers) + whole_rows) *
           Partial::num_floats(num_queries, value_dim);
  }

  /// Floats that all rows' Logits take.
  static int64_t num_logits(const AttendArgs& args) {
    if (!args.accumulated) return 0;
    return args.queries.size() / args.queries.shape[3] * logits_stride(args);
  }

  static bool is_split(const AttendArgs& args) {
    return args.layer.lengths.shape[1] > 0 &&
           args.queries.shape[1] / args.layer.lengths.shape[1] * args.queries.shape[2] <=
               kMaxSpanQueries;
  }

  void run_by_pages() const {
    const auto count = static_cast<int64_t>(tiers_.size());
    parallel_for(count * args_.num_workers, [&](int64_t item) {
      run_worker(tiers_[item / args_.num_workers], item % args_.num_workers);
    });
    const auto needs_merge = [&](const schedule::RowFacts& row) {
      return row.num_partials != 1 || !is_alone();
    };
    const schedule::RowFacts* rows = tiers_[0].rows;
    if (!std::any_of(rows, rows + num_rows_, needs_merge)) return;
    parallel_for(num_rows_, [&](int64_t row) {
      if (needs_merge(rows[row])) merge(row);
    });
  }

  void run_by_queries() const {
    const int64_t num_queries = group_ * num_tokens_;
    const int64_t blocks = (num_queries + kMaxSpanQueries - 1) / kMaxSpanQueries;
    parallel_for(num_rows_ * blocks, [&](int64_t item) {
      const int64_t row = item / blocks;
      const int64_t first = item % blocks * kMaxSpanQueries;
      const int64_t count = std::min<int64_t>(kMaxSpanQueries, num_queries - first);
      LocalPartial result(count);
      attend_slots(tiers_[0], row, 0, tiers_[0].rows[row].length, first, count, result);
      if (is_alone()) return finish(row, first, count, result);
      LocalPartial total(count);
      clear(total, count);
      join(tiers_[0], result, count, total);
      for (size_t i = 1; i < tiers_.size(); ++i) {
        attend_slots(tiers_[i], row, 0, tiers_[i].rows[row].length, first, count, result);
        join(tiers_[i], result, count, total);
      }
      finish(row, first, count, total);
    });
  }

  /// Adds what the queries gave to each slot, which lse tells, to what is accumulated. With few
  /// queries their products with keys were kept, else they are made again.
  void accumulate() const {
    const int64_t most = args_.layer.block_table.shape[2] * args_.layer.pages.shape[2];
    const int64_t blocks = (most + kBlock - 1) / kBlock;
    const bool are_kept = is_split(args_);
    parallel_for(num_rows_ * blocks, [&](int64_t item) {
      const int64_t row = item / blocks;
      const int length = tiers_[0].rows[row].length,
                begin = static_cast<int>(item % blocks * kBlock);
      const int end = std::min(begin + kBlock, length);
      if (begin >= end) return;
      const int num_new = static_cast<int>(adakv::num_new(args_, row / num_kv_heads_));
      float* to = accumulated(row);
      std::fill(to + std::max(begin, std::min(end, length - num_new)), to + end, 0.f);
      const int64_t at_once = are_kept ? num_tokens_ : kMaxSpanQueries / group_;
      for (int64_t s = num_tokens_ - num_new; s < num_tokens_; s += at_once) {
        const int64_t count = std::min(at_once, num_tokens_ - s);
        if (are_kept) {
          Logits kept = logits(row, begin);
          kept.data += s * group_ * kept.stride;
          add(row, begin, end, s, count, kept);
        } else {
          float memory[kMaxSpanQueries * kBlock];
          LocalPartial unused(count * group_);
          const Logits made = {memory, kBlock};
          attend_slots(tiers_[0], row, begin, end, s * group_, count * group_, unused, made);
          add(row, begin, end, s, count, made);
        }
      }
    });
  }

 private:
  static constexpr int kBlock = 256;  // slots at a time; a multiple of every page size
  static_assert(kBlock % kMaxLanes == 0);

  static int64_t logits_stride(const AttendArgs& args) {
    const int64_t most = args.layer.block_table.shape[2] * args.layer.pages.shape[2];
    return (most + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  }

  /// Those of a row from a slot on, behind the partial results; of all its queries. None unless they
  /// are wanted.
  Logits logits(int64_t row, int slot) const {
    if (!args_.accumulated) return {};
    const int64_t stride = logits_stride(args_), num_queries = group_ * num_tokens_;
    return {logits_ + row * num_queries * stride + slot, stride};
  }

  float* accumulated(int64_t row) const {
    const TensorView& view = args_.accumulated;
    return view.ptr<float>() + row / num_kv_heads_ * view.stride[0] +
           row % num_kv_heads_ * view.stride[1];
  }

  /// Slots [begin, end) of a row get what `count` tokens from `first` on give them.
  void add(
      int64_t row, int begin, int end, int64_t first, int64_t count, const Logits& from) const {
    const int64_t b = row / num_kv_heads_, h = row % num_kv_heads_;
    AccumulateSpan span = {};
    span.logits_stride = from.stride;
    span.group = static_cast<int>(group_);
    span.scale = scale_of(args_);
    span.softcap = args_.softcap;
    span.accumulate = args_.accumulate;
    span.group_reduce = args_.group_reduce;
    span.decay = args_.decay;
    span.threshold = args_.threshold;
    span.accumulated = accumulated(row) + begin;
    float lse[kMaxSpanQueries];
    span.lse = lse;
    const TensorView &of_lse = args_.lse, &seen = args_.layer.seen;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t s = first + i, behind = num_tokens_ - 1 - s;
      const int visible = tiers_[0].rows[row].length - static_cast<int>(behind);
      span.num_slots = std::min(end, visible) - begin;
      span.number = static_cast<float>(seen.ptr<int32_t>()[b * seen.stride[0]] - behind);
      span.logits = from.data + i * group_ * from.stride;
      for (int64_t g = 0; g < group_; ++g) {
        lse[g] = of_lse.ptr<float>()[b * of_lse.stride[0] + (h * group_ + g) * of_lse.stride[1] +
                                     s * of_lse.stride[2]];
      }
      kernels().accumulate_span(span);
    }
  }

  bool is_alone() const { return tiers_.size() == 1; }

  /// The worker's pages of a tier, row by row.
  void run_worker(const TierWork& tier, int64_t worker) const {
    const schedule::Worker& w = tier.workers[worker];
    const int64_t num_queries = group_ * num_tokens_;
    const int page_size = static_cast<int>(tier.args.layer.pages.shape[2]);
    for (int32_t unit = w.begin, row = w.row; unit < w.end; ++row) {
      const schedule::RowFacts& facts = tier.rows[row];
      const int32_t end = std::min(w.end, facts.end);
      if (end <= unit) continue;
      const int begin_slot = (unit - facts.begin) * page_size;
      const int end_slot = std::min((end - facts.begin) * page_size, facts.length);
      const Logits kept = logits(row, begin_slot);
      if (facts.num_partials > 1 || !is_alone()) {
        const int64_t index = static_cast<int64_t>(worker) - facts.first_worker;
        attend_slots(tier, row, begin_slot, end_slot, 0, num_queries, partial(tier, row, index),
                     kept);
      } else {
        LocalPartial whole(num_queries);
        attend_slots(tier, row, begin_slot, end_slot, 0, num_queries, whole, kept);
        finish(row, 0, num_queries, whole);
      }
      unit = end;
    }
  }

  /// What the index-th of the workers that share a row gives. Those of rows that are not shared lie
  /// behind the others.
  Partial partial(const TierWork& tier, int64_t row, int64_t index) const {
    const int64_t num_queries = group_ * num_tokens_;
    const schedule::RowFacts& facts = tier.rows[row];
    const int64_t first = facts.num_partials > 1 ? facts.first_partial
                                                 : schedule::max_partials(args_.num_workers) + row;
    return {tier.partials + (first + index) * Partial::num_floats(num_queries, tier.value_dim),
            num_queries};
  }

  void attend_slots(const TierWork& tier,
                    int64_t row,
                    int begin,
                    int end,
                    int64_t first_query,
                    int64_t num_queries,
                    const Partial& out,
                    const Logits& logits = {}) const {
    const int64_t b = row / num_kv_heads_, h = row % num_kv_heads_;
    const LayerView& layer = tier.args.layer;
    const TensorView& q = tier.args.queries;
    const TensorView& table = layer.block_table;
    AttendSpan span;
    span.keys = layer.pages.data;
    span.values = tier.values.data;
    span.page_stride = layer.pages.stride[0];
    for (int i = 0; i < 2; ++i) {
      const TensorView& scales = i == 0 ? layer.key_scales : layer.value_scales;
      span.scales[i] = scales.data;
      span.scale_stride[i] = scales.stride[0];
    }
    span.biases = layer.page_biases.data;
    span.bias_stride = layer.page_biases.stride[0];
    span.key_dims = tier.key_dims;
    span.tail_begin = tail_begin(tier, b, tier.rows[row].length);
    span.tail =
        layer.tails.ptr<const char>() + (b * layer.tails.stride[0] + h * layer.tails.stride[1]) *
                                            static_cast<int64_t>(sizeof(uint16_t));
    span.page_ids = table.ptr<const int32_t>() + b * table.stride[0] + h * table.stride[1];
    span.page_size = static_cast<int>(layer.pages.shape[2]);
    span.head_dim = static_cast<int>(tier.head_dim);
    span.value_dim = static_cast<int>(tier.value_dim);
    span.group = static_cast<int>(group_);
    span.begin_slot = begin;
    span.end_slot = end;
    span.queries =
        q.ptr<const char>() + (b * q.stride[0] + h * group_ * q.stride[1]) * dtype_size(q.dtype);
    span.query_head_stride = q.stride[1];
    span.query_token_stride = q.stride[2];
    span.first_query = static_cast<int>(first_query);
    span.num_queries = static_cast<int>(num_queries);
    span.first_visible = tier.rows[row].length - static_cast<int>(tier.num_hidden);
    span.scale = tier.args.scale;
    span.softcap = args_.softcap;
    span.max = out.max;
    span.sum = out.sum;
    span.acc = out.acc;
    span.logits = logits.data;
    span.logits_stride = logits.stride;
    tier.attend_span(span);
  }

  /// The first slot of a row that is read from its tail, if it has one.
  int tail_begin(const TierWork& tier, int64_t b, int length) const {
    const int read = reads_filled_tails(tier.args) && num_new(args_, b) == 1 ? length - 1 : length;
    return read / kTailedPageSize * kTailedPageSize;
  }

  /// Adds up the partial results of a row, tier by tier in slot order.
  void merge(int64_t row) const {
    const int64_t num_queries = group_ * num_tokens_;
    LocalPartial total(num_queries);
    clear(total, num_queries);
    for (const TierWork& tier : tiers_) {
      for (int i = 0; i < tier.rows[row].num_partials; ++i) {
        const Partial part = partial(tier, row, i);
        for (int64_t r = 0; r < num_queries; ++r)
          total.max[r] = std::max(total.max[r], part.max[r]);
      }
    }
    for (const TierWork& tier : tiers_) {
      for (int i = 0; i < tier.rows[row].num_partials; ++i)
        join(tier, partial(tier, row, i), num_queries, total);
    }
    finish(row, 0, num_queries, total);
  }

  /// Nothing in all columns of out.
  void clear(const Partial& total, int64_t num_queries) const {
    std::fill_n(total.max, num_queries, -INFINITY);
    std::fill_n(total.sum, num_queries, 0.f);
    std::fill_n(total.acc, num_queries * width_, 0.f);
  }

  /// Adds what a span of a tier gave.
  void join(const TierWork& tier,
            const Partial& part,
            int64_t num_queries,
            const Partial& total) const {
    for (int64_t r = 0; r < num_queries; ++r) {
      if (part.max[r] == -INFINITY) continue;
      if (part.max[r] > total.max[r]) {
        const float shrunk = std::exp(total.max[r] - part.max[r]);
        total.max[r] = part.max[r];
        total.sum[r] *= shrunk;
        for (int64_t d = 0; d < width_; ++d) total.acc[r * width_ + d] *= shrunk;
      }
      const float factor = std::exp(part.max[r] - total.max[r]);
      total.sum[r] += factor * part.sum[r];
      float* to = total.acc + r * width_ + tier.column;
      const float* from = part.acc + r * tier.value_dim;
      for (int64_t d = 0; d < tier.value_dim; ++d) to[d] += factor * from[d];
    }
  }

  /// Divides by the sum, the share of the sink included, and stores out and lse.
  void finish(int64_t row, int64_t first_query, int64_t num_queries, const Partial& result) const {
    const int64_t b = row / num_kv_heads_, h = row % num_kv_heads_;
    const int64_t num_new = adakv::num_new(args_, b);
    for (int64_t r = 0; r < num_queries; ++r) {
      const int64_t s = (first_query + r) / group_;
      const int64_t q = h * group_ + (first_query + r) % group_;
      float factor = 0, lse = -INFINITY;
      if (s >= num_tokens_ - num_new && result.max[r] != -INFINITY) {
        float max = result.max[r], sum = result.sum[r];
        if (args_.sink_logits) {
          const float sink = args_.sink_logits.ptr<const float>()[q * args_.sink_logits.stride[0]];
          max = std::max(max, sink);
          sum = sum * std::exp(result.max[r] - max) + std::exp(sink - max);
        }
        factor = std::exp(result.max[r] - max) / sum;
        lse = max + std::log(sum);
      }
      store_out(args_.out, b, q, s, result.acc + r * width_, factor);
      if (args_.lse) {
        const TensorView& view = args_.lse;
        view.ptr<float>()[b * view.stride[0] + q * view.stride[1] + s * view.stride[2]] = lse;
      }
    }
  }

  template <typename Element>
  static void store_scaled(Element* out, const float* acc, int64_t count, float factor) {
    for (int64_t d = 0; d < count; ++d) from_float(factor != 0 ? acc[d] * factor : 0.f, out[d]);
  }

  void store_out(const TensorView& out,
                 int64_t b,
                 int64_t q,
                 int64_t s,
                 const float* acc,
                 float factor) const {
    const int64_t offset = b * out.stride[0] + q * out.stride[1] + s * out.stride[2];
    if (out.dtype == DType::kFloat32) store_scaled(out.ptr<float>() + offset, acc, width_, factor);
    if (out.dtype == DType::kFloat16)
      store_scaled(out.ptr<Float16>() + offset, acc, width_, factor);
    if (out.dtype == DType::kBFloat16)
      store_scaled(out.ptr<BFloat16>() + offset, acc, width_, factor);
  }

  const AttendArgs& args_;
  const int64_t num_kv_heads_, num_rows_, group_, num_tokens_;
  const int64_t width_;  // columns of out
  std::vector<TierWork> tiers_;
  float* logits_;
};

}  // namespace

void CpuBackend::attend(const AttendArgs& args) {
  for (size_t i = 0; i < num_tiers(args); ++i) {
    const AttendArgs tier = tier_args(args, i);
    check_pages("attend", tier.layer.block_table, tier.layer.lengths, tier.layer.pages.shape[0],
                static_cast<int32_t>(tier.layer.pages.shape[2]));
    ScheduleCheck(tier).run();
  }
  const FullTails full = reads_filled_tails(args) ? FullTails::kLeave : FullTails::kQuantise;
  if (args.keys) {
    append_entries({args.keys, args.values, args.num_new, args.layer, args.stream}, full);
  }
  const Attention attention(args);
  if (Attention::is_split(args)) {
    attention.run_by_pages();
  } else {
    attention.run_by_queries();
  }
  if (args.accumulated) attention.accumulate();
  if (full == FullTails::kLeave) quantise_filled(args);
}

size_t CpuBackend::workspace_bytes(const AttendArgs& args) const {
  if (!Attention::is_split(args)) return 0;
  int64_t floats = Attention::num_logits(args);
  for (size_t i = 0; i < num_tiers(args); ++i) {
    floats += Attention::num_floats(args, TierWork::value_dim_of(tier_args(args, i)));
  }
  return static_cast<size_t>(floats) * sizeof(float);
}

}  // namespace adakv
