// Positions that each row keeps; see ops.h. A row at a time:
//   1. find the key of the last of the `count` best candidates, and the last position among those
//      equal to it that still gets in                                  (top_k.h)
//   2. write the positions that reach it, ascending, and then the window
// The second stage is step 1 again with keys that rank what stage one took above everything else.
#include <algorithm>
#include <cstdint>

#include "adakv/error.h"
#include "cpu/cpu_backend.h"
#include "cpu/parallel.h"
#include "cpu/top_k.h"
#include "ops/order_key.h"

namespace adakv {
namespace {

constexpr uint32_t kTaken = 0xffffffffu;  // above every score

// What gets in: keys above `key`, and those equal to it at positions up to `last_tie`.
struct Threshold {
  uint32_t key = kTaken;
  int32_t last_tie = -1;

  bool takes(uint32_t k, int32_t position) const { return k > key - (position <= last_tie); }
};

// `fill(list, begin, count, keys)` makes the keys of the candidates, see top_k.h.
template <typename Fill>
Threshold find_threshold(int32_t length, int32_t count, const Fill& fill) {
  if (count == 0) return {};
  const top_k::Cutoff cutoff = top_k::find_cutoff(1, length, 0, count, fill);
  return {cutoff.key, cutoff.ties[0][count - cutoff.above[0] - 1]};
}

// Writes the positions of the `count` best candidates, ascending.
template <typename Fill>
void write_positions(int32_t length, int32_t count, const Fill& fill, int32_t* positions) {
  const Threshold threshold = find_threshold(length, count, fill);
  top_k::for_each_block(0, length, fill, [&](int32_t begin, int32_t n, const uint32_t* keys) {
    int32_t taken[top_k::kBlock], num_taken = 0;
    for (int32_t i = 0; i < n; ++i) {
      taken[num_taken] = begin + i;
      num_taken += threshold.takes(keys[i], begin + i);
    }
    positions = std::copy(taken, taken + num_taken, positions);
  });
}

struct Row {
  const float* scores;  // [length]
  const float* norms;   // [length] or null
  int32_t length;       // candidates
};

void select_candidates(const SelectArgs& args, const Row& row, int32_t count, int32_t* positions) {
  const auto by_score = [&](int, int32_t begin, int32_t n, uint32_t* keys) {
    for (int32_t i = 0; i < n; ++i) keys[i] = order_key(row.scores[begin + i]);
  };
  if (count == row.length) {
    for (int32_t i = 0; i < count; ++i) positions[i] = i;
    return;
  }
  if (!row.norms) {
    write_positions(row.length, count, by_score, positions);
    return;
  }
  const int32_t num_first = static_cast<int32_t>(args.first * count);
  const Threshold first = find_threshold(row.length, num_first, by_score);
  const auto by_both = [&](int, int32_t begin, int32_t n, uint32_t* keys) {
    const float *scores = row.scores + begin, *norms = row.norms + begin, eps = args.eps;
    const Threshold stage_one = {first.key, first.last_tie - begin};
    for (int32_t i = 0; i < n; ++i) {
      const uint32_t key = second_stage_key(scores[i], norms[i], eps);
      keys[i] = stage_one.takes(order_key(scores[i]), i) ? kTaken : key;
    }
  };
  write_positions(row.length, count, by_both, positions);
}

}  // namespace

void CpuBackend::select(const SelectArgs& args) {
  const int64_t batch = args.scores.shape[0], heads = args.scores.shape[1];
  const auto seq_len = [&](int64_t b) {
    return args.seq_lens ? args.seq_lens.ptr<int32_t>()[b]
                         : static_cast<int32_t>(args.scores.shape[2]);
  };
  const auto budget = [&](int64_t r) {
    const int64_t b = r / heads;
    const int32_t asked = args.budgets.ptr<int32_t>()[b * args.budgets.stride[0] + r % heads];
    return std::min(std::max(asked, args.window), seq_len(b));
  };
  int64_t total = 0;
  for (int64_t r = 0; r < batch * heads; ++r) total += budget(r);
  ADAKV_CHECK(total <= args.positions.shape[0],
              "select: positions must hold the sum of the budgets, ", total, ", got room for ",
              args.positions.shape[0]);

  int32_t* indptr = args.indptr.ptr<int32_t>();  // [B * Hkv + 1]
  indptr[0] = 0;
  for (int64_t r = 0; r < batch * heads; ++r) indptr[r + 1] = indptr[r] + budget(r);

  int32_t* positions = args.positions.ptr<int32_t>();  // [K]
  std::fill(positions + total, positions + args.positions.shape[0], -1);
  parallel_for(batch * heads, [&](int64_t r) {
    const int64_t b = r / heads, h = r % heads;
    const auto row_of = [&](const TensorView& x) {
      return x ? x.ptr<float>() + b * x.stride[0] + h * x.stride[1] : nullptr;
    };
    const int32_t length = std::max(seq_len(b) - args.window, 0);
    const int32_t window = seq_len(b) - length, count = indptr[r + 1] - indptr[r] - window;
    int32_t* out = positions + indptr[r];
    select_candidates(args, {row_of(args.scores), row_of(args.norms), length}, count, out);
    for (int32_t i = 0; i < window; ++i) out[count + i] = length + i;
  });
}

size_t CpuBackend::workspace_bytes(const SelectArgs&) const {
  return 0;
}

}  // namespace adakv
