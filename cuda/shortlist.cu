// Pages of each row that a step reads; see ops.h. Two launches, of which the second begins early:
//   1. z of every query and page: the bounds of all pages are read once, which is most of the time
//   2. a block for each row: what the softmax of each query needs, the most weight that any query
//      gives to a page, the key of the last page that gets in (bins of keys, ever finer ones), and
//      the pages themselves, ascending
#include <cfloat>

#include "common/device_guard.h"
#include "common/dispatch.cuh"
#include "common/dtype.cuh"
#include "common/mma.cuh"
#include "cuda_backend.h"
#include "ops/listing.h"
#include "ops/scale.h"
#include "shortlist_row.cuh"

namespace adakv {
namespace {

constexpr int kChunk = 8;    // elements that a lane loads at once
constexpr int kTile = 16;    // pages that a warp works on side by side
constexpr int kColumns = 8;  // queries, too
constexpr int kProductWarps = 8;
constexpr int kProductThreads = kProductWarps * kWarpSize;
constexpr int kRound = kProductWarps * kTile;  // pages that a block works on side by side
constexpr int kMostPages = 4 * kRound;         // of a block

/// What one block's products are of.
struct Products {
  int32_t row, b, h, first_page, end, first_query, num_queries;

  Products() = default;
  __device__ explicit Products(const ShortlistParams& p)
      : row(blockIdx.x), b(row / p.heads), h(row % p.heads) {
    const listing::Row pages = p.row(b, h);
    first_page = blockIdx.y * p.pages_per_block;
    end = pages.wanted == 0 || p.lists_all(pages)
              ? 0
              : min(first_page + p.pages_per_block, pages.older);
    first_query = blockIdx.z * kColumns;
    num_queries = p.group * p.tokens;
  }

  /// Eight numbers of a query: its positive ones where they meet largest numbers, its negative ones
  /// where they meet smallest; 0 behind the end. So a bound is one product of length 2 D.
  template <typename Element>
  __device__ void load_query(const ShortlistParams& p,
                             int32_t column,
                             int32_t chunk,
                             float (&x)[kChunk]) const {
    const int32_t query = first_query + column, half = p.dim / kChunk;
    const bool is_largest = chunk < half, is_there = query < num_queries && chunk < 2 * half;
    const Element* from = static_cast<const Element*>(p.queries) + b * p.query_stride[0] +
                          (h * p.group + query / p.tokens) * p.query_stride[1] +
                          query % p.tokens * p.query_stride[2] +
                          (is_largest ? chunk : chunk - half) * kChunk;
#pragma unroll
    for (int d = 0; d < kChunk; ++d) {
      const float number = is_there ? to_float(from[d]) : 0;
      x[d] = is_largest ? fmaxf(number, 0.f) : fminf(number, 0.f);
    }
  }

  __device__ void write(const ShortlistParams& p, int32_t page, int32_t column, float sum) const {
    const int32_t query = first_query + column;
    if (page >= end || query >= num_queries) return;
    float z = sum * p.scale;
    if (p.softcap > 0) z = p.softcap * tanhf(z / p.softcap);
    z = z >= -INFINITY ? fminf(z, FLT_MAX) : -INFINITY;  // NaN
    p.z[(int64_t(row) * num_queries + query) * p.z_width + page] = z;
  }
};

// grid: [B * Hkv, ceil(older pages / pages_per_block), ceil(G * S / kColumns)]. Products by matrix
// instructions: A is a tile of pages, B the queries. Both have a page's numbers in the same order,
// by which a lane's are side by side in memory: of each 32 numbers four lanes take 8 each, for two
// instructions. A tile's pieces give way to the next one's one by one, so that there are always as
// many under way.
template <typename Element, int kGroups>
__global__ void __launch_bounds__(kProductThreads, kGroups <= 8 ? 2 : 1)
    bound_products_kernel(const __grid_constant__ ShortlistParams p) {
  __shared__ uint4 queries[kGroups][kWarpSize];  // as lanes take them
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t place = lane / 4, chunk = lane % 4, chunks = 2 * p.dim / kChunk;
  const int32_t* table = p.table(blockIdx.x / p.heads, blockIdx.x % p.heads);
  int32_t tile = blockIdx.y * p.pages_per_block + warp * kTile;
  int32_t ids[2];  // pages `place` and place + 8 of the next tile, if they are there
  const auto look_up = [&](int32_t next) {
#pragma unroll
    for (int i = 0; i < 2; ++i) ids[i] = __ldcg(table + min(next + place + 8 * i, p.width - 1));
  };
  Products products;
  const uint64_t policy = read_once_policy();
  const uint4* bounds[2];  // this lane's first chunk of those pages, null behind the last one
  uint4 a[2][kGroups];
  const auto find = [&](int32_t next) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto* page = static_cast<const Element*>(p.bounds) + ids[i] * p.bounds_stride;
      const bool is_there = next + place + 8 * i < products.end;
      bounds[i] = is_there ? reinterpret_cast<const uint4*>(page) + chunk : nullptr;
    }
  };
  const auto load = [&](int k) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is_there = bounds[i] && 4 * k + chunk < chunks;
      a[i][k] = is_there ? read_once(bounds[i] + 4 * k, policy) : uint4{};
    }
  };
  // With prefetch the first tile is read while the kernel before may still append to the row: whichever
  // length is found, older pages and their place in the table are settled. With few they become more.
  int32_t known_end = -1;
