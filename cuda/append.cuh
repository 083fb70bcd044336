// How warps append tokens: for append.cu, and for attend, which does it in the same launch.
#pragma once

#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "ops/schedule.h"

namespace adakv {

struct AppendParams {
  EntryRows keys, values;  // [B, Hkv, S, D]
  const int32_t* num_new;  // [B] or null
  LayerRows layer;
  int32_t batch, num_tokens;

  __device__ int32_t count(int32_t b) const { return num_new ? num_new[b] : num_tokens; }
};

/// Where a warp begins in the rows and tokens of a sequence, and how far it goes each time.
struct AppendShare {
  int32_t first_head, head_step, first_token, token_step;
};

/// One warp copies entries of several rows, `stride` bytes apart, each to the slot that lane i has
/// for the i-th row. Rows are read kAtOnce at a time before any is written.
template <typename Chunk>
__device__ inline void copy_entries(
    const char* from, int64_t stride, char* slot, int32_t num_rows, int32_t entry_bytes) {
  constexpr int kAtOnce = 8;
  const int32_t num_chunks = entry_bytes / static_cast<int32_t>(sizeof(Chunk));
#pragma unroll 1
  for (int32_t row = 0; row < num_rows; row += kAtOnce) {
#pragma unroll 1
    for (int32_t first = 0; first < num_chunks; first += kWarpSize) {
      const int32_t chunk = first + threadIdx.x % kWarpSize;
      const int32_t last = chunk < num_chunks ? min(num_rows - row, kAtOnce) : 0;
      Chunk data[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const char* source = from + (row + i) * stride;
        if (i < last) data[i] = __ldg(reinterpret_cast<const Chunk*>(source) + chunk);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint64_t to =
            __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(slot), (row + i) % kWarpSize);
        if (i < last) reinterpret_cast<Chunk*>(to)[chunk] = data[i];
      }
    }
  }
}

/// One warp appends its share of the tokens of sequence b: entries, positions and new pages, but not
/// the lengths. Chunk is what entries are copied by.
template <typename Chunk>
__device__ inline void append_entries(const AppendParams& p, int32_t b, const AppendShare& share) {
  const LayerRows& layer = p.layer;
  const int32_t lane = threadIdx.x % kWarpSize, count = p.count(b), seen = layer.seen[b];
#pragma unroll 1
  for (int32_t base = share.first_head; base < layer.num_heads;
       base += kWarpSize * share.head_step) {
    // Each lane finds the slot in one row; then all lanes copy, row by row.
    const int32_t h = base + lane * share.head_step;
    const bool has_row = h < layer.num_heads;
    const int32_t length = has_row ? *layer.lengths.at(b, h) : 0;
    const int32_t used = layer.num_pages(length);
    const int32_t num_rows =
        min(kWarpSize, schedule::ceil_div(layer.num_heads - base, share.head_step));
#pragma unroll 1
    for (int32_t i = share.first_token; i < count; i += share.token_step) {
      const int32_t slot = (length + i) & (layer.page_size - 1);
      const int32_t column = (length + i) >> layer.page_shift;
      int32_t page = 0;
      if (has_row) {
        page = column < used ? layer.block_table.at(b, h)[column]
                             : layer.fresh_pages.at(b, h)[column - used];
        if (slot == 0) layer.block_table.at(b, h)[column] = page;
        layer.page_positions[page * layer.positions_stride + slot] = seen + i;
      }
      const int32_t token = p.num_tokens - count + i;
#pragma unroll 1
      for (int32_t half = 0; half < 2; ++half) {
        char* to = layer.key(page, slot) + half * layer.half_page_bytes();
        copy_entries<Chunk>((half ? p.values : p.keys).at(b, base, token),
                            (half ? p.values : p.keys).stride[1] * share.head_step, to, num_rows,
                            layer.entry_bytes);
      }
    }
  }
}

/// Counts the tokens of sequence b in, after all of append_entries() is done. By threads
/// `thread` of `num_threads`.
__device__ inline void count_appended(const AppendParams& p,
                                      int32_t b,
                                      int32_t thread,
                                      int32_t num_threads) {
  const int32_t count = p.count(b);
#pragma unroll 1
  for (int32_t h = thread; h < p.layer.num_heads; h += num_threads) {
    *p.layer.lengths.at(b, h) += count;
  }
  if (thread == 0) p.layer.seen[b] += count;
}

inline AppendParams append_params(const LayerView& layer,
                                  const TensorView& keys,
                                  const TensorView& values,
                                  const TensorView& num_new) {
  AppendParams p = {};
  p.keys = entry_rows(keys);
  p.values = entry_rows(values);
  p.num_new = num_new ? num_new.ptr<int32_t>() : nullptr;
  p.layer = layer_rows(layer);
  p.batch = static_cast<int32_t>(keys.shape[0]);
  p.num_tokens = static_cast<int32_t>(keys.shape[2]);
  return p;
}

}  // namespace adakv
