// Keys of int4 in attend's fast kernel. Scales and zeros are those of dimensions, over all slots of a
// tile, which is a page: so they are factors of the query.
//
//   logits[slot, query] = sum over d: codes[slot, d] (scale[d] queries[d, query])
//                                   + zero[d] queries[d, query]
//
// The second line is the same for all slots. Codes come in units of the least number of the dtype
// (codes.cuh), and every other one in 16 of them: sums over these are kept apart.
//
// A 16-byte chunk of a key has 32 dimensions, of which lane 4 g + t has 8 t to 8 t + 7 of slot g: two
// steps of a product. Operands have them as codes come out of a word: 0 and 4, 1 and 5, 2 and 6, 3 and 7.
#pragma once

#include "attend/codes.cuh"
#include "attend/tiles.cuh"
#include "common/int4_page.cuh"

namespace adakv {

/// Products of two pairs of elements.
template <typename Element>
__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  return bits_of(__hmul2(pair_of<Element>(a), pair_of<Element>(b)));
}

/// What sums of products with codes are made logits by.
template <typename Element>
struct KeyUnits {
  static constexpr bool kIsHalf = std::is_same_v<Element, __half>;
  // Queries are larger by it, so that floats hold their products with the least numbers of bf16.
  static constexpr float kQueryUnit = kIsHalf ? 1 : 0x1p64f;
  static constexpr uint32_t kQueryUnits = 0x5f805f80;  // a pair of them, in bf16
  static constexpr float kEven = kIsHalf ? 0x1p24f : 0x1p69f, kOdd = kEven / 16;

  /// Elements 0 and 1, 4 and 5, 2 and 3, 6 and 7: what products with zeros take at once is adjacent.
  static __device__ uint4 query(const uint4& x) {
    if constexpr (kIsHalf) return make_uint4(x.x, x.z, x.y, x.w);
    return make_uint4(
        multiply_pairs<Element>(x.x, kQueryUnits), multiply_pairs<Element>(x.z, kQueryUnits),
        multiply_pairs<Element>(x.y, kQueryUnits), multiply_pairs<Element>(x.w, kQueryUnits));
  }
};

/// Where this lane's row of the matrices of codes lies: 16 slots, chunks `chunk` and `chunk` + 1.
template <typename Config>
__device__ inline uint32_t code_offset(int block, int chunk) {
  const int lane = threadIdx.x % kWarpSize;
  return Config::chunk_offset(16 * block + lane % 16, chunk + lane / 16);
}

/// Products of a tile's keys with queries, which lie in shared memory [D / 32, kColumnTiles, 32].
template <typename Config>
__device__ inline void multiply_int4_keys(
    const TileData& data,
    const uint4* queries,
    float (&logits)[Config::kColumnTiles][Config::kBlocks][4]) {
  using Element = typename Config::Element;
  using Units = KeyUnits<Element>;
  constexpr int kTiles = Config::kColumnTiles, kBlocks = Config::kBlocks;
  const int lane = threadIdx.x % kWarpSize;
  float sums[2][kTiles][kBlocks][4] = {}, from_zeros[2][kTiles][4] = {};
#pragma unroll(kTiles* Config::kHeadDim <= 128 ? Config::kHeadDim / 32 : 1)
  for (int chunk = 0; chunk < Config::kHeadDim / 32; ++chunk) {
    const uint32_t numbers = data.scales + chunk * 64 + lane % 4 * 16;
    const uint4 scales = load_shared_16_bytes(numbers);
    const uint4 zeros = load_shared_16_bytes(numbers + 2 * Config::kHeadDim);
    uint32_t operands[2][kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 query = queries[(chunk * kTiles + tile) * kWarpSize + lane];
      // Rows 0 to 7 of the first are zeros of elements 0, 1, 4 and 5, rows 8 to 15 of the second
      // those of 2, 3, 6 and 7.
      const uint32_t rows[4] = {zeros.x, zeros.y, zeros.z, zeros.w};
      mma_16x8x16<Element>(from_zeros[0][tile], rows, {query.x, query.y});
      mma_16x8x16<Element>(from_zeros[1][tile], rows, {query.z, query.w});
      const uint32_t first = multiply_pairs<Element>(query.x, scales.x);
      const uint32_t second = multiply_pairs<Element>(query.z, scales.y);
      const uint32_t third = multiply_pairs<Element>(query.y, scales.z);
      const uint32_t fourth = multiply_pairs<Element>(query.w, scales.w);
      operands[0][tile][0] = __byte_perm(first, third, 0x5410);
      operands[1][tile][0] = __byte_perm(first, third, 0x7632);
      operands[0][tile][1] = __byte_perm(second, fourth, 0x5410);
      operands[1][tile][1] = __byte_perm(second, fourth, 0x7632);
    }
    uint32_t codes[4];  // of slots 0 to 7, 8 to 15, ...
    load_matrices(codes, data.entries + Config::chunk_offset(lane, chunk));
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t low[4], high[4];
      CodeReader<Int4>::keys(codes[2 * block], low);
      CodeReader<Int4>::keys(codes[2 * block + 1], high);
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t keys[4] = {low[odd], high[odd], low[2 + odd], high[2 + odd]};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_16x8x16<Element>(sums[odd][tile][block], keys, operands[odd][tile]);
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float same[2];
    for (int c = 0; c < 2; ++c) {
      same[c] = (from_zeros[0][tile][c] + from_zeros[1][tile][2 + c]) / Units::kQueryUnit;
    }
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
      const float even = sums[0][tile][i / 4][i % 4], odd = sums[1][tile][i / 4][i % 4];
      logits[tile][i / 4][i % 4] = even * Units::kEven + (odd * Units::kOdd + same[i % 2]);
    }
  }
}

}  // namespace adakv
