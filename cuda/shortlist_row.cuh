// How shortlist.cu chooses from a row whose bounds are there, by one block.
#pragma once

#include "common/async_copy.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "ops/listing.h"

namespace adakv {

constexpr int kQueries = 4;  // that are worked on side by side
constexpr int kFour = 4;     // pages of a thread, one beside the other
constexpr int kBins = 256;   // that keys are counted in
constexpr int kFirstShift = 20;
constexpr uint32_t kHighestKey = 0x3f8fffff;  // weights are at most 1, with some rounding

struct ShortlistParams {
  const void* queries;         // [B, Hq, S, D]
  const void* bounds;          // [N, 2 D]
  const int32_t* lengths;      // [B, Hkv]
  const int32_t* block_table;  // [B, Hkv, M]
  const int32_t* num_new;      // [B] or null
  int32_t* listed;             // [B, Hkv, X]
  int32_t* listed_lengths;     // [B, Hkv]
  float* z;                    // [B * Hkv, G * S, z_width]; query g * S + s
  uint32_t* keys;              // [B * Hkv, z_width]
  int64_t query_stride[3], bounds_stride, lengths_stride[2], table_stride[2], listed_stride[2],
      listed_lengths_stride[2];
  int32_t heads, group, tokens, dim, width;  // width: M
  int32_t z_width;                           // that, up to a multiple of kFour
  int32_t pages_per_block;                   // of the first launch, 0 if there is none
  float scale, softcap, mass;
  bool prefetches;  // the first bounds are read before the previous kernel has ended
  listing::Rule rule;

  __device__ int32_t length(int32_t b, int32_t h) const {
    return __ldcg(lengths + b * lengths_stride[0] + h * lengths_stride[1]);
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

// What one row's block chooses by. Threads take four pages each, as many such chunks as there are;
// what is known of the first chunk's is held in registers. Most rows have one, for which less code
// is fetched; kIsLong: some may have more.
template <int kThreads, bool kIsLong>
class RowChooser {
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kChunkPages = kThreads * kFour;

  // The keys up to which all get in, and of those from `low` to `high` the best or first ones.
  struct Range {
    uint32_t low, high;
    int32_t wanted, count;  // of those in it: that are still to be found, that there are
  };

  struct Pages {
    float x[kQueries][kFour];  // z of some queries, then its exponential
    uint32_t keys[kFour];
  };

 public:
  struct Shared {
    int32_t bins[kBins];  // of the highest keys first; 0 between searches
    float of_warps[kQueries][kWarps];
    int32_t scratch[kWarps + 1];
    Range range;
  };

  __device__ RowChooser(const ShortlistParams& p, int32_t r, Shared& shared)
      : p_(p),
        shared_(shared),
        b_(r / p.heads),
        h_(r % p.heads),
        row_(p.row(b_, h_)),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        num_queries_(p.group * p.tokens),
        table_(p.table(b_, h_)),
        z_(p.z + int64_t(r) * num_queries_ * p.z_width),
        keys_(p.keys + int64_t(r) * p.z_width) {}

  /// Before what the first launch writes is there, and behind it.
  __device__ void prepare() {
    const int32_t first = threadIdx.x * kFour;
#pragma unroll
    for (int j = 0; j < kFour; ++j) held_ids_[j] = first + j < p_.width ? table_[first + j] : 0;
    for (int32_t i = threadIdx.x; i < kBins; i += kThreads) shared_.bins[i] = 0;
  }
  __device__ void run() {
    const bool lists_all = p_.lists_all(row_);
    Range range = {1, kHighestKey, row_.older, row_.older};
    if (!lists_all) {
      range.wanted = range.count = 0;
      if (row_.wanted > 0) {
        make_keys();
        range = search();
      }
    }
    write(lists_all, range);
  }

 private:
  /// Visits this thread's older pages, four by four: visit(first page, what is known of them).
  template <bool kChanges, typename Visit>
  __device__ void for_each(int32_t first_query, const Visit& visit) {
    const int32_t first = static_cast<int32_t>(threadIdx.x) * kFour;
    visit(first, held_);
    if constexpr (kIsLong) {
#pragma unroll 1
      for (int32_t page = first + kChunkPages; page < row_.older; page += kChunkPages) {
        Pages pages;
        load_keys(page, pages);
        load_queries(first_query, page, pages);
        visit(page, pages);
        if (kChanges) store(first_query, page, pages);
      }
    }
  }

  __device__ void store(int32_t first_query, int32_t page, const Pages& pages) const {
    *reinterpret_cast<uint4*>(keys_ + page) =
        make_uint4(pages.keys[0], pages.keys[1], pages.keys[2], pages.keys[3]);
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      if (first_query + i >= num_queries_) break;
      *z_of(first_query + i, page) =
          make_float4(pages.x[i][0], pages.x[i][1], pages.x[i][2], pages.x[i][3]);
    }
  }

  /// The keys of this thread's pages of a chunk.
  __device__ void load_keys(int32_t page, Pages& pages) const {
    const uint4 keys = *reinterpret_cast<const uint4*>(keys_ + page);
    pages.keys[0] = keys.x;
    pages.keys[1] = keys.y;
    pages.keys[2] = keys.z;
    pages.keys[3] = keys.w;
  }

  __device__ float4* z_of(int32_t query, int32_t page) const {
    return reinterpret_cast<float4*>(z_ + int64_t(query) * p_.z_width + page);
  }

  /// -inf behind the last of the older pages, and of the last query.
  __device__ void load_queries(int32_t first_query, int32_t page, Pages& pages) const {
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const bool is_there = page < row_.older && first_query + i < num_queries_;
      const float4 z = is_there ? *z_of(first_query + i, page) : float4{};
      const float of_pages[kFour] = {z.x, z.y, z.z, z.w};
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        pages.x[i][j] = is_there && page + j < row_.older ? of_pages[j] : -INFINITY;
      }
    }
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
      x[i] = shared_.of_warps[i][lane_ % kWarps];
#pragma unroll
      for (int step = kWarps / 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(kFullWarp, x[i], step);
        x[i] = kIsMax ? fmaxf(x[i], other) : x[i] + other;
      }
    }
    __syncthreads();
  }

  /// Keys of all older pages: higher for more worth, 0 for those that aren't listed.
  __device__ void make_keys() {
#pragma unroll
    for (uint32_t& key : held_.keys) key = 0;
    if constexpr (kIsLong) {
      for (int32_t page = threadIdx.x + kChunkPages; page < p_.z_width; page += kThreads) {
        keys_[page] = 0;
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int32_t first = 0; first < num_queries_; first += kQueries) weigh(first);
  }

  /// Raises the keys of pages to what some queries give them.
  __device__ void weigh(int32_t first) {
    bool counts[kQueries];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const int32_t query = first + i, token = query % p_.tokens;
      counts[i] = query < num_queries_ &&
                  (!p_.num_new || token >= p_.tokens - p_.num_new[b_]);  // else padding
    }
    load_queries(first, threadIdx.x * kFour, held_);
    float largest[kQueries], share[kQueries] = {}, least[kQueries] = {};
#pragma unroll
    for (float& x : largest) x = -INFINITY;
    for_each<false>(first, [&](int32_t, const Pages& pages) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
#pragma unroll
        for (const float x : pages.x[i]) largest[i] = fmaxf(largest[i], x);
      }
    });
    reduce<true>(largest);
