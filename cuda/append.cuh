// How warps append tokens: for append.cu, and for attend, which does it in the same launch.
#pragma once

#include "adakv/ops.h"
#include "common/codes.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "ops/schedule.h"
#include "ops/tails.h"

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

/// A slot of a page, as lanes tell each other.
struct Slot {
  int32_t page, slot;

  __device__ Slot of_lane(int32_t lane) const {
    return {__shfl_sync(kFullWarp, page, lane), __shfl_sync(kFullWarp, slot, lane)};
  }
};

/// What a warp copies at a time: 32 chunks of the key and value of a token, for up to kMostRows
/// rows. Values that are as wide as keys lie as far behind them in every slot of a page.
template <typename Chunk, int kMostRows, bool kIsEven = true>
class EntryBatch {
 public:
  static constexpr int kRows = kMostRows;

  /// Chunks of an entry.
  static __device__ int32_t num_chunks(const AppendParams& p) {
    const int32_t bytes =
        p.layer.entry_bytes + (kIsEven ? p.layer.entry_bytes : p.layer.value_bytes);
    return bytes / static_cast<int32_t>(sizeof(Chunk));
  }

  /// Starts reading chunks from `first` on, of heads `head`, `head` + step, ...
  __device__ void read(const AppendParams& p,
                       int32_t b,
                       int32_t token,
                       int32_t head,
                       int32_t step,
                       int32_t num_rows,
                       int32_t first) {
    const int32_t key_chunks = p.layer.entry_bytes / static_cast<int32_t>(sizeof(Chunk));
    const int32_t chunk = first + threadIdx.x % kWarpSize;
    is_value_ = chunk >= key_chunks;
    const EntryRows& source = is_value_ ? p.values : p.keys;
    const int32_t in_entry = is_value_ ? chunk - key_chunks : chunk;
    const char* from = source.at(b, head, token) + in_entry * sizeof(Chunk);
    to_ = in_entry * sizeof(Chunk) + (kIsEven && is_value_ ? p.layer.half_page_bytes() : 0);
    count_ = chunk < num_chunks(p) ? min(num_rows, kRows) : 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const char* row = from + i * step * source.stride[1];
      if (i < count_) data_[i] = __ldg(reinterpret_cast<const Chunk*>(row));
    }
  }

  /// Writes them; lane i has the slot of the i-th row, from `first_row` on.
  __device__ void write(const AppendParams& p, const Slot& slot, int32_t first_row) const {
    const uint64_t mine = reinterpret_cast<uint64_t>(p.layer.key(slot.page, slot.slot));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int lane = (first_row + i) % kWarpSize;
      uint64_t entry;
      if constexpr (kIsEven) {
        entry = __shfl_sync(kFullWarp, mine, lane);
      } else {
        const Slot to = slot.of_lane(lane);
        const char* at =
            is_value_ ? p.layer.value(to.page, to.slot) : p.layer.key(to.page, to.slot);
        entry = reinterpret_cast<uint64_t>(at);
      }
      if (i < count_) *reinterpret_cast<Chunk*>(entry + to_) = data_[i];
    }
  }

 private:
  Chunk data_[kRows];
  int64_t to_;
  int32_t count_;
  bool is_value_;
};

/// The same for pages of codes. A chunk is what a lane quantises.
template <typename Element, typename Format, int kMostRows>
class CodeBatch {
 public:
  static constexpr int kRows = kMostRows;

  static __device__ int32_t num_chunks(const AppendParams& p) {
    return kWarpSize * EntryPart::pieces(padded_head_dim(p.layer.head_dim) +
                                         padded_head_dim(p.layer.value_dim));
  }

  __device__ void read(const AppendParams& p,
                       int32_t b,
                       int32_t token,
                       int32_t head,
                       int32_t step,
                       int32_t num_rows,
                       int32_t first) {
    const int32_t head_dim = p.layer.head_dim;
    part_ =
        EntryPart::of(head_dim, padded_head_dim(head_dim), p.layer.value_dim, first / kWarpSize);
    count_ = min(num_rows, kRows);
    const EntryRows& source = part_.is_value ? p.values : p.keys;
    const char* from = source.at(b, head, token) + part_.element * sizeof(Element);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      data_[i] = make_uint4(0, 0, 0, 0);
      if (i < count_ && part_.is_there) {
        data_[i] = load_chunk<Element>(from + i * step * source.stride[1]);
      }
    }
  }

  __device__ void write(const AppendParams& p, const Slot& slot, int32_t first_row) const {
    CodedChunk chunks[kRows];
    quantise<Format, Element>(data_, part_.is_there, chunks);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Slot to = slot.of_lane((first_row + i) % kWarpSize);
      if (i < count_) store_chunk<Format>(p.layer, to.page, to.slot, part_, chunks[i]);
    }
  }

 private:
  uint4 data_[kRows];
  EntryPart part_;
  int32_t count_;
};

/// Copies no entries: somebody else does.
struct NoBatch {
  static constexpr int kRows = kWarpSize;

  static __device__ int32_t num_chunks(const AppendParams&) { return 0; }
  __device__ void read(const AppendParams&, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t) {}
  __device__ void write(const AppendParams&, const Slot&, int32_t) const {}
};

/// One warp appends its share of the tokens of sequence b: entries, positions and new pages, but
/// not the lengths. Batch is what entries are copied by.
template <typename Batch>
__device__ inline void append_entries(const AppendParams& p, int32_t b, const AppendShare& share) {
  const LayerRows& layer = p.layer;
  const int32_t lane = threadIdx.x % kWarpSize, count = p.count(b), seen = layer.seen[b];
  const int32_t num_chunks = Batch::num_chunks(p);
#pragma unroll 1
  for (int32_t base = share.first_head; base < layer.num_heads;
       base += kWarpSize * share.head_step) {
    const int32_t h = base + lane * share.head_step;
    const bool has_row = h < layer.num_heads;
    const int32_t length = has_row ? *layer.lengths.at(b, h) : 0;
    const int32_t used = layer.num_pages(length);
    const int32_t num_rows =
        min(kWarpSize, schedule::ceil_div(layer.num_heads - base, share.head_step));
#pragma unroll 1
    for (int32_t i = share.first_token; i < count; i += share.token_step) {
      const int32_t token = p.num_tokens - count + i;
      Batch batch;  // on its way while each lane finds the slot of one row
      batch.read(p, b, token, base, share.head_step, num_rows, 0);
      const int32_t slot = (length + i) & (layer.page_size - 1);
      const int32_t column = (length + i) >> layer.page_shift;
      int32_t page = 0;
      if (has_row) {
        page = column < used ? layer.block_table.at(b, h)[column]
                             : layer.fresh_pages.at(b, h)[column - used];
        if (slot == 0) layer.block_table.at(b, h)[column] = page;
        layer.page_positions[page * layer.positions_stride + slot] = seen + i;
        if (layer.page_biases) layer.page_biases[page * layer.biases_stride + slot] = 0;
      }
      int32_t row = 0, chunk = 0;
#pragma unroll 1
      while (true) {
        batch.write(p, {page, slot}, row);
        chunk += kWarpSize;
        if (chunk >= num_chunks) {
          chunk = 0;
          row += Batch::kRows;
        }
        if (row >= num_rows) break;
        batch.read(p, b, token, base + row * share.head_step, share.head_step, num_rows - row,
                   chunk);
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

/// append, and what it does with full tails.
void launch_append(const AppendArgs& args, FullTails full);

/// Quantises the tails of a layer that one new token has filled, and append has left so.
void quantise_filled_tails(const AppendArgs& args);

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
