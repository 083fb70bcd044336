// What a warp of attend's fast kernel does with a tile: the products with keys and values, the
// softmax so far, and the slots that aren't in the pages yet.
//
//   logits[slot, query] = keys[slot, :] queries[:, query]         keys are A, queries stay in B
//   out[:, query]      += values[:, slot] probability[slot, query] values are A, read transposed
//
// Slots are the 16 rows of a product and queries its 8 columns: with few queries the other way
// round, most rows would be empty.
#pragma once

#include <cmath>

#include "attend/tiles.cuh"
#include "common/dtype.cuh"

namespace adakv {

/// A row, as far as its queries are concerned.
struct RowContext {
  int32_t b, h;
  int32_t first_query, num_queries;  // of the block's at most kQueries: query = token * G + q head
  int32_t length, settled;           // slots from `settled` on aren't in the pages yet
};

template <typename Config>
__device__ inline RowContext row_context(const AttendParams& p, int32_t row, int32_t length) {
  RowContext context;
  context.b = p.num_heads.quotient(row);
  context.h = p.num_heads.remainder(row);
  context.first_query = blockIdx.y * Config::kQueries;
  context.num_queries = min(Config::kQueries, p.group.value * p.num_tokens - context.first_query);
  context.length = length;
  context.settled = p.append.keys.data ? length - p.new_tokens(context.b) : length;
  return context;
}

/// What one warp has found out about its queries: columns 2 t and 2 t + 1 of each tile of columns.
template <typename Config>
struct WarpState {
  static constexpr int kTiles = Config::kColumnTiles;
  using Element = typename Config::Element;

  const char* query_data[kTiles];               // of query g, from element 2 t on
  uint32_t queries[kTiles][Config::kSteps][2];  // B operands, if they are held
  int32_t visible[kTiles][2];                   // slots before this are seen
  float max[kTiles][2], sum[kTiles][2];         // of the exponents of 2; the sum is of this lane's
  float out[kTiles][Config::kSteps][4];         // rows: head dim 16 step + g and + 8

  __device__ void begin_row(const AttendParams& p, const RowContext& row) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      query_data[tile] = find_query(p, row, tile * 8 + g) + 4 * t;
      if constexpr (Config::kHoldsQueries) {
#pragma unroll
        for (int step = 0; step < Config::kSteps; ++step) {
          load_operand(p, tile, step, queries[tile][step]);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int32_t token = p.group.quotient(row.first_query + tile * 8 + 2 * t + c);
        visible[tile][c] = row.length - p.num_tokens + token + 1;
        max[tile][c] = -INFINITY;
        sum[tile][c] = 0;
      }
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        for (int i = 0; i < 4; ++i) out[tile][step][i] = 0;
      }
    }
  }

  /// The row's first query stands in for those that don't exist: their results aren't used.
  static __device__ const char* find_query(const AttendParams& p,
                                           const RowContext& row,
                                           int32_t query) {
    const int32_t number = row.first_query + (query < row.num_queries ? query : 0);
    return p.queries.at(row.b, row.h * p.group.value + p.group.remainder(number),
                        p.group.quotient(number));
  }

  __device__ void load_operand(const AttendParams& p, int tile, int step, uint32_t (&b)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const char* pair = query_data[tile] + step * 32 + i * 16;
      b[i] = __ldg(reinterpret_cast<const uint32_t*>(pair));
    }
  }

  /// Takes in the tile of slots `first_slot` on, of a row of `length` slots. What lies behind them
  /// may be NaN, which probability 0 doesn't cancel: values from there count as 0.
  __device__ void add_tile(const AttendParams& p,
                           uint32_t tile_data,
                           int32_t first_slot,
                           int32_t length) {
    float logits[kTiles][4];
    multiply_keys(p, tile_data, logits);
    uint32_t probabilities[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      soften(p, first_slot, tile, logits[tile]);
      probabilities[tile][0] = transpose_matrix(pack<Element>(logits[tile][0], logits[tile][1]));
      probabilities[tile][1] = transpose_matrix(pack<Element>(logits[tile][2], logits[tile][3]));
    }
    const int lane = threadIdx.x % kWarpSize;
    const int slot = lane % 8 + lane / 16 * 8, chunk = lane / 8 % 2;
    uint32_t exist[2];  // a mask of slots 8 i + 2 t and + 1
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t left = length - first_slot - 8 * i - lane % 4 * 2;
      exist[i] = left >= 2 ? ~0u : left == 1 ? 0xffffu : 0;
    }
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      uint32_t values[4];
      load_matrices_transposed(
          values, tile_data + Config::kHalfBytes + Config::chunk_offset(slot, 2 * step + chunk));
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] &= exist[i / 2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        mma_16x8x16<Element>(out[tile][step], values, probabilities[tile]);
      }
    }
  }

  __device__ void multiply_keys(const AttendParams& p,
                                uint32_t tile_data,
                                float (&logits)[kTiles][4]) {
    const int lane = threadIdx.x % kWarpSize, slot = lane % 16, chunk = lane / 16;
    float chains[2][kTiles][4] = {};  // two sums in turn: products needn't wait for each other
#pragma unroll(Config::kHoldsQueries ? Config::kSteps : 2)
    for (int step = 0; step < Config::kSteps; ++step) {
      uint32_t keys[4];
      load_matrices(keys, tile_data + Config::chunk_offset(slot, 2 * step + chunk));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (Config::kHoldsQueries) {
          mma_16x8x16<Element>(chains[step % 2][tile], keys, queries[tile][step]);
        } else {
          uint32_t operand[2];
          load_operand(p, tile, step, operand);
          mma_16x8x16<Element>(chains[step % 2][tile], keys, operand);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int i = 0; i < 4; ++i) logits[tile][i] = chains[0][tile][i] + chains[1][tile][i];
    }
  }

  /// Logits to powers of 2 relative to the maximum so far; what is there already is rescaled.
  __device__ void soften(const AttendParams& p, int32_t first_slot, int tile, float (&logits)[4]) {
    const int32_t slot = first_slot + threadIdx.x % kWarpSize / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scaled = logits[i] * p.scale;
      const float z = kLog2e * (p.softcap == 0 ? scaled : p.softcap * fast_tanh(scaled));
      logits[i] = slot + i / 2 * 8 < visible[tile][i % 2] ? z : -INFINITY;
    }
    float factor[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float most = fmaxf(logits[c], logits[2 + c]);
#pragma unroll
      for (int step = 4; step < kWarpSize; step *= 2) {
        most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, step));
      }
      most = fmaxf(most, max[tile][c]);
      const float base = most == -INFINITY ? 0.f : most;
      factor[c] = fast_exp2(max[tile][c] - base);
      max[tile][c] = most;
      logits[c] = fast_exp2(logits[c] - base);
      logits[2 + c] = fast_exp2(logits[2 + c] - base);
      sum[tile][c] = sum[tile][c] * factor[c] + (logits[c] + logits[2 + c]);
    }
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      for (int i = 0; i < 4; ++i) out[tile][step][i] *= factor[i % 2];
    }
  }

  /// Writes the warp's results into an image [kQueries, D].
  __device__ void store(float (&image)[Config::kQueries][Config::kImageStride],
                        float2 (&max_sum)[Config::kQueries]) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float total = sum[tile][c];
