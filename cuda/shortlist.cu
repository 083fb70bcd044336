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
#include "shortlist_row.cuh"

namespace adakv {
namespace {

constexpr int kChunk = 8;  // elements that a lane loads at once
constexpr int kPages = 4;  // that lanes have under way
constexpr int kProductThreads = 256;
constexpr int kLeastPages = 64, kMostPages = 256;  // of a block, of them

// kChunk elements as they are in memory.
template <typename Element>
struct Piece {
  static constexpr int kWords = kChunk * sizeof(Element) / sizeof(uint32_t);
  uint32_t words[kWords];

  __device__ void load(const Element* from) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + i / 4);
      words[i] = four.x;
      words[i + 1] = four.y;
      words[i + 2] = four.z;
      words[i + 3] = four.w;
    }
  }
  __device__ float operator[](int i) const {
    if constexpr (sizeof(Element) == sizeof(float)) return __uint_as_float(words[i]);
    return bits_to_float<Element>(static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)));
  }
};

// Sums of 2 * kHalf numbers over the lanes that are up to 2 * kStep - 1 apart, one for each lane: it keeps
// one half of what it has and gives the other away, so that as many sums take as many exchanges.
template <int kHalf, int kStep>
__device__ float exchange(float (&x)[16]) {
  const bool takes_upper = threadIdx.x & kStep;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float mine = takes_upper ? x[i + kHalf] : x[i];
    const float other = takes_upper ? x[i] : x[i + kHalf];
    x[i] = mine + __shfl_xor_sync(kFullWarp, other, kStep);
  }
  if constexpr (kHalf > 1) return exchange<kHalf / 2, kStep / 2>(x);
  return x[0];
}

// Sums over kLanes lanes of 16 numbers of each: lane i gets that of number i * 16 / kLanes.
template <int kLanes>
__device__ float sum_sixteen(float (&x)[16]) {
  const float sum = exchange<8, kLanes / 2>(x);
  return kLanes == 16 ? sum : sum + __shfl_xor_sync(kFullWarp, sum, 1);
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