#pragma unroll 1
  for (bool is_settled = !p.prefetches;; is_settled = true) {
    if (is_settled) wait_for_previous_kernel();
    look_up(tile);  // beside the row's length
    products = Products(p);
    if (products.end != known_end) {
      find(tile);
#pragma unroll
      for (int k = 0; k < kGroups; ++k) load(k);
    }
    if (is_settled) break;
    known_end = products.end;
  }
  let_next_kernel_begin();
  if (products.first_page >= products.end) return;
  look_up(tile + kRound);
  for (int32_t i = threadIdx.x; i < kGroups * kWarpSize; i += kProductThreads) {
    float x[kChunk];
    products.load_query<Element>(p, i % kWarpSize / 4, i / kWarpSize * 4 + i % 4, x);
    queries[i / kWarpSize][i % kWarpSize] =
        make_uint4(pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]), pack<Element>(x[4], x[5]),
                   pack<Element>(x[6], x[7]));
  }
  __syncthreads();
#pragma unroll 1
  for (; tile < products.end; tile += kRound) {
    find(tile + kRound);
    look_up(tile + 2 * kRound);
    float sums[4] = {};
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const uint4 q = queries[k][lane];
      mma_16x8x16<Element>(sums, {a[0][k].x, a[1][k].x, a[0][k].y, a[1][k].y}, {q.x, q.y});
      mma_16x8x16<Element>(sums, {a[0][k].z, a[1][k].z, a[0][k].w, a[1][k].w}, {q.z, q.w});
      load(k);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      products.write(p, tile + place + i / 2 * 8, chunk * 2 + i % 2, sums[i]);
    }
  }
}

// The same for float32, which has no such instructions: a warp for each page.
__global__ void __launch_bounds__(kProductThreads)
    float_products_kernel(const __grid_constant__ ShortlistParams p) {
  extern __shared__ float queries[];  // [kColumns, 2 D]
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const Products products(p);
  if (products.first_page >= products.end) return;
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t numbers = 2 * p.dim, chunks = numbers / kChunk;
  for (int32_t i = threadIdx.x; i < kColumns * chunks; i += kProductThreads) {
    float x[kChunk];
    products.load_query<float>(p, i / chunks, i % chunks, x);
#pragma unroll
    for (int d = 0; d < kChunk; ++d) queries[i * kChunk + d] = x[d];
  }
  __syncthreads();
  for (int32_t page = products.first_page + warp; page < products.end; page += kProductWarps) {
    const float* bounds = static_cast<const float*>(p.bounds) +
                          p.table(products.b, products.h)[page] * p.bounds_stride;
    float sums[kColumns] = {};
    for (int32_t d = lane; d < numbers; d += kWarpSize) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[i] += queries[i * numbers + d] * bounds[d];
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float sum = warp_sum(sums[i]);
      if (lane == 0) products.write(p, page, i, sum);
    }
  }
}

