// score, in four steps over chunks of keys:
//   1. sums:    for each q head and chunk, the softmax's maximum and sum (left out if lse is given);
//               of many queries: in blocks, each of which has all keys for its chunk
//   2. join:    the chunks' sums, the sink's share included, to log-sum-exps
//   3. window:  probabilities, computed anew, reduced over the window and the group
//   4. pool:    along the positions
// Computing the logits twice costs less than keeping them: nothing of size [Hq, W, T] exists.
#include <algorithm>
#include <cmath>

#include "cpu/cpu_backend.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "ops/scale.h"

namespace adakv {
namespace {

constexpr int64_t kChunk =
    768;  // keys of an item; whole blocks, and small enough to share a short prompt out
constexpr int64_t kQueryBlock = 256;  // queries of an item of step 1

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// Pools one row of candidates: `pooled` may not be `x`.
void pool_row(const float* x, int64_t n, Pool pool, int width, float* pooled) {
  if (pool == Pool::kNone) {
    std::copy_n(x, n, pooled);
    return;
  }
  const int64_t side = std::min<int64_t>(width / 2, n);
  std::fill_n(pooled, n, pool == Pool::kMax ? -INFINITY : 0.f);
  for (int64_t shift = -side; shift <= side; ++shift) {
    const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(n, n - shift);
    if (pool == Pool::kMax) {
      for (int64_t t = begin; t < end; ++t) pooled[t] = std::max(pooled[t], x[t + shift]);
    } else {
      for (int64_t t = begin; t < end; ++t) pooled[t] += x[t + shift];
    }
  }
  if (pool == Pool::kAvg) {
    for (int64_t t = 0; t < n; ++t) pooled[t] /= static_cast<float>(width);
  }
}

/// Takes another q head's scores into those of its kv head.
void reduce_into(float* total, const float* x, int64_t n, Reduce reduce) {
  if (reduce == Reduce::kMax) {
    for (int64_t t = 0; t < n; ++t) total[t] = std::max(total[t], x[t]);
  } else {
    for (int64_t t = 0; t < n; ++t) total[t] += x[t];
  }
}

void finish_reduce(float* total, int64_t n, Reduce reduce, int64_t count) {
  if (reduce != Reduce::kMean) return;
  for (int64_t t = 0; t < n; ++t) total[t] /= static_cast<float>(count);
}

struct Range {
  int64_t first, count;
};

class Scoring {
 public:
  explicit Scoring(const ScoreArgs& args)
      : args_(args),
        batch_(args.queries.shape[0]),
        num_heads_(args.queries.shape[1]),
        window_(args.queries.shape[2]),
        num_kv_heads_(args.keys.shape[1]),
        length_(args.keys.shape[2]),
        group_(num_kv_heads_ > 0 ? num_heads_ / num_kv_heads_ : 0),
        not_competing_(args.window < 0 ? window_ : args.window),
        num_chunks_((length_ + kChunk - 1) / kChunk),
        num_query_blocks_((window_ + kQueryBlock - 1) / kQueryBlock),
        sum_chunk_(num_query_blocks_ > 1 ? std::max<int64_t>(length_, 1) : kChunk),
        num_sum_chunks_((length_ + sum_chunk_ - 1) / sum_chunk_),
        padded_window_(round_up(window_, kMaxLanes)),
        padded_length_(round_up(length_, kMaxLanes)),
        pools_heads_(args.order == Order::kPoolFirst),
        num_sums_(args.lse ? 0 : batch_ * num_heads_ * num_sum_chunks_ * 2 * padded_window_),
        num_joined_(batch_ * num_heads_ * padded_window_),
        num_reduced_(batch_ * (pools_heads_ ? num_heads_ + num_kv_heads_ : num_kv_heads_) *
                     padded_length_),
        workspace_(args.workspace.ptr<float>()) {}

  size_t workspace_bytes() const {
    return static_cast<size_t>(num_sums_ + num_joined_ + num_reduced_) * sizeof(float);
  }

  void run() const {
    if (!args_.lse) {
      const int64_t items_per_head = num_query_blocks_ * num_sum_chunks_;
      parallel_for(batch_ * num_heads_ * items_per_head, [&](int64_t item) {
        const int64_t of_head = item % items_per_head;
        add_up(item / items_per_head, of_head / num_sum_chunks_, of_head % num_sum_chunks_);
      });
    }
    for (int64_t q = 0; q < batch_ * num_heads_; ++q) join_sums(q);
    parallel_for(batch_ * num_kv_heads_ * num_chunks_,
                 [&](int64_t item) { reduce_window(item / num_chunks_, item % num_chunks_); });
    parallel_for(batch_ * num_kv_heads_, [&](int64_t row) { pool(row); });
  }

