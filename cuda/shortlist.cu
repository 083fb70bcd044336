// Pages of each row that a step reads; see ops.h. Two launches:
//   1. z of every query and page: the bounds of all pages are read once, and that is most of the time
//   2. a block for each row: what the softmax of each query needs, the most weight that any query
//      gives to a page, the key of the last page that gets in (digit by digit, from histograms), and
//      the pages themselves, ascending
#include "ops/listing.h"

#include <cfloat>

#include "common/check.cuh"
#include "common/device_guard.h"
#include "common/dispatch.cuh"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "cuda_backend.h"

namespace adakv {
namespace {

constexpr int kChunk = 8;    // elements that a lane loads at once
constexpr int kQueries = 4;  // that lanes multiply a page with
constexpr int kPages = 4;    // that lanes have under way
constexpr int kProductThreads = 256;
constexpr int kLeastPages = 64, kMostPages = 256;  // of a block, of them
constexpr int kThreads = 256;                      // that choose for a row
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

// kChunk elements as they are in memory.
template <typename Element>
struct Piece {
  static constexpr int kFours = kChunk * sizeof(Element) / sizeof(uint4);
  uint4 fours[kFours];

  __device__ void load(const Element* from) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) fours[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
  __device__ float operator[](int i) const {
    return to_float(reinterpret_cast<const Element*>(fours)[i]);
  }
};

// Sums over kLanes lanes of 16 numbers of each: lane i gets the sum of number i * 16 / kLanes. Each step
// halves what a lane still has, so that 16 sums take as many exchanges.
template <int kLanes>
__device__ float sum_sixteen(float (&x)[16]) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int half = 8, step = kLanes / 2; half > 0; half /= 2, step /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool takes_upper = lane & step;
      const float mine = takes_upper ? x[i + half] : x[i];
      const float other = takes_upper ? x[i] : x[i + half];
      x[i] = mine + __shfl_xor_sync(kFullWarp, other, step);
    }
  }
  if (kLanes == kWarpSize) x[0] += __shfl_xor_sync(kFullWarp, x[0], 1);
  return x[0];
}

// grid: [B * Hkv, ceil(M / pages_per_block), ceil(G * S / kQueries)]; kLanes lanes share a page, kChunks
// pieces of it each, and have kPages of them under way.
template <typename Element, int kLanes, int kChunks>
__global__ void __launch_bounds__(kProductThreads)
    bound_products_kernel(const __grid_constant__ ShortlistParams p) {
  static_assert(kPages * kQueries == 16, "sum_sixteen");
  const int32_t r = blockIdx.x, b = r / p.heads, h = r % p.heads;
  const listing::Row row = p.row(b, h);
  const int32_t first_page = blockIdx.y * p.pages_per_block;
  if (first_page >= row.older || row.wanted == 0 || p.lists_all(row)) return;
  const int32_t lane = threadIdx.x % kLanes, chunks = 2 * p.dim / kChunk;
  const int32_t num_queries = p.group * p.tokens, first_query = blockIdx.z * kQueries;
  float q[kChunks][kQueries][kChunk];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int32_t chunk = lane + c * kLanes;
    const bool is_largest = chunk < chunks / 2;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const int32_t query = min(first_query + i, num_queries - 1);
      const Element* from = static_cast<const Element*>(p.queries) + b * p.query_stride[0] +
                            (h * p.group + query / p.tokens) * p.query_stride[1] +
                            query % p.tokens * p.query_stride[2] +
                            (is_largest ? chunk : chunk - chunks / 2) * kChunk;
#pragma unroll
      for (int d = 0; d < kChunk; ++d) {
        const float x = chunk < chunks ? to_float(from[d]) : 0;
        q[c][i][d] = is_largest ? fmaxf(x, 0.f) : fminf(x, 0.f);
      }
    }
  }

  const int32_t* table = p.table(b, h);
  const int32_t end = min(first_page + p.pages_per_block, row.older);
  constexpr int kPerRound = kProductThreads / kLanes;  // pages between two of a group of lanes
  Piece<Element> pieces[kPages][kChunks];
  // What is behind the last page is the last one once more; what is behind a page's last chunk its
  // first, times 0.
  const auto load = [&](int32_t begin) {
#pragma unroll
    for (int k = 0; k < kPages; ++k) {
      const int32_t page = table[min(begin + k * kPerRound, end - 1)];
      const auto* bounds = static_cast<const Element*>(p.bounds) + page * p.bounds_stride;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int32_t chunk = lane + c * kLanes;
        pieces[k][c].load(bounds + (chunk < chunks ? chunk : 0) * kChunk);
      }
    }
  };
  const int32_t mine = threadIdx.x / kLanes;
  load(first_page + mine);
  // All lanes of a warp take part in every round.
  for (int32_t round = first_page; round < end; round += kPages * kPerRound) {
    const int32_t begin = round + mine;
    float sums[16] = {};  // page * kQueries + query
#pragma unroll
    for (int k = 0; k < kPages; ++k) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const bool is_there = lane + c * kLanes < chunks;
#pragma unroll
        for (int d = 0; d < kChunk; ++d) {
          const float x = is_there ? pieces[k][c][d] : 0;
#pragma unroll
          for (int i = 0; i < kQueries; ++i) sums[k * kQueries + i] += q[c][i][d] * x;
        }
      }
    }
    load(begin + kPages * kPerRound);  // while sums are exchanged
    float z = sum_sixteen<kLanes>(sums) * p.scale;
    if (p.softcap > 0) z = p.softcap * tanhf(z / p.softcap);
    z = z >= -INFINITY ? fminf(z, FLT_MAX) : -INFINITY;  // NaN
    const int32_t number = lane * 16 / kLanes;
    const int32_t page = begin + number / kQueries * kPerRound;
    const int32_t query = first_query + number % kQueries;
    if (lane * 16 % kLanes == 0 && page < end && query < num_queries) {
      p.z[(int64_t(r) * num_queries + query) * p.width + page] = z;
    }
  }
}

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

