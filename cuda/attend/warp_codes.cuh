// What a warp of attend's fast kernel does with codes: the parts of WarpState (warp.cuh) that other
// pages don't need.
#pragma once

#include "attend/warp.cuh"

namespace adakv {

template <typename Config>
__device__ inline void WarpState<Config>::sum_queries(int tile) {
  const int lane = threadIdx.x % kWarpSize;
  constexpr uint32_t kOnes = 0x3c003c00;
  const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
  for (int z = 0; z < kGroups; ++z) {
    float sums[4] = {};
#pragma unroll
    for (int step = z * kGroupSteps; step < min((z + 1) * kGroupSteps, Config::kSteps); ++step) {
      uint32_t operand[2];
      shared_operand(tile, step, operand);
      mma_16x8x16<__half>(sums, ones, operand);
    }
    if (lane < 4) query_sums[(z * kTiles + tile) * 4 + lane] = make_float2(sums[0], sums[1]);
  }
}

template <typename Config>
__device__ inline void WarpState<Config>::add_value_codes(
    const TileData& data, int32_t count, const float (&shares)[kTiles][kBlocks][4]) {
  // Groups whose numbers are held, as registers allow.
  constexpr int kHeld = kGroups * kBlocks <= 4 && Config::kSteps * kTiles <= 16 ? kGroups : 1;
  Scale scales[kHeld][2 * kBlocks];
  uint32_t most = 0;  // as bits, of which NaN has more than any number
#pragma unroll
  for (int i = 0; i < kGroups * 2 * kBlocks; ++i) {
    const int z = i / (2 * kBlocks), in_group = i % (2 * kBlocks);
    scales[z % kHeld][in_group] = value_scale(data, count, z, in_group);
    most = ::max(most, __float_as_uint(scales[z % kHeld][in_group].scale));
  }
  const bool has_nan = isnan(__uint_as_float(most));  // this lane
  if (__any_sync(kFullWarp, most > __float_as_uint(bound))) {
    raise_bound(data, count);
#pragma unroll
    for (int z = 0; kHeld == kGroups && z < kGroups; ++z) settle_nan(z, shares, scales[z]);
  }
  const float inverse = __uint_as_float(0x7f000000 - __float_as_uint(bound));  // exactly
#pragma unroll
  for (int z = 0; z < kGroups; ++z) {
    Scale(&numbers)[2 * kBlocks] = scales[z % kHeld];
    if constexpr (kHeld < kGroups) {
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) numbers[i] = value_scale(data, count, z, i);
      if (has_nan) settle_nan(z, shares, numbers);
    }
    uint32_t probabilities[kTiles][kBlocks][2];
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const float scale = numbers[i].scale * inverse;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float* share = &shares[tile][i / 2][i % 2 * 2];
        probabilities[tile][i / 2][i % 2] =
            transpose_matrix(pack<__half>(share[0] * scale, share[1] * scale));
        if constexpr (Config::Format::kScales == 2) {
          for (int c = 0; c < 2; ++c) from_zeros[tile][z][c] += share[c] * numbers[i].zero;
        }
      }
    }
#pragma unroll
    for (int step = z * kGroupSteps; step < min((z + 1) * kGroupSteps, Config::kSteps);
         step += 2 * kChunkSteps) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint32_t codes[4];
        load_matrices_transposed(codes, data.entries + Config::kHalfBytes +
                                            code_offset<Config>(block, step / kChunkSteps));
#pragma unroll
        for (int i = 0; i < 2 * kChunkSteps; ++i) {
          const uint32_t* pair = codes + i / kChunkSteps * 2;
          const Operands low = Codes::values(pair[0], i % kChunkSteps);
          const Operands high = Codes::values(pair[1], i % kChunkSteps);
          const uint32_t values[4] = {low.first, low.second, high.first, high.second};
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            mma_16x8x16<__half>(out[tile][step + i], values, probabilities[tile][block]);
          }
        }
      }
    }
  }
}

template <typename Config>
__device__ inline void WarpState<Config>::settle_nan(int z,
                                                     const float (&shares)[kTiles][kBlocks][4],
                                                     Scale (&numbers)[2 * kBlocks]) {
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) {
    if (!isnan(numbers[i].scale)) continue;
    numbers[i] = {0, 0};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int c = 0; c < 2; ++c) {
        if (shares[tile][i / 2][i % 2 * 2 + c] > 0) from_zeros[tile][z][c] = NAN;
      }
    }
  }
}

template <typename Config>
__device__ inline void WarpState<Config>::raise_bound(const TileData& data, int32_t count) {
  float most = 4 * FLT_MIN;
#pragma unroll
  for (int i = 0; i < kGroups * 2 * kBlocks; ++i) {
    most = fmaxf(most, value_scale(data, count, i / (2 * kBlocks), i % (2 * kBlocks)).scale);
  }
  const uint32_t top = __float_as_uint(fmaxf(warp_max(most), bound));
  const float raised = __uint_as_float((top + 0x7fffff) & 0x7f800000);
  const float factor = bound / raised;
  bound = raised;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      for (int i = 0; i < 4; ++i) out[tile][step][i] *= factor;
    }
  }
}

template <typename Config>
__device__ inline Scale WarpState<Config>::value_scale(const TileData& data,
                                                       int32_t count,
                                                       int z,
                                                       int i) {
  const int slot = threadIdx.x % kWarpSize / 4 + 8 * i;
  if (!Config::kHasTails && slot >= count) return {0, 0};  // pages with tails are full
  return load_slot_scale(data.scales + Config::kKeyScaleBytes, slot, z);
}

template <typename Config>
__device__ inline Scale WarpState<Config>::load_slot_scale(uint32_t scales, int slot, int group) {
  return load_scale<typename Config::Format, Element>(scales + slot * Config::kSlotScaleBytes +
                                                      group * Config::Format::kScales * 2);
}

template <typename Config>
__device__ inline void WarpState<Config>::multiply_key_codes(const TileData& data,
                                                             float (&logits)[kTiles][kBlocks][4]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll(Config::kHeadDim <= 128 ? kGroups : 1)
  for (int z = 0; z < kGroups; ++z) {
    float sums[kTiles][kBlocks][4] = {};
#pragma unroll
    for (int step = z * kGroupSteps; step < min((z + 1) * kGroupSteps, Config::kSteps); step += 2) {
      uint32_t operands_of_steps[2][kTiles][2];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        shared_operand(i % kTiles, step + i / kTiles, operands_of_steps[i / kTiles][i % kTiles]);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint32_t codes[4];
        load_matrices(codes, data.entries + code_offset<Config>(block, step));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Operands low = Codes::keys(codes[2 * i]), high = Codes::keys(codes[2 * i + 1]);
          const uint32_t keys[4] = {low.first, high.first, low.second, high.second};
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            mma_16x8x16<__half>(sums[tile][block], keys, operands_of_steps[i][tile]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const Scale scale = load_slot_scale(data.scales, lane / 4 + 8 * i, z);
      const float offset = scale.zero - Codes::kKeyOffset * scale.scale;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float2 query_sum = query_sums[(z * kTiles + tile) * 4 + lane % 4];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = i % 2 * 2 + c;
          float logit = scale.scale * sums[tile][i / 2][at];
          if constexpr (Config::Format::kScales == 2) {
            logit += offset * (c == 0 ? query_sum.x : query_sum.y);
          }
          logits[tile][i / 2][at] = z == 0 ? logit : logits[tile][i / 2][at] + logit;
        }
      }
    }
  }
}

}  // namespace adakv