// grid: [B * Hkv].
template <int kThreads, bool kIsLong>
__global__ void __launch_bounds__(kThreads)
    shortlist_kernel(const __grid_constant__ ShortlistParams p) {
  using Chooser = RowChooser<kThreads, kIsLong>;
  __shared__ typename Chooser::Shared shared;
  if (p.pages_per_block == 0) wait_for_previous_kernel();  // it is not of this verb
  Chooser chooser(p, blockIdx.x, shared);
  chooser.prepare();
  wait_for_previous_kernel();
  let_next_kernel_begin();
  chooser.run();
}

/// Numbers of the workspace, of 4 bytes each.
struct Parts {
  int64_t width, z, keys;

  explicit Parts(const ShortlistArgs& args) {
    const int64_t rows = args.lengths.shape[0] * args.lengths.shape[1];
    const int64_t queries = args.queries.shape[0] * args.queries.shape[1] * args.queries.shape[2];
    width = (args.block_table.shape[2] + kFour - 1) / kFour * kFour;
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
  p.z_width = static_cast<int32_t>(parts.width);
  p.scale = scale_of(args);
  p.softcap = args.softcap;
  p.mass = static_cast<float>(args.mass);
  p.prefetches = args.prefetch;
  return p;
}

template <typename Element>
auto products_kernel(int32_t dim) {
  if constexpr (sizeof(Element) == sizeof(float)) {
    return float_products_kernel;
  } else {
    return dim <= 64    ? bound_products_kernel<Element, 4>
           : dim <= 128 ? bound_products_kernel<Element, 8>
                        : bound_products_kernel<Element, 16>;
  }
}

}  // namespace

void CudaBackend::shortlist(const ShortlistArgs& args) {
  const DeviceGuard guard(args.queries.device);
  const uint32_t rows = static_cast<uint32_t>(args.lengths.shape[0] * args.lengths.shape[1]);
  if (rows == 0) return;
  ShortlistParams p = params_of(args);
  const int device = args.queries.device.index;
  const auto blocks = [](int32_t count, int32_t size) { return (count + size - 1) / size; };
  const int32_t num_parts = blocks(p.group * p.tokens, kColumns);
  const int32_t older = std::max(p.width - p.rule.newest, 0);  // at most
  // Few blocks, that have much to do each, but not fewer than multiprocessors.
  const int sms = device_attribute("shortlist", device, cudaDevAttrMultiProcessorCount);
  int32_t num_blocks = blocks(older, kMostPages);
  while (num_blocks < blocks(older, kRound) && int64_t{rows} * num_parts * num_blocks < sms) {
    num_blocks *= 2;
  }
  const bool early = has_sm90("shortlist", device);
  if (num_blocks > 0 && num_parts > 0) {
    p.pages_per_block = blocks(blocks(older, num_blocks), kRound) * kRound;
    const dim3 grid(rows, blocks(older, p.pages_per_block), num_parts);
    dispatch_dtype(args.queries.dtype, [&](auto element) {
      using Element = typename decltype(element)::type;
      const size_t shared =
          sizeof(Element) == sizeof(float) ? sizeof(float) * kColumns * 2 * p.dim : 0;
      launch("shortlist", products_kernel<Element>(p.dim), {grid, kProductThreads, shared, early},
             args.stream, p);
    });
  }
  // As many threads as hold what is known of a row, so that many rows are chosen from at once.
  if (older <= 128 * kFour) {
    launch("shortlist", shortlist_kernel<128, false>, {dim3(rows), 128, 0, early}, args.stream, p);
  } else if (older <= 256 * kFour) {
    launch("shortlist", shortlist_kernel<256, false>, {dim3(rows), 256, 0, early}, args.stream, p);
  } else {
    launch("shortlist",
           older <= 512 * kFour ? shortlist_kernel<512, false> : shortlist_kernel<512, true>,
           {dim3(rows), 512, 0, early}, args.stream, p);
  }
}

size_t CudaBackend::workspace_bytes(const ShortlistArgs& args) const {
  const Parts parts(args);
  return static_cast<size_t>(parts.z + parts.keys) * sizeof(float);
}

}  // namespace adakv