// grid: [B * Hkv].
__global__ void __launch_bounds__(kThreads)
    shortlist_kernel(const __grid_constant__ ShortlistParams p) {
  __shared__ RowChooser::Shared shared;
  RowChooser(p, blockIdx.x, shared).run();
}

/// Numbers of the workspace, of 4 bytes each.
struct Parts {
  int64_t z, keys;

  explicit Parts(const ShortlistArgs& args) {
    const int64_t rows = args.lengths.shape[0] * args.lengths.shape[1];
    const int64_t queries = args.queries.shape[0] * args.queries.shape[1] * args.queries.shape[2];
    const int64_t width = args.block_table.shape[2];
    z = queries * width;
    keys = rows * width;
  }
};

ShortlistParams params_of(const ShortlistArgs& args) {
  ShortlistParams p = {};
  p.rule = listing::Rule(args);
  p.queries = args.queries.data;
  p.bounds = args.bounds.data;
  p.lengths = args.lengths.ptr<int32_t>();
  p.block_table = args.block_table.ptr<int32_t>();
  p.num_new = args.num_new ? args.num_new.ptr<int32_t>() : nullptr;
  p.listed = args.listed.ptr<int32_t>();
  p.listed_lengths = args.listed_lengths.ptr<int32_t>();
  const Parts parts(args);
  p.z = args.workspace.ptr<float>();
  p.keys = reinterpret_cast<uint32_t*>(p.z + parts.z);
  std::copy_n(args.queries.stride, 3, p.query_stride);
  p.bounds_stride = args.bounds.stride[0];
  std::copy_n(args.lengths.stride, 2, p.lengths_stride);
  std::copy_n(args.block_table.stride, 2, p.table_stride);
  std::copy_n(args.listed.stride, 2, p.listed_stride);
  std::copy_n(args.listed_lengths.stride, 2, p.listed_lengths_stride);
  p.heads = static_cast<int32_t>(args.lengths.shape[1]);
  p.group = static_cast<int32_t>(args.queries.shape[1] / args.lengths.shape[1]);
  p.tokens = static_cast<int32_t>(args.queries.shape[2]);
  p.dim = static_cast<int32_t>(args.queries.shape[3]);
  p.width = static_cast<int32_t>(args.block_table.shape[2]);
  p.scale = args.scale != 0 ? args.scale : 1.f / std::sqrt(static_cast<float>(p.dim));
  p.softcap = args.softcap;
  p.mass = static_cast<float>(args.mass);
  return p;
}

}  // namespace

void CudaBackend::shortlist(const ShortlistArgs& args) {
  const DeviceGuard guard(args.queries.device);
  const uint32_t rows = static_cast<uint32_t>(args.lengths.shape[0] * args.lengths.shape[1]);
  if (rows == 0) return;
  ShortlistParams p = params_of(args);
  cudaStream_t stream = static_cast<cudaStream_t>(args.stream);
  const auto blocks = [](int32_t count, int32_t size) {
    return static_cast<uint32_t>((count + size - 1) / size);
  };
  const uint32_t num_parts = blocks(p.group * p.tokens, kQueries);
  // As many as keep every multiprocessor busy several times.
  const int sms =
      device_attribute("shortlist", args.queries.device.index, cudaDevAttrMultiProcessorCount);
  p.pages_per_block = kMostPages;
  while (p.pages_per_block > kLeastPages &&
         int64_t{rows} * num_parts * blocks(p.width, p.pages_per_block) < 4 * sms) {
    p.pages_per_block /= 2;
  }
  const dim3 grid(rows, blocks(p.width, p.pages_per_block), num_parts);
  if (grid.y > 0 && grid.z > 0) {
    dispatch_dtype(args.queries.dtype, [&](auto element) {
      using Element = typename decltype(element)::type;
      const int32_t chunks = 2 * p.dim / kChunk;
      const auto kernel = chunks <= kWarpSize / 2 ? bound_products_kernel<Element, kWarpSize / 2, 1>
                          : chunks <= kWarpSize   ? bound_products_kernel<Element, kWarpSize, 1>
                                                  : bound_products_kernel<Element, kWarpSize, 2>;
      kernel<<<grid, kProductThreads, 0, stream>>>(p);
    });
    ADAKV_CUDA_CHECK("shortlist", cudaGetLastError());
  }
  shortlist_kernel<<<rows, kThreads, 0, stream>>>(p);
  ADAKV_CUDA_CHECK("shortlist", cudaGetLastError());
}

size_t CudaBackend::workspace_bytes(const ShortlistArgs& args) const {
  const Parts parts(args);
  return static_cast<size_t>(parts.z + parts.keys) * sizeof(float);
}

}  // namespace adakv
