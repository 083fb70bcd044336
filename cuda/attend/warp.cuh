// What a warp of attend's fast kernel does with a tile: the products with keys and values, and the
// softmax so far.
//
//   logits[slot, query] = keys[slot, :] queries[:, query]         keys are A, queries stay in B
//   out[:, query]      += values[:, slot] probability[slot, query] values are A, read transposed
//
// Slots are the 16 rows of a product and queries its 8 columns: with few queries the other way
// round, most rows would be empty.
//
// Codes take part as they are (codes.cuh). What is missing to elements is a factor and a summand for
// each slot and group, which logits and probabilities take:
//   logits[slot, query] = sum over groups z: scale[slot, z] codes[slot, z] queries[z, query]
//                                           + zero[slot, z] sum of queries[z, query]
//   out[z, query]      += bound codes[z, slot] (scale[slot, z] / bound probability[slot, query])
//                       + sum over slots of zero[slot, z] probability[slot, query]
// The bound is a power of 2 that no scale so far exceeds: f16 has too few exponents for their
// products with probabilities.
#pragma once

#include <cfloat>
#include <cmath>

#include "attend/codes.cuh"
#include "attend/int4_keys.cuh"
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

/// Sum over the lanes that share columns of a product: over its rows, the slots.
__device__ inline float sum_of_slots(float x) {
#pragma unroll
  for (int step = 4; step < kWarpSize; step *= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

/// What one warp has found out about its queries: columns 2 t and 2 t + 1 of each tile of columns.
template <typename Config>
struct WarpState {
  static constexpr int kTiles = Config::kColumnTiles;
  using Element = typename Config::Element;
  using Format = typename Config::Format;
  using Codes = CodeReader<Format>;
  static constexpr int kGroups = Config::kGroups, kBlocks = Config::kBlocks;
  static constexpr int kGroupSteps = kGroupSize / 16;
  // How far a logit may be above its base, in powers of 2: f16 holds up to 2^16.
  static constexpr float kSlack = 8;
  // Steps that a row of a matrix of codes has, and what a lane reads of a query at a time.
  static constexpr int kChunkSteps = Config::kIsCoded ? 8 / Format::kBits : 1;
  static constexpr int kQueryBytes = Config::kIsCoded ? 8 * kChunkSteps : 4;

  const char* query_data[kTiles];               // of query g, from element 2 t on
  uint32_t queries[kTiles][Config::kSteps][2];  // B operands, if they are held
  int32_t visible[kTiles][2];                   // slots before this are seen
  // Bases of the exponents of 2, a maximum that is at most kSlack behind; this lane's sums of powers.
  float max[kTiles][2], sum[kTiles][2];
  float out[kTiles][Config::kSteps][4];  // rows: head dim 16 step + g and + 8
  // Of codes: what zeros add, this lane's (NaN where a value is). Rows of out are head dim 16 step + 2 g and + 1; in int4 of
  // each two steps 4 g to 4 g + 3.
  float from_zeros[kTiles][kGroups][2];
  float bound = FLT_MIN;  // out is relative to it
  uint2* operands;       // [kSteps, kTiles, 32]  of codes' queries; of int4 [D / 32, kTiles, 32, 2]
  float2* query_sums;    // [kGroups, kTiles, 4]  over groups, of queries 2 t and 2 t + 1
  float* logits_of_row;  // [slots of the row, kQueries], if they are stored

  __device__ WarpState(const AttendParams& p, const RowContext& row, AttendShared<Config>& shared)
      : operands(shared.operands + threadIdx.x / kWarpSize * Config::kOperands),
        query_sums(shared.query_sums + threadIdx.x / kWarpSize * Config::kSums) {
    begin(p, row);
  }

  /// Without codes nothing is kept in shared memory.
  __device__ WarpState(const AttendParams& p, const RowContext& row) {
    static_assert(!Config::kIsCoded);
    begin(p, row);
  }

  __device__ void begin(const AttendParams& p, const RowContext& row) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    if constexpr (Config::kStoresLogits) {
      const int64_t index = int64_t{row.b} * p.num_heads.value + row.h;
      logits_of_row = p.logits + index * p.logits_length * Config::kQueries;
    }
    __syncwarp();  // nobody needs the sums of the row before
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      query_data[tile] = find_query(p, row, tile * 8 + g) + kQueryBytes * t;
      if constexpr (Config::kHoldsQueries) {
#pragma unroll
        for (int step = 0; step < Config::kSteps; ++step) {
          load_operand(tile, step, queries[tile][step]);
        }
      } else if constexpr (Config::kHasTails) {
#pragma unroll
        for (int chunk = 0; chunk < Config::kHeadDim / 32; ++chunk) {
          const char* from = query_data[tile] + chunk * 64;
          reinterpret_cast<uint4*>(operands)[(chunk * kTiles + tile) * kWarpSize + lane] =
              KeyUnits<Element>::query(__ldg(reinterpret_cast<const uint4*>(from)));
        }
      } else if constexpr (Config::kIsCoded) {
#pragma unroll
        for (int step = 0; step < Config::kSteps; ++step) {
          uint32_t operand[2];
          load_operand(tile, step, operand);
          operands[(step * kTiles + tile) * kWarpSize + lane] = make_uint2(operand[0], operand[1]);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int32_t token = p.group.quotient(row.first_query + tile * 8 + 2 * t + c);
        visible[tile][c] = row.length - p.num_hidden(token);
        max[tile][c] = -INFINITY;
        sum[tile][c] = 0;
      }
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        for (int i = 0; i < 4; ++i) out[tile][step][i] = 0;
      }
      if constexpr (Config::kIsCoded) {
#pragma unroll
        for (int z = 0; z < kGroups; ++z) from_zeros[tile][z][0] = from_zeros[tile][z][1] = 0;
        if constexpr (!Config::kHasTails) sum_queries(tile);
      }
    }
    __syncwarp();
  }

  /// Sums of queries over groups, to shared memory: products with keys of ones, whose rows are equal.
  __device__ void sum_queries(int tile);

  /// The row's first query stands in for those that don't exist: their results aren't used.
  static __device__ const char* find_query(const AttendParams& p,
                                           const RowContext& row,
                                           int32_t query) {
    const int32_t number = row.first_query + (query < row.num_queries ? query : 0);
    return p.queries.at(row.b, row.h * p.group.value + p.group.remainder(number),
                        p.group.quotient(number));
  }

  __device__ void load_operand(int tile, int step, uint32_t (&b)[2]) const {
    if constexpr (Config::kIsCoded) {
      const uint2 four = __ldg(reinterpret_cast<const uint2*>(query_data[tile] + step * 32));
      Codes::order_query(to_half2<Element>(four.x), to_half2<Element>(four.y), b);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const char* pair = query_data[tile] + step * 32 + i * 16;
        b[i] = __ldg(reinterpret_cast<const uint32_t*>(pair));
      }
    }
  }

  /// The operand from shared memory.
  __device__ void shared_operand(int tile, int step, uint32_t (&b)[2]) const {
    const uint2 operand = operands[(step * kTiles + tile) * kWarpSize + threadIdx.x % kWarpSize];
    b[0] = operand.x;
    b[1] = operand.y;
  }

  /// Takes in the tile of slots `first_slot` on, of a row of `length` slots. What lies behind them
  /// may be NaN, which probability 0 doesn't cancel: values from there count as 0.
  __device__ void add_tile(const AttendParams& p,
                           const TileData& data,
                           int32_t first_slot,
                           int32_t length) {
    float logits[kTiles][kBlocks][4];
    if constexpr (Config::kHasTails) {
      multiply_int4_keys<Config>(data, reinterpret_cast<const uint4*>(operands), logits);
    } else if constexpr (Config::kIsCoded) {
      multiply_key_codes(data, logits);
    } else {
      multiply_keys(data.entries, logits);
    }
    const bool sees_all = first_slot + Config::kTileSlots <= length - p.num_hidden(0);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      scale_logits(p, first_slot, sees_all, tile, logits[tile]);
      soften(tile, logits[tile]);
    }
    if constexpr (Config::kIsCoded) {
      add_value_codes(data, length - first_slot, logits);
    } else {
      add_values(data.entries, length - first_slot, logits);
    }
  }

  /// Adds the values of a tile of which `count` slots exist; `shares` are the probabilities.
  __device__ void add_values(uint32_t entries,
                             int32_t count,
                             const float (&shares)[kTiles][kBlocks][4]) {
    uint32_t probabilities[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float(&share)[4] = shares[tile][0];
      probabilities[tile][0] = transpose_matrix(pack<Element>(share[0], share[1]));
      probabilities[tile][1] = transpose_matrix(pack<Element>(share[2], share[3]));
    }
    const int lane = threadIdx.x % kWarpSize;
    const int slot = lane % 8 + lane / 16 * 8, chunk = lane / 8 % 2;
    uint32_t exist[2];  // a mask of slots 8 i + 2 t and + 1
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t left = count - 8 * i - lane % 4 * 2;
      exist[i] = left >= 2 ? ~0u : left == 1 ? 0xffffu : 0;
    }
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      uint32_t values[4];
      load_matrices_transposed(
          values, entries + Config::kHalfBytes + Config::chunk_offset(slot, 2 * step + chunk));
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] &= exist[i / 2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        mma_16x8x16<Element>(out[tile][step], values, probabilities[tile]);
      }
    }
  }

  /// The same with codes. Slots that don't exist have any scale, so it counts as 0; so do scales of NaN
  /// for queries that don't see them.
  __device__ void add_value_codes(const TileData& data,
                                  int32_t count,
                                  const float (&shares)[kTiles][kBlocks][4]);

  /// Values of scale NaN, in group z: NaN for the queries that see the slot, nothing for the others.
  __device__ void settle_nan(int z,
                             const float (&shares)[kTiles][kBlocks][4],
                             Scale (&numbers)[2 * kBlocks]);

  /// Makes the bound a power of 2 that no scale of the tile's values exceeds.
  __device__ void raise_bound(const TileData& data, int32_t count);

  /// The numbers of group z of slot lane / 4 + 8 i.
  static __device__ Scale value_scale(const TileData& data, int32_t count, int z, int i);

  static __device__ Scale load_slot_scale(uint32_t scales, int slot, int group);

  __device__ void multiply_key_codes(const TileData& data, float (&logits)[kTiles][kBlocks][4]);

  __device__ void multiply_keys(uint32_t tile_data, float (&logits)[kTiles][kBlocks][4]) {
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
          load_operand(tile, step, operand);
          mma_16x8x16<Element>(chains[step % 2][tile], keys, operand);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int i = 0; i < 4; ++i) logits[tile][0][i] = chains[0][tile][i] + chains[1][tile][i];
    }
  }

  /// Products to logits of base 2; those of slots that a query doesn't see are -inf.
  __device__ void scale_logits(const AttendParams& p,
                               int32_t first_slot,
                               bool sees_all,
                               int tile,
                               float (&logits)[kBlocks][4]) const {
    float* all = logits[0];
    if (p.softcap == 0) {
      const float scale = p.scale * kLog2e;
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) all[i] *= scale;
    } else {
      const float softcap = p.softcap * kLog2e;
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) all[i] = softcap * fast_tanh(all[i] * p.scale);
    }
    if (!sees_all) {
      const int32_t slot = first_slot + threadIdx.x % kWarpSize / 4;
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) {
        if (slot + i / 2 * 8 >= visible[tile][i % 2]) all[i] = -INFINITY;
      }
    }
    if constexpr (Config::kStoresLogits) store_logits(first_slot, tile, logits);
  }

  /// Logits to powers of 2 relative to their queries' bases, which are added to the sums. The bases
  /// stay as they are while no logit is much above them: to find a maximum, all lanes must talk.
  __device__ void soften(int tile, float (&logits)[kBlocks][4]) {
    float most[2];  // of this lane
    bool is_above = false;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      most[c] = fmaxf(logits[0][c], logits[0][2 + c]);
#pragma unroll
      for (int block = 1; block < kBlocks; ++block) {
        most[c] = fmaxf(most[c], fmaxf(logits[block][c], logits[block][2 + c]));
      }
      is_above |= most[c] > max[tile][c] + kSlack;
    }
    if (__any_sync(kFullWarp, is_above)) raise_bases(tile, most);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float base = max[tile][c] == -INFINITY ? 0.f : max[tile][c];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        float(&logit)[4] = logits[block];
        logit[c] = fast_exp2(logit[c] - base);
        logit[2 + c] = fast_exp2(logit[2 + c] - base);
        sum[tile][c] += logit[c] + logit[2 + c];
      }
    }
  }

  /// Makes the bases the maxima so far, of which `most` is this lane's share, and what is there
  /// relative to them.
  __device__ void raise_bases(int tile, float (&most)[2]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int step = 4; step < kWarpSize; step *= 2) {
        most[c] = fmaxf(most[c], __shfl_xor_sync(kFullWarp, most[c], step));
      }
      most[c] = fmaxf(most[c], max[tile][c]);
      const float factor = fast_exp2(max[tile][c] - (most[c] == -INFINITY ? 0.f : most[c]));
      max[tile][c] = most[c];
      sum[tile][c] *= factor;
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        out[tile][step][c] *= factor;
        out[tile][step][2 + c] *= factor;
      }
      if constexpr (Config::kIsCoded) {
#pragma unroll
        for (int z = 0; z < kGroups; ++z) from_zeros[tile][z][c] *= factor;
      }
    }
  }

  /// Logits of one tile of columns, also of slots of the page that the row doesn't have.
  __device__ void store_logits(int32_t first_slot,
                               int tile,
                               const float (&logits)[kBlocks][4]) const {
    const int lane = threadIdx.x % kWarpSize, query = tile * 8 + lane % 4 * 2;
    if (query >= Config::kQueries) return;
    float* to = logits_of_row + (first_slot + lane / 4) * Config::kQueries + query;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const float* pair = logits[i / 2] + i % 2 * 2;
      *reinterpret_cast<float2*>(to + i * 8 * Config::kQueries) = make_float2(pair[0], pair[1]);
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
        const float total = sum_of_slots(sum[tile][c]);
        float zeros[kGroups] = {};
        if constexpr (Config::kIsCoded) {
#pragma unroll
          for (int z = 0; z < kGroups; ++z) zeros[z] = sum_of_slots(from_zeros[tile][z][c]);
        }
        const int query = tile * 8 + 2 * t + c;
        if (query >= Config::kQueries) continue;
        if (g == 0) max_sum[query] = make_float2(max[tile][c], total);
#pragma unroll
        for (int step = 0; step < Config::kSteps; ++step) {
          const float first = out[tile][step][c], second = out[tile][step][2 + c];
          if constexpr (Config::kIsCoded) {
            const float from_zero = zeros[step / kGroupSteps];
            constexpr int kRows = 2 * kChunkSteps;  // of a chunk, one behind the other
            const int column = step / kChunkSteps * 8 * kRows + kRows * g + step % kChunkSteps * 2;
            image[query][column] = first * Codes::kLowUnit * bound + from_zero;
            image[query][column + 1] = second * Codes::kHighUnit * bound + from_zero;
          } else {
            image[query][16 * step + g] = first;
            image[query][16 * step + 8 + g] = second;
          }
        }
      }
    }
  }
};

}  // namespace adakv
