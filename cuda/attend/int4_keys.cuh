// Keys of int4 in attend's fast kernel. Scales and zeros are those of dimensions, over all slots of a
// tile, which is a page: so they are factors of the query.
//
//   logits[slot, query] = sum over d: (offset + codes[slot, d]) (scale[d] queries[d, query])
//                                   + zero[d] queries[d, query] - offset (scale[d] queries[d, query])
//
// The offset makes codes elements by their exponent alone. What the second line adds is the same for
// all slots: products of which only the rows 0 to 7 are there have it.
//
// A 16-byte chunk of a key has 32 dimensions, of which lane 4 g + t has 8 t to 8 t + 7 of slot g: two
// steps of a product. Operands have them as codes come out of a word: 0 and 4, 1 and 5, 2 and 6, 3 and 7.
#pragma once

#include "attend/codes.cuh"
#include "attend/tiles.cuh"
#include "common/int4_page.cuh"

namespace adakv {

/// Elements 0 to 7 as operands of two steps have them.
struct OrderedChunk {
  uint32_t pairs[4];

  explicit __device__ OrderedChunk(const uint4& x) {
    pairs[0] = __byte_perm(x.x, x.z, 0x5410);
    pairs[1] = __byte_perm(x.x, x.z, 0x7632);
    pairs[2] = __byte_perm(x.y, x.w, 0x5410);
    pairs[3] = __byte_perm(x.y, x.w, 0x7632);
  }
};

/// Products of two pairs of elements.
template <typename Element>
__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  return bits_of(__hmul2(pair_of<Element>(a), pair_of<Element>(b)));
}

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
  constexpr int kTiles = Config::kColumnTiles, kBlocks = Config::kBlocks;
  const int lane = threadIdx.x % kWarpSize;
  float sums[kTiles][kBlocks][4] = {}, from_zeros[kTiles][4] = {}, from_offsets[kTiles][4] = {};
#pragma unroll(kTiles* Config::kHeadDim <= 128 ? Config::kHeadDim / 32 : 1)
  for (int chunk = 0; chunk < Config::kHeadDim / 32; ++chunk) {
    const uint32_t numbers = data.scales + chunk * 64 + lane % 4 * 16;
    const OrderedChunk scales(load_shared_16_bytes(numbers));
    const OrderedChunk zeros(load_shared_16_bytes(numbers + 2 * Config::kHeadDim));
    uint32_t scaled[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 query = queries[(chunk * kTiles + tile) * kWarpSize + lane];
      const uint32_t words[4] = {query.x, query.y, query.z, query.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scaled[tile][i] = multiply_pairs<Element>(words[i], scales.pairs[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        mma_16x8x16<Element>(from_zeros[tile], {zeros.pairs[i], 0, zeros.pairs[i + 1], 0},
                             {words[i], words[i + 1]});
        constexpr uint32_t kOffset = CodeReader<Int4>::kLessKeyOffset<Element>;
        mma_16x8x16<Element>(from_offsets[tile], {kOffset, 0, kOffset, 0},
                             {scaled[tile][i], scaled[tile][i + 1]});
      }
    }
    uint32_t codes[4];  // of slots 0 to 7, 8 to 15, ...
    load_matrices(codes, data.entries + Config::chunk_offset(lane, chunk));
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t low[4], high[4];
      CodeReader<Int4>::keys<Element>(codes[2 * block], low);
      CodeReader<Int4>::keys<Element>(codes[2 * block + 1], high);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t keys[4] = {low[2 * half], high[2 * half], low[2 * half + 1],
                                  high[2 * half + 1]};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint32_t operand[2] = {scaled[tile][2 * half], scaled[tile][2 * half + 1]};
          mma_16x8x16<Element>(sums[tile][block], keys, operand);
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
      const float same = from_zeros[tile][i % 2] + from_offsets[tile][i % 2];
      logits[tile][i / 4][i % 4] = sums[tile][i / 4][i % 4] + same;
    }
  }
}

}  // namespace adakv
