// Fills the rows of a fork: their tables, and pages of their own. One launch, some blocks for each row,
// which copy its pages in turn; the first of them writes its integers, too.
#include <algorithm>

#include "common/check.cuh"
#include "common/device_guard.h"
#include "common/rows.cuh"
#include "cuda_backend.h"
#include "ops/page_pieces.h"

namespace adakv {
namespace {

constexpr int kThreads = 256;
constexpr int kWholeBlocks = 16;  // of a row whose pages are all copied

struct ForkParams {
  PagePiece pieces[PagePieces::kMost];
  int32_t num_pieces;
  bool is_whole;
  IntRows source_table, source_lengths;
  const int32_t* source_seen;
  EntryRows source_tails;
  int64_t tail_bytes;          // of a row; 0: there are none
  const int32_t* sources;      // [B]
  const int32_t* stretch;      // [B]
  const int32_t* back;         // [B] or null
  const int32_t* page_ids;     // [Q]
  const int32_t* page_indptr;  // [B + 1]
  LayerRows layer;
  int32_t num_columns, num_fresh;  // M, F

  __device__ int32_t length(int32_t b, int32_t h) const {
    const int32_t back_b = back == nullptr ? 0 : back[b];
    return max(*source_lengths.at(sources[b], h) - back_b, 0);
  }
};

/// Which of a row's pages are its own.
struct Own {
  int32_t first_column;  // from which on pages are copied
  const int32_t* ids;    // to these
  int32_t step;          // from one to the next
  int32_t fresh;         // the row's fresh page, -1 if it has none
};

__device__ Own own_pages(const ForkParams& p, int32_t b, int32_t h, int32_t length) {
  const int32_t *begin = p.page_ids + p.page_indptr[b], *end = p.page_ids + p.page_indptr[b + 1];
  const int32_t heads = p.layer.num_heads, num_pages = p.layer.num_pages(length);
  if (begin == end) return {num_pages, begin, 0, -1};
  if (!p.is_whole) {
    const int32_t before = p.layer.num_pages(max(length - p.stretch[b], 0));
    return {num_pages - (num_pages > before ? 2 : 1), begin + h, heads, begin[heads + h]};
  }
  int32_t first = 0, all = 0;
#pragma unroll 1
  for (int32_t other = 0; other < heads; ++other) {
    const int32_t pages = p.layer.num_pages(p.length(b, other));
    if (other < h) first += pages;
    all += pages;
  }
  const int32_t* fresh = begin + all + h;
  return {0, begin + first, 1, fresh < end ? *fresh : -1};
}

// By all threads of a block.
__device__ void copy_bytes(char* to, const char* from, int64_t bytes) {
#pragma unroll 1
  for (int64_t i = threadIdx.x * int64_t{16}; i < bytes; i += kThreads * 16) {
    *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
  }
}

// grid: [blocks of a row, Hkv, B]
__global__ void __launch_bounds__(kThreads) fork_kernel(const __grid_constant__ ForkParams p) {
  const int32_t h = blockIdx.y, b = blockIdx.z;
  const int32_t length = p.length(b, h), num_pages = p.layer.num_pages(length);
  const Own own = own_pages(p, b, h, length);
  const int32_t* source = p.source_table.at(p.sources[b], h);
  const auto page_of = [&](int32_t column) {
    return column < own.first_column ? source[column]
                                     : own.ids[(column - own.first_column) * own.step];
  };
#pragma unroll 1
  for (int32_t column = max(own.first_column, 0) + blockIdx.x; column < num_pages;
       column += gridDim.x) {
    const int64_t from = source[column], to = page_of(column);
#pragma unroll 1
    for (int32_t i = 0; i < p.num_pieces; ++i) {
      const PagePiece& piece = p.pieces[i];
      copy_bytes(piece.data + to * piece.page_stride, piece.data + from * piece.page_stride,
                 piece.bytes);
    }
  }
  if (blockIdx.x > 0) return;
  int32_t *table = p.layer.block_table.at(b, h), *fresh = p.layer.fresh_pages.at(b, h);
  for (int32_t i = threadIdx.x; i < p.num_columns; i += kThreads) {
    table[i] = i < num_pages ? page_of(i) : -1;
  }
  for (int32_t i = threadIdx.x; i < p.num_fresh; i += kThreads) fresh[i] = i == 0 ? own.fresh : -1;
  if (threadIdx.x == 0) {
    *p.layer.lengths.at(b, h) = length;
    if (h == 0) {
      p.layer.seen[b] = p.source_seen[p.sources[b]] - (p.back == nullptr ? 0 : p.back[b]);
    }
  }
  if (p.tail_bytes > 0) {
    copy_bytes(p.layer.tails.at(b, h, 0), p.source_tails.at(p.sources[b], h, 0), p.tail_bytes);
  }
}

}  // namespace

void CudaBackend::fork(const ForkArgs& args) {
  const LayerView& layer = args.layer;
  const DeviceGuard guard(layer.pages.device);
  const PagePieces pieces(layer);
  ForkParams p = {};
  std::copy_n(pieces.pieces, pieces.count, p.pieces);
  p.num_pieces = pieces.count;
  p.is_whole = args.whole;
  p.source_table = int_rows(args.source_table);
  p.source_lengths = int_rows(args.source_lengths);
  p.source_seen = args.source_seen.ptr<int32_t>();
  p.source_tails = entry_rows(args.source_tails);
  if (layer.tails) p.tail_bytes = layer.tails.shape[2] * layer.tails.shape[3] * 2;
  p.sources = args.sources.ptr<int32_t>();
  p.stretch = args.stretch.ptr<int32_t>();
  p.back = args.back ? args.back.ptr<int32_t>() : nullptr;
  p.page_ids = args.page_ids.ptr<int32_t>();
  p.page_indptr = args.page_indptr.ptr<int32_t>();
  p.layer = layer_rows(layer);
  p.num_columns = static_cast<int32_t>(layer.block_table.shape[2]);
  p.num_fresh = static_cast<int32_t>(layer.fresh_pages.shape[2]);
  const int64_t batch = layer.lengths.shape[0];
  if (batch == 0 || p.layer.num_heads == 0) return;
  const dim3 grid(args.whole ? kWholeBlocks : 2, static_cast<uint32_t>(p.layer.num_heads),
                  static_cast<uint32_t>(batch));
  fork_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(args.stream)>>>(p);
  ADAKV_CUDA_CHECK("fork", cudaGetLastError());
}

}  // namespace adakv