 private:
  /// Entries of a row.
  int64_t seq_len(int64_t row) const {
    const int64_t b = row / num_kv_heads_, h = row % num_kv_heads_;
    const TensorView& lengths = args_.layer.lengths;
    if (lengths) return lengths.ptr<int32_t>()[b * lengths.stride[0] + h * lengths.stride[1]];
    return args_.seq_lens ? args_.seq_lens.ptr<const int32_t>()[b * args_.seq_lens.stride[0]]
                          : length_;
  }

  /// Positions that compete.
  int64_t num_candidates(int64_t row) const {
    return std::max<int64_t>(0, seq_len(row) - not_competing_);
  }

  int64_t row_of(int64_t query_head) const { return query_head / group_; }

  HeldKeys held_keys(int64_t row) const {
    const LayerView& layer = args_.layer;
    const TensorView& table = layer.block_table;
    HeldKeys held = {};
    held.pages = layer.pages.data;
    held.page_stride = layer.pages.stride[0];
    held.scales = layer.key_scales.data;
    held.scale_stride = layer.key_scales.stride[0];
    held.page_ids = table.ptr<int32_t>() + row / num_kv_heads_ * table.stride[0] +
                    row % num_kv_heads_ * table.stride[1];
    held.page_size = static_cast<int>(layer.page_positions.shape[1]);
    held.format = layer.format();
    held.num_scales = static_cast<int>(num_scales(held.format, args_.keys.shape[3]));
    return held;
  }

  /// Some keys before some queries of one q head, which counts through the batch; a query sees the
  /// keys that it is at least `distance` behind.
  ScoreSpan span(int64_t query_head, Range window, Range prompt, int64_t distance) const {
    const int64_t b = query_head / num_heads_, q = query_head % num_heads_;
    const TensorView& queries = args_.queries;
    const TensorView& keys = args_.keys;
    const int64_t key =
        b * keys.stride[0] + q / group_ * keys.stride[1] + prompt.first * keys.stride[2];
    const int64_t query =
        b * queries.stride[0] + q * queries.stride[1] + window.first * queries.stride[2];
    const int64_t row = row_of(query_head);
    const int64_t first_position = seq_len(row) - 1 - (window_ - 1 - window.first) * args_.stride;
    const auto element_bytes = static_cast<int64_t>(dtype_size(keys.dtype));
    ScoreSpan span = {};
    if (args_.layer.pages) {
      span.held = held_keys(row);
      span.first_slot = static_cast<int>(prompt.first);
    } else {
      span.keys = keys.ptr<const char>() + key * element_bytes;
    }
    span.queries = queries.ptr<const char>() + query * element_bytes;
    span.key_stride = keys.stride[2];
    span.query_stride = queries.stride[2];
    span.num_keys = static_cast<int>(prompt.count);
    span.window = static_cast<int>(window.count);
    span.head_dim = static_cast<int>(keys.shape[3]);
    span.stride = args_.stride;
    span.first_visible = static_cast<int>(first_position + 1 - distance - prompt.first);
    span.scale = scale_of(args_);
    span.softcap = args_.softcap;
    span.takes_max = args_.window_reduce == Reduce::kMax;
    return span;
  }

  /// [2, padded_window]: maximum and sum.
  float* chunk_sums(int64_t query_head, int64_t chunk) const {
    return workspace_ + (query_head * num_sum_chunks_ + chunk) * 2 * padded_window_;
  }

  void add_up(int64_t query_head, int64_t block, int64_t chunk) const {
    const int64_t row = row_of(query_head), first = block * kQueryBlock;
    const int64_t num_keys = std::min(sum_chunk_, seq_len(row) - chunk * sum_chunk_);
    if (num_candidates(row) == 0 || num_keys <= 0) return;
    ScoreSpan keys = span(query_head, {first, std::min(kQueryBlock, window_ - first)},
                          {chunk * sum_chunk_, num_keys}, 0);
    keys.max = chunk_sums(query_head, chunk) + first;
    keys.sum = keys.max + padded_window_;
    kernels().score_sums[static_cast<int>(args_.keys.dtype)](keys);
  }

  /// [padded_window]: log-sum-exp over all keys.
  float* joined_sums(int64_t query_head) const {
    return workspace_ + num_sums_ + query_head * padded_window_;
  }