#pragma unroll
    for (float& x : largest) x = x == -INFINITY ? 0 : x;
    for_each<true>(first, [&](int32_t, Pages& pages) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
#pragma unroll
        for (float& x : pages.x[i]) share[i] += x = expf(x - largest[i]);
      }
    });
    reduce<false>(share);
#pragma unroll
    for (float& x : share) x = x > 0 ? 1 / x : 0;  // of the sum
    if (p_.mass < 1) find_least(first, share, least);
    for_each<true>(first, [&](int32_t page, Pages& pages) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
          const float mine = weight(pages.x[i][j], share[i]);
          const bool raises = counts[i] && page + j < row_.older && mine >= least[i];
          if (raises) pages.keys[j] = max(pages.keys[j], __float_as_uint(mine) + 1);
        }
      }
    });
  }

  /// Nothing for what isn't there.
  __device__ static float weight(float x, float share) { return x > 0 ? x * share : 0.f; }

  /// The least weights that count: bisected between 0 and the largest.
  __device__ void find_least(int32_t first,
                             const float (&share)[kQueries],
                             float (&least)[kQueries]) {
    float high[kQueries], all[kQueries] = {};
#pragma unroll
    for (int i = 0; i < kQueries; ++i) high[i] = share[i];
    for_each<false>(first, [&](int32_t, const Pages& pages) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
#pragma unroll
        for (const float x : pages.x[i]) all[i] += weight(x, share[i]);
      }
    });
    reduce<false>(all);
