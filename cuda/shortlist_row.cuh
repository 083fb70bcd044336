// How shortlist.cu chooses from a row whose bounds are there, by one block.
#pragma once

#include "common/reduce.cuh"
#include "ops/listing.h"

namespace adakv {

constexpr int kQueries = 4;    // that are worked on side by side
constexpr int kThreads = 256;  // that choose for a row
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kHeld = 4;  // keys that a thread has in registers
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;

struct ShortlistParams {
  const void* queries;         // [B, Hq, S, D]
  const void* bounds;          // [N, 2 D]
  const int32_t* lengths;      // [B, Hkv]
  const int32_t* block_table;  // [B, Hkv, M]
  const int32_t* num_new;      // [B] or null
  int32_t* listed;             // [B, Hkv, X]
  int32_t* listed_lengths;     // [B, Hkv]
  float* z;                    // [B * Hkv, G * S, M]; query g * S + s
  uint32_t* keys;              // [B * Hkv, M]
  int64_t query_stride[3], bounds_stride, lengths_stride[2], table_stride[2], listed_stride[2],
      listed_lengths_stride[2];
  int32_t heads, group, tokens, dim, width;  // width: M
  int32_t pages_per_block;                   // of the first launch
  float scale, softcap, mass;
  listing::Rule rule;

  __device__ int32_t length(int32_t b, int32_t h) const {
    return lengths[b * lengths_stride[0] + h * lengths_stride[1]];
  }
  __device__ const int32_t* table(int32_t b, int32_t h) const {
    return block_table + b * table_stride[0] + h * table_stride[1];
  }
  /// Pages of a row, of which a longer one than its table has only those that are there.
  __device__ listing::Row row(int32_t b, int32_t h) const {
    const int64_t most = int64_t{width} * rule.page_size;
    return rule.of(static_cast<int32_t>(min(int64_t{length(b, h)}, most)));
  }
  /// Whether all older pages are listed, whatever their bounds are.
  __device__ bool lists_all(const listing::Row& row) const {
    return row.wanted >= row.older && mass == 1.f;
  }
};

// What one row's block chooses by.
class RowChooser {
 public:
  struct Shared {
    int32_t histogram[kBins];
    int32_t before[2][kWarps];  // pages of the warps: above the last key, equal to it
    float of_warps[kQueries][kWarps];
    uint32_t prefix;  // digits of the last key that gets in
    int32_t wanted;   // pages that are still to be found, of those with this prefix
  };

  __device__ RowChooser(const ShortlistParams& p, int32_t r, Shared& shared)
      : p_(p),
        shared_(shared),
        r_(r),
        b_(r / p.heads),
        h_(r % p.heads),
        row_(p.row(b_, h_)),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        num_queries_(p.group * p.tokens),
        z_(p.z + int64_t(r) * num_queries_ * p.width),
        keys_(p.keys + int64_t(r) * p.width) {}

  __device__ void run() {
    int32_t count = row_.older;
    uint32_t last = 0;
    int32_t equal = 0;  // pages with the key `last` that get in, the first ones
    if (!p_.lists_all(row_)) {
      const int32_t eligible = row_.wanted > 0 ? make_keys() : 0;
      count = min(row_.wanted, eligible);
      if (count == eligible) {
        last = 1;
        equal = count;
      } else {
        last = find_last(count, equal);
      }
    }
    write(count, last, equal);
  }