#pragma unroll
        for (int step = 4; step < kWarpSize; step *= 2) {
          total += __shfl_xor_sync(kFullWarp, total, step);
        }
        const int query = tile * 8 + 2 * t + c;
        if (query >= Config::kQueries) continue;
        if (g == 0) max_sum[query] = make_float2(max[tile][c], total);
#pragma unroll
        for (int step = 0; step < Config::kSteps; ++step) {
          image[query][16 * step + g] = out[tile][step][c];
          image[query][16 * step + 8 + g] = out[tile][step][2 + c];
        }
      }
    }
  }
};

/// Slots of a row that aren't in its pages yet: the new tokens, which come from the arguments.
template <typename Config>
class NewSlots {
 public:
  /// Starts reading the first of them, in the warp that will need it.
  __device__ NewSlots(const AttendParams& p, const RowContext& row, int32_t row_tile)
      : p_(p), row_(row) {
    const int32_t tile = row.settled / kTileSlots - row_tile;
    is_mine_ = row.settled < row.length && tile >= 0 &&
               tile % Config::kWarps == static_cast<int32_t>(threadIdx.x) / kWarpSize;
    if (!is_mine_) return;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int chunk = threadIdx.x % kWarpSize + i * kWarpSize;
      if (chunk < kChunks) first_[i] = read(row.settled, chunk);
    }
  }

  /// Whether the tile of slots `first_slot` on has some of them.
  __device__ bool are_in(int32_t first_slot) const {
    return row_.settled < min(row_.length, first_slot + kTileSlots);
  }

  /// Puts them into a tile.
  __device__ void patch(int32_t first_slot, uint32_t tile_data) const {
    const int32_t begin = max(0, row_.settled - first_slot);
    const int32_t end = min(kTileSlots, row_.length - first_slot);
    const bool has_first = is_mine_ && first_slot <= row_.settled;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int chunk = threadIdx.x % kWarpSize + i * kWarpSize;
      if (has_first && chunk < kChunks) write(tile_data, begin, chunk, first_[i]);
    }
#pragma unroll 1
    for (int32_t slot = begin + has_first; slot < end; ++slot) {
      for (int chunk = threadIdx.x % kWarpSize; chunk < kChunks; chunk += kWarpSize) {
        write(tile_data, slot, chunk, read(first_slot + slot, chunk));
      }
    }
    fence_before_boxes();
    __syncwarp();
  }

 private:
  static constexpr int kChunks = 2 * Config::kEntryChunks;  // of a key and a value
  static constexpr int kPerLane = (kChunks + kWarpSize - 1) / kWarpSize;

  __device__ uint4 read(int32_t slot, int chunk) const {
    const bool is_value = chunk >= Config::kEntryChunks;
    const EntryRows& source = is_value ? p_.append.values : p_.append.keys;
    const char* entry = source.at(row_.b, row_.h, p_.num_tokens - (row_.length - slot));
    return __ldg(reinterpret_cast<const uint4*>(entry) + chunk % Config::kEntryChunks);
  }

  __device__ void write(uint32_t tile_data, int32_t slot, int chunk, const uint4& data) const {
    const uint32_t to = tile_data + chunk / Config::kEntryChunks * Config::kHalfBytes +
                        Config::chunk_offset(slot, chunk % Config::kEntryChunks);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(data.x), "r"(data.y),
                 "r"(data.z), "r"(data.w)
                 : "memory");
  }

  const AttendParams& p_;
  const RowContext& row_;
  bool is_mine_;
  uint4 first_[kPerLane];
};

}  // namespace adakv
