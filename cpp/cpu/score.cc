// score, in four steps over chunks of keys:
//   1. sums:    for each q head and chunk, the softmax's maximum and sum (left out if lse is given)
//   2. join:    the chunks' sums, the sink's share included
//   3. window:  probabilities, computed anew, reduced over the window and the group
//   4. pool:    along the positions
// Computing the logits twice costs less than keeping them: nothing of size [Hq, W, T] exists.
#include <algorithm>
#include <cmath>

#include "cpu/cpu_backend.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace adakv {
namespace {

constexpr int64_t kChunk =
    768;  // keys of an item; whole blocks, and small enough to share a short prompt out

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
        num_chunks_((length_ + kChunk - 1) / kChunk),
        padded_window_(round_up(window_, kMaxLanes)),
        padded_length_(round_up(length_, kMaxLanes)),
        pools_heads_(args.order == Order::kPoolFirst),
        num_sums_(args.lse ? 0 : batch_ * num_heads_ * num_chunks_ * 2 * padded_window_),
        num_joined_(batch_ * num_heads_ * 2 * padded_window_),
        num_reduced_(batch_ * (pools_heads_ ? num_heads_ + num_kv_heads_ : num_kv_heads_) *
                     padded_length_),
        workspace_(args.workspace.ptr<float>()) {}

  size_t workspace_bytes() const {
    return static_cast<size_t>(num_sums_ + num_joined_ + num_reduced_) * sizeof(float);
  }

  void run() const {
    if (!args_.lse) {
      parallel_for(batch_ * num_heads_ * num_chunks_,
                   [&](int64_t item) { add_up(item / num_chunks_, item % num_chunks_); });
    }
    for (int64_t q = 0; q < batch_ * num_heads_; ++q) join_sums(q);
    parallel_for(batch_ * num_kv_heads_ * num_chunks_,
                 [&](int64_t item) { reduce_window(item / num_chunks_, item % num_chunks_); });
    parallel_for(batch_ * num_kv_heads_, [&](int64_t row) { pool(row); });
  }

 private:
  int64_t seq_len(int64_t b) const {
    return args_.seq_lens ? args_.seq_lens.ptr<const int32_t>()[b * args_.seq_lens.stride[0]]
                          : length_;
  }

  /// Positions that compete.
  int64_t num_candidates(int64_t b) const { return std::max<int64_t>(0, seq_len(b) - window_); }

  /// Keys of a chunk before one q head; `query_head` counts through the batch.
  ScoreSpan span(int64_t query_head, int64_t chunk, int64_t num_keys) const {
    const int64_t b = query_head / num_heads_, q = query_head % num_heads_;
    const TensorView& queries = args_.queries;
    const TensorView& keys = args_.keys;
    const int64_t key =
        b * keys.stride[0] + q / group_ * keys.stride[1] + chunk * kChunk * keys.stride[2];
    const int64_t query = b * queries.stride[0] + q * queries.stride[1];
    const auto element_bytes = static_cast<int64_t>(dtype_size(keys.dtype));
    ScoreSpan span = {};
    span.keys = keys.ptr<const char>() + key * element_bytes;
    span.queries = queries.ptr<const char>() + query * element_bytes;
    span.key_stride = keys.stride[2];
    span.query_stride = queries.stride[2];
    span.num_keys = static_cast<int>(num_keys);
    span.window = static_cast<int>(window_);
    span.head_dim = static_cast<int>(keys.shape[3]);
    span.first_visible = static_cast<int>(seq_len(b) - window_ + 1 - chunk * kChunk);
    span.scale = args_.scale != 0 ? args_.scale : 1 / std::sqrt(static_cast<float>(keys.shape[3]));
    span.softcap = args_.softcap;
    span.window_reduce = args_.window_reduce;
    return span;
  }

  /// [2, padded_window]: maximum and sum.
  float* chunk_sums(int64_t query_head, int64_t chunk) const {
    return workspace_ + (query_head * num_chunks_ + chunk) * 2 * padded_window_;
  }