 private:
  /// Visits this thread's older pages, with the keys that they have: visit(page, key).
  template <typename Visit>
  __device__ void for_each_page(const Visit& visit) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kThreads + thread < row_.older) visit(i * kThreads + thread, held_[i]);
    }
    for (int32_t page = kHeld * kThreads + thread; page < row_.older; page += kThreads) {
      visit(page, keys_[page]);
    }
  }

  /// The key of this thread's page number i.
  __device__ uint32_t key_of(int32_t i, int32_t page) const {
    uint32_t key = i < kHeld ? 0 : keys_[page];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) key = i == k ? held_[k] : key;
    return key;
  }

  /// The maxima, or the sums, of some numbers over the block, in a fixed order.
  template <bool kIsMax>
  __device__ void reduce(float (&x)[kQueries]) const {
#pragma unroll
    for (float& mine : x) mine = kIsMax ? warp_max(mine) : warp_sum(mine);
    if (lane_ == 0) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) shared_.of_warps[i][warp_] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const float other = lane_ < kWarps ? shared_.of_warps[i][lane_] : kIsMax ? -INFINITY : 0.f;
      x[i] = kIsMax ? warp_max(other) : warp_sum(other);
    }
    __syncthreads();
  }

  /// Keys of all older pages: higher for more worth, 0 for those that aren't listed. Gives the number of
  /// the others.
  __device__ int32_t make_keys() {
    for_each_page([](int32_t, uint32_t& key) { key = 0; });
    for (int32_t first = 0; first < num_queries_; first += kQueries) weigh(first);
    int32_t mine = 0;
    for_each_page([&](int32_t, uint32_t& key) { mine += key != 0; });
    mine = warp_sum(mine);
    if (lane_ == 0) shared_.before[0][warp_] = mine;
    __syncthreads();
    const int32_t eligible = warp_sum(lane_ < kWarps ? shared_.before[0][lane_] : 0);
    __syncthreads();
    return eligible;
  }

  /// Raises the keys of pages to what some queries give them.
  __device__ void weigh(int32_t first) {
    const float* z[kQueries];
    bool counts[kQueries];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const int32_t query = first + i, token = query % p_.tokens;
      counts[i] = query < num_queries_ &&
                  (!p_.num_new || token >= p_.tokens - p_.num_new[b_]);  // else padding
      z[i] = z_ + int64_t(min(query, num_queries_ - 1)) * p_.width;
    }
    float largest[kQueries], sum[kQueries] = {}, least[kQueries] = {};
#pragma unroll
    for (float& x : largest) x = -INFINITY;
    for_each_page([&](int32_t page, uint32_t) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) largest[i] = fmaxf(largest[i], z[i][page]);
    });
    reduce<true>(largest);
