// Budgets from one top-k over the heads of a layer; see ops.h for the formulas. A sequence at a
// time:
//   1. find the key of the last of the Hkv * b best candidates        (top_k.h)
//   2. f[h] = candidates of head h above it, and those equal to it that come first
//   3. blend f with the even split by the safeguard                   (ops/budgets.h)
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/cpu_backend.h"
#include "cpu/parallel.h"
#include "cpu/top_k.h"
#include "ops/budgets.h"
#include "ops/order_key.h"

namespace adakv {
namespace {

using top_k::Cutoff;

// Positions of the entries of a head that equal the cutoff and may still get in, ascending.
struct Tied {
  const int32_t* begin;
  const int32_t* end;
};

// Lets `rest` of the tied entries in, in the order of position, then head.
void hand_out_ties(const std::vector<Tied>& ties, int32_t length, int64_t rest, int32_t* counts) {
  const int heads = static_cast<int>(ties.size());
  const auto before = [&](int h, int32_t position) {
    return std::lower_bound(ties[h].begin, ties[h].end, position) - ties[h].begin;
  };
  int32_t low = 0, high = length;  // the last position before which at most `rest` ties lie
  while (low < high) {
    const int32_t middle = low + (high - low + 1) / 2;
    int64_t total = 0;
    for (int h = 0; h < heads; ++h) total += before(h, middle);
    if (total <= rest) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  for (int h = 0; h < heads; ++h) {
    counts[h] += static_cast<int32_t>(before(h, low));
    rest -= before(h, low);
  }
  for (int h = 0; h < heads && rest > 0; ++h) {
    const int64_t here = before(h, low + 1) - before(h, low);  // 0 or 1
    counts[h] += static_cast<int32_t>(here);
    rest -= here;
  }
}

// counts[h]: how many of the k best of [heads, length] lie in head h, where each head counts with
// its own best `own` at least.
template <typename Fill>
void count_best(
    int heads, int32_t length, int32_t own, int64_t k, const Fill& fill, int32_t* counts) {
  std::fill(counts, counts + heads, 0);
  if (k == 0) return;
  const Cutoff cutoff = top_k::find_cutoff(heads, length, own, k, fill);
  std::vector<Tied> ties(heads);
  int64_t rest = k;
  for (int h = 0; h < heads; ++h) {
    const std::vector<int32_t>& tied = cutoff.ties[h];
    counts[h] = std::max(own, cutoff.above[h]);
    rest -= counts[h];
    const size_t owned = std::min<size_t>(counts[h] - cutoff.above[h], tied.size());
    ties[h] = {tied.data() + owned, tied.data() + tied.size()};
  }
  hand_out_ties(ties, length, rest, counts);
}

// counts[h] = (1 - floor) * counts[h] + floor * mean, rounded so that the sum is heads * mean.
void blend(int heads, double floor, int64_t mean, int32_t* counts) {
  std::vector<int64_t> shares(heads);
  int64_t left = heads * mean;
  for (int h = 0; h < heads; ++h) {
    shares[h] = share_nanos(floor, counts[h], floor * static_cast<double>(mean));
    counts[h] = static_cast<int32_t>(shares[h] / kNano);
    left -= counts[h];
    shares[h] %= kNano;
  }
  std::vector<int> order(heads);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return rounds_up_before(shares[a], a, shares[b], b); });
  for (int64_t i = 0; i < left; ++i) ++counts[order[i]];
}

}  // namespace

void CpuBackend::allocate(const AllocateArgs& args) {
  const TensorView& scores = args.scores;  // [B, Hkv, T]
  const int heads = static_cast<int>(scores.shape[1]);
  const int32_t mean = args.budget - args.window;
  parallel_for(scores.shape[0], [&](int64_t b) {
    const int32_t seq_len =
        args.seq_lens ? args.seq_lens.ptr<int32_t>()[b] : static_cast<int32_t>(scores.shape[2]);
    const int32_t length = seq_len - args.window;  // candidates of a head
    int32_t* budgets = args.budgets.ptr<int32_t>() + b * args.budgets.stride[0];
    if (length <= 0 || length <= mean) {
      std::fill(budgets, budgets + heads, seq_len);
      return;
    }
    const float* sequence = scores.ptr<float>() + b * scores.stride[0];
    const auto fill = [&](int head, int32_t begin, int32_t count, uint32_t* keys) {
      const float* row = sequence + head * scores.stride[1] + begin;
      for (int32_t i = 0; i < count; ++i) keys[i] = order_key(row[i]);
    };
    const int64_t own = whole_floor(args.floor, mean);
    const bool hard = args.safeguard == Safeguard::kHardFloor;
    count_best(heads, length, static_cast<int32_t>(hard ? own : 0),
               static_cast<int64_t>(heads) * mean, fill, budgets);
    if (args.safeguard == Safeguard::kBlend) {
      blend(heads, args.floor, mean, budgets);
    } else if (args.safeguard == Safeguard::kOfficialRound) {
      for (int h = 0; h < heads; ++h) {
        const int64_t nanos = share_nanos(args.floor, budgets[h], static_cast<double>(own));
        budgets[h] = static_cast<int32_t>(round_half_even(nanos));
      }
    }
    for (int h = 0; h < heads; ++h) budgets[h] += args.window;
  });
}

size_t CpuBackend::workspace_bytes(const AllocateArgs&) const {
  return 0;
}

}  // namespace adakv