#pragma unroll 1
    for (int round = 0; round < listing::kBisections; ++round) {
      float above[kQueries] = {};
      for_each<false>(first, [&](int32_t, const Pages& pages) {
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
#pragma unroll
          for (const float x : pages.x[i]) {
            const float mine = weight(x, share[i]);
            above[i] += mine >= (least[i] + high[i]) / 2 ? mine : 0;
          }
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

  /// The range of keys that the last wanted page is in: all of it gets in, or all have one key.
  __device__ Range search() {
    Range range = {1, kHighestKey, row_.wanted, 0};
    int shift = kFirstShift;
    while (true) {
      const auto count = [&](const uint32_t(&keys)[kFour]) {
#pragma unroll
        for (const uint32_t key : keys) {
          if (key < range.low || key > range.high) continue;
          atomicAdd(&shared_.bins[min((range.high - key) >> shift, kBins - 1)], 1);
        }
      };
      count(held_.keys);
      if constexpr (kIsLong) {
        const int32_t first = static_cast<int32_t>(threadIdx.x) * kFour;
        for (int32_t page = first + kChunkPages; page < row_.older; page += kChunkPages) {
          Pages pages;
          load_keys(page, pages);
          count(pages.keys);
        }
      }
      __syncthreads();
      if (warp_ == 0) find_bin(range, shift);
      __syncthreads();
      range = shared_.range;
      if (range.wanted == range.count || range.low == range.high) return range;
      shift = max(32 - __clz(range.high - range.low) - 8, 0);
    }
  }

  /// The bin in which the last wanted page is; a warp.
  __device__ void find_bin(const Range& range, int shift) const {
    constexpr int kPerLane = kBins / kWarpSize;
    int32_t bins[kPerLane], mine = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      bins[i] = shared_.bins[lane_ * kPerLane + i];
      shared_.bins[lane_ * kPerLane + i] = 0;
      mine += bins[i];
    }
    const int32_t up_to = warp_inclusive_sum(mine), all = __shfl_sync(kFullWarp, up_to, 31);
    if (all < range.wanted) {  // few pages count
      if (lane_ == 0) shared_.range = {range.low, range.high, all, all};
      return;
    }
    int32_t before = up_to - mine;
    if (before >= range.wanted || up_to < range.wanted) return;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (before < range.wanted && before + bins[i] >= range.wanted) {
        const uint32_t bin = lane_ * kPerLane + i, high = range.high - (bin << shift);
        const uint32_t width = 1u << shift;
        const bool is_open = bin == kBins - 1 || high - range.low < width;
        shared_.range = {is_open ? range.low : high - width + 1, high, range.wanted - before,
                         bins[i]};
      }
      before += bins[i];
    }
  }

  /// The pages above a range, and those in it, or the first ones that are wanted.
  __device__ void write(bool lists_all, const Range& range) {
    int32_t* listed = p_.listed + b_ * p_.listed_stride[0] + h_ * p_.listed_stride[1];
    const int32_t thread = threadIdx.x;
    int32_t num_above = 0, num_equal = 0;  // of the pages before
    const int32_t end = lists_all || row_.wanted > 0 ? row_.older : 0;
#pragma unroll 1
    for (int32_t begin = 0; begin < end; begin += kChunkPages) {
      const int32_t first = begin + thread * kFour;
      Pages pages = held_;
      if (kIsLong && begin > 0 && first < row_.older && !lists_all) load_keys(first, pages);
      int32_t mine = 0, before = 0;  // pages above and in the range, in 16 bits each
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        uint32_t& key = pages.keys[j];
        if (first + j >= row_.older) {
          key = 0;
        } else if (lists_all) {
          key = 1;
        }
        mine += key > range.high ? 1 << 16 : key >= range.low;
      }
      const int32_t all = block_exclusive_sum<kThreads>(
          kThreads, [&](int32_t) { return mine; }, [&](int32_t, int32_t sum) { before = sum; },
          shared_.scratch);
      int32_t above = num_above + (before >> 16), equal = num_equal + (before & 0xffff);
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        const uint32_t key = pages.keys[j];
        const bool is_above = key > range.high, is_equal = !is_above && key >= range.low;
        if (is_above || (is_equal && equal < range.wanted)) {
          listed[above + min(equal, range.wanted)] = begin == 0 ? held_ids_[j] : table_[first + j];
        }
        above += is_above;
        equal += is_equal;
      }
      num_above += all >> 16;
      num_equal += all & 0xffff;
    }
    const int32_t count = num_above + min(num_equal, range.wanted);
    const int32_t newest = row_.total - row_.older;
    for (int32_t i = thread; i < p_.rule.most - count; i += kThreads) {
      listed[count + i] = i < newest ? table_[row_.older + i] : -1;
    }
    if (thread == 0) {
      p_.listed_lengths[b_ * p_.listed_lengths_stride[0] + h_ * p_.listed_lengths_stride[1]] =
          p_.length(b_, h_) - (row_.older - count) * p_.rule.page_size;
    }
  }

  const ShortlistParams& p_;
  Shared& shared_;
  const int32_t b_, h_;
  const listing::Row row_;
  const int32_t warp_, lane_, num_queries_;
  const int32_t* table_;
  float* z_;
  uint32_t* keys_;
  Pages held_;  // of the first chunk; others are in memory
  int32_t held_ids_[kFour];
};

}  // namespace adakv