#pragma unroll
    for (float& x : largest) x = x == -INFINITY ? 0 : x;
    for_each_page([&](int32_t page, uint32_t) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) sum[i] += expf(z[i][page] - largest[i]);
    });
    reduce<false>(sum);
    const auto weight = [&](int i, int32_t page) {
      return sum[i] > 0 ? expf(z[i][page] - largest[i]) / sum[i] : 0.f;
    };
    if (p_.mass < 1) find_least(weight, sum, least);
    for_each_page([&](int32_t page, uint32_t& key) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const float mine = weight(i, page);
        if (counts[i] && mine >= least[i]) key = max(key, __float_as_uint(mine) + 1);
      }
    });
  }

  /// The least weights that count: bisected between 0 and the largest.
  template <typename Weight>
  __device__ void find_least(const Weight& weight,
                             const float (&sum)[kQueries],
                             float (&least)[kQueries]) {
    float high[kQueries], all[kQueries] = {};
#pragma unroll
    for (int i = 0; i < kQueries; ++i) high[i] = sum[i] > 0 ? 1 / sum[i] : 0;
    for_each_page([&](int32_t page, uint32_t) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) all[i] += weight(i, page);
    });
    reduce<false>(all);
    for (int round = 0; round < listing::kBisections; ++round) {
      float above[kQueries] = {};
      for_each_page([&](int32_t page, uint32_t) {
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
          const float mine = weight(i, page);
          above[i] += mine >= (least[i] + high[i]) / 2 ? mine : 0;
        }
      });
      reduce<false>(above);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const float middle = (least[i] + high[i]) / 2;
        (above[i] >= p_.mass * all[i] ? least[i] : high[i]) = middle;
      }
    }
  }

  /// The key of the last of `count` pages that get in, and how many of those with this key do.
  __device__ uint32_t find_last(int32_t count, int32_t& equal) {
    if (threadIdx.x == 0) {
      shared_.prefix = 0;
      shared_.wanted = count;
    }
    for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
      for (int32_t i = threadIdx.x; i < kBins; i += kThreads) shared_.histogram[i] = 0;
      __syncthreads();
      const uint32_t prefix = shared_.prefix;
      const uint32_t above = shift + kDigitBits < 32 ? ~0u << (shift + kDigitBits) : 0;
      for_each_page([&](int32_t, uint32_t key) {
        if (key == 0 || (key & above) != prefix) return;
        const uint32_t digit = key >> shift & (kBins - 1);
        atomicAdd(&shared_.histogram[digit], 1);
      });
      __syncthreads();
      if (warp_ == 0) find_digit(shift);
      __syncthreads();
    }
    equal = shared_.wanted;
    return shared_.prefix;
  }

  /// The bin in which the last wanted page is, from the top; a warp.
  __device__ void find_digit(int shift) const {
    constexpr int kPerLane = kBins / kWarpSize;
    // Lane 0 has the highest bins.
    const int32_t highest = kBins - 1 - lane_ * kPerLane;
    int32_t mine = 0;
    for (int i = 0; i < kPerLane; ++i) mine += shared_.histogram[highest - i];
    int32_t before = warp_inclusive_sum(mine) - mine;
    const int32_t wanted = shared_.wanted;
    __syncwarp();
    if (before >= wanted || before + mine < wanted) return;
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t in_bin = shared_.histogram[highest - i];
      if (before + in_bin >= wanted) {
        shared_.prefix |= static_cast<uint32_t>(highest - i) << shift;
        shared_.wanted = wanted - before;
        return;
      }
      before += in_bin;
    }
  }

  /// The pages above `last`, and the first `equal` of those that have it; or all, if `last` is 0.
  __device__ void write(int32_t count, uint32_t last, int32_t equal) {
    const int32_t* table = p_.table(b_, h_);
    int32_t* listed = p_.listed + b_ * p_.listed_stride[0] + h_ * p_.listed_stride[1];
    const uint32_t lower_lanes = (1u << lane_) - 1;
    int32_t num_above = 0, num_equal = 0;  // of the pages before
    for (int32_t begin = 0; begin < row_.older && count > 0; begin += kThreads) {
      const int32_t page = begin + static_cast<int32_t>(threadIdx.x);
      const uint32_t key = page >= row_.older ? 0 : last == 0 ? 1 : key_of(begin / kThreads, page);
      const bool is_above = key > last, is_equal = key == last && key != 0;
      const uint32_t above = __ballot_sync(kFullWarp, is_above);
      const uint32_t ties = __ballot_sync(kFullWarp, is_equal);
      if (lane_ == 0) {
        shared_.before[0][warp_] = __popc(above);
        shared_.before[1][warp_] = __popc(ties);
      }
      __syncthreads();
      int32_t all_above = 0, all_ties = 0, above_before = num_above, ties_before = num_equal;
      for (int i = 0; i < kWarps; ++i) {
        const int32_t of_above = shared_.before[0][i], of_ties = shared_.before[1][i];
        if (i < warp_) {
          above_before += of_above;
          ties_before += of_ties;
        }
        all_above += of_above;
        all_ties += of_ties;
      }
      above_before += __popc(above & lower_lanes);
      ties_before += __popc(ties & lower_lanes);
      if (is_above || (is_equal && ties_before < equal)) {
        listed[above_before + min(ties_before, equal)] = table[page];
      }
      num_above += all_above;
      num_equal += all_ties;
      __syncthreads();
    }
    const int32_t newest = row_.total - row_.older;
    for (int32_t i = threadIdx.x; i < p_.rule.most - count; i += kThreads) {
      listed[count + i] = i < newest ? table[row_.older + i] : -1;
    }
    if (threadIdx.x == 0) {
      p_.listed_lengths[b_ * p_.listed_lengths_stride[0] + h_ * p_.listed_lengths_stride[1]] =
          p_.length(b_, h_) - (row_.older - count) * p_.rule.page_size;
    }
  }

  const ShortlistParams& p_;
  Shared& shared_;
  const int32_t r_, b_, h_;
  const listing::Row row_;
  const int32_t warp_, lane_, num_queries_;
  const float* z_;
  uint32_t* keys_;
  uint32_t held_[kHeld];  // keys of this thread's first pages; others are in memory
};

}  // namespace adakv