  /// The chunks' sums joined; +inf behind the window and for queries before the prompt, which makes
  /// probabilities of 0.
  void join_sums(int64_t query_head) const {
    const int64_t b = query_head / num_heads_, q = query_head % num_heads_;
    float* joined = joined_sums(query_head);
    std::fill_n(joined, padded_window_, INFINITY);
    const int64_t row = row_of(query_head);
    if (num_candidates(row) == 0) return;
    const int64_t chunks = (seq_len(row) + sum_chunk_ - 1) / sum_chunk_;
    for (int64_t w = 0; w < window_; ++w) {
      if (args_.lse) {
        const TensorView& lse = args_.lse;
        joined[w] =
            lse.ptr<const float>()[b * lse.stride[0] + q * lse.stride[1] + w * lse.stride[2]];
        continue;
      }
      const float sink = args_.sink_logits
                             ? args_.sink_logits.ptr<const float>()[q * args_.sink_logits.stride[0]]
                             : -INFINITY;
      float max = sink;
      for (int64_t c = 0; c < chunks; ++c) max = std::max(max, chunk_sums(query_head, c)[w]);
      if (max == -INFINITY) continue;
      float sum = std::exp(sink - max);
      for (int64_t c = 0; c < chunks; ++c) {
        const float* sums = chunk_sums(query_head, c);
        sum += std::exp(sums[w] - max) * sums[padded_window_ + w];
      }
      joined[w] = max + std::log(sum);
    }
  }

  /// Where a row's candidates lie before pooling: a row of a q head if those are pooled, else of a
  /// kv head.
  float* reduced(int64_t row) const {
    return workspace_ + num_sums_ + num_joined_ + row * padded_length_;
  }

  void reduce_window(int64_t row, int64_t chunk) const {
    const int64_t b = row / num_kv_heads_, h = row % num_kv_heads_;
    const int64_t num_keys = std::min(kChunk, num_candidates(row) - chunk * kChunk);
    if (num_keys <= 0) return;
    float scores[kChunk];
    alignas(64) float lanes[kChunk * kMaxLanes];
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t query_head = b * num_heads_ + h * group_ + g;
      float* own = reduced(pools_heads_ ? query_head : row) + chunk * kChunk;
      ScoreSpan keys = span(query_head, {0, window_}, {chunk * kChunk, num_keys}, args_.distance);
      keys.lse = joined_sums(query_head);
      keys.lanes = lanes;
      keys.scores = scores;
      kernels().score_window[static_cast<int>(args_.keys.dtype)](keys);
      if (args_.window_reduce == Reduce::kMean) average(row, chunk * kChunk, num_keys, scores);
      if (pools_heads_ || g == 0) {
        std::copy_n(scores, num_keys, own);
      } else {
        reduce_into(own, scores, num_keys, args_.group_reduce);
      }
    }
    if (!pools_heads_)
      finish_reduce(reduced(row) + chunk * kChunk, num_keys, args_.group_reduce, group_);
  }

  /// Divides sums over the window by the number of queries that count for each key.
  void average(int64_t row, int64_t first_key, int64_t num_keys, float* sums) const {
    for (int64_t i = 0; i < num_keys; ++i) {
      const int64_t before_last = seq_len(row) - 1 - args_.distance - (first_key + i);
      const int64_t count = before_last < 0 ? 0 : std::min(window_, before_last / args_.stride + 1);
      if (count > 1) sums[i] /= static_cast<float>(count);
    }
  }

  void pool(int64_t row) const {
    const int64_t b = row / num_kv_heads_, h = row % num_kv_heads_;
    const int64_t n = num_candidates(row);
    float* scores =
        args_.scores.ptr<float>() + b * args_.scores.stride[0] + h * args_.scores.stride[1];
    std::fill(scores + n, scores + length_, -INFINITY);
    if (!pools_heads_) {
      pool_row(reduced(row), n, args_.pool, args_.pool_width, scores);
      return;
    }
    float* pooled = reduced(batch_ * num_heads_ + row);
    for (int64_t g = 0; g < group_; ++g) {
      const float* head = reduced(b * num_heads_ + h * group_ + g);
      pool_row(head, n, args_.pool, args_.pool_width, g == 0 ? scores : pooled);
      if (g > 0) reduce_into(scores, pooled, n, args_.group_reduce);
    }
    finish_reduce(scores, n, args_.group_reduce, group_);
  }

  const ScoreArgs& args_;
  const int64_t batch_, num_heads_, window_, num_kv_heads_, length_, group_;
  const int64_t not_competing_;  // last positions
  const int64_t num_chunks_, num_query_blocks_, sum_chunk_, num_sum_chunks_;
  const int64_t padded_window_, padded_length_;
  const bool pools_heads_;
  const int64_t num_sums_;     // [B, Hq, chunks of step 1, 2, padded W]
  const int64_t num_joined_;   // [B, Hq, padded W]
  const int64_t num_reduced_;  // [B, Hkv, padded T]; [B, Hq + Hkv, padded T] if q heads are pooled
  float* const workspace_;     // the three, one behind the other
};

}  // namespace

void CpuBackend::score(const ScoreArgs& args) {
  Scoring(args).run();
}

size_t CpuBackend::workspace_bytes(const ScoreArgs& args) const {
  return Scoring(args).workspace_bytes();
}

}  // namespace adakv