  void add_up(int64_t query_head, int64_t chunk) const {
    const int64_t b = query_head / num_heads_;
    const int64_t num_keys = std::min(kChunk, seq_len(b) - chunk * kChunk);
    if (num_candidates(b) == 0 || num_keys <= 0) return;
    ScoreSpan keys = span(query_head, chunk, num_keys);
    keys.max = chunk_sums(query_head, chunk);
    keys.sum = keys.max + padded_window_;
    kernels().score_sums[static_cast<int>(args_.keys.dtype)](keys);
  }

  /// [2, padded_window]: maximum and 1 / sum over all keys.
  float* joined_sums(int64_t query_head) const {
    return workspace_ + num_sums_ + query_head * 2 * padded_window_;
  }

  /// The chunks' sums joined; 0 behind the window, which makes probabilities of 0.
  void join_sums(int64_t query_head) const {
    const int64_t b = query_head / num_heads_, q = query_head % num_heads_;
    float* maxima = joined_sums(query_head);
    float* inverse_sums = maxima + padded_window_;
    std::fill_n(maxima, 2 * padded_window_, 0.f);
    if (num_candidates(b) == 0) return;
    const int64_t chunks = (seq_len(b) + kChunk - 1) / kChunk;
    for (int64_t w = 0; w < window_; ++w) {
      if (args_.lse) {
        const TensorView& lse = args_.lse;
        maxima[w] =
            lse.ptr<const float>()[b * lse.stride[0] + q * lse.stride[1] + w * lse.stride[2]];
        inverse_sums[w] = 1;
        continue;
      }
      const float sink = args_.sink_logits
                             ? args_.sink_logits.ptr<const float>()[q * args_.sink_logits.stride[0]]
                             : -INFINITY;
      float max = sink;
      for (int64_t c = 0; c < chunks; ++c) max = std::max(max, chunk_sums(query_head, c)[w]);
      float sum = std::exp(sink - max);
      for (int64_t c = 0; c < chunks; ++c) {
        const float* sums = chunk_sums(query_head, c);
        sum += std::exp(sums[w] - max) * sums[padded_window_ + w];
      }
      maxima[w] = max;
      inverse_sums[w] = 1 / sum;
    }
  }

  /// Where a row's candidates lie before pooling: a row of a q head if those are pooled, else of a
  /// kv head.
  float* reduced(int64_t row) const {
    return workspace_ + num_sums_ + num_joined_ + row * padded_length_;
  }

  void reduce_window(int64_t row, int64_t chunk) const {
    const int64_t b = row / num_kv_heads_, h = row % num_kv_heads_;
    const int64_t num_keys = std::min(kChunk, num_candidates(b) - chunk * kChunk);
    if (num_keys <= 0) return;
    float scores[kChunk];
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t query_head = b * num_heads_ + h * group_ + g;
      float* own = reduced(pools_heads_ ? query_head : row) + chunk * kChunk;
      ScoreSpan keys = span(query_head, chunk, num_keys);
      keys.max = joined_sums(query_head);
      keys.sum = keys.max + padded_window_;
      keys.scores = scores;
      kernels().score_window[static_cast<int>(args_.keys.dtype)](keys);
      if (pools_heads_ || g == 0) {
        std::copy_n(scores, num_keys, own);
      } else {
        reduce_into(own, scores, num_keys, args_.group_reduce);
      }
    }
    if (!pools_heads_)
      finish_reduce(reduced(row) + chunk * kChunk, num_keys, args_.group_reduce, group_);
  }

  void pool(int64_t row) const {
    const int64_t b = row / num_kv_heads_, h = row % num_kv_heads_;
    const int64_t n = num_candidates(b);
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
  const int64_t num_chunks_, padded_window_, padded_length_;
  const bool pools_heads_;
  const int64_t num_sums_;     // [B, Hq, chunks, 2, padded W]
  const int64_t num_joined_;   // [B, Hq, 2, padded W]
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
