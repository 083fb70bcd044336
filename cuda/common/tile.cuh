// Products of two matrices, both with rows of kDim elements: rows that a warp keeps, and rows that
// stream by in shared memory. 16-bit elements go through the tensor cores, float32 does not (its
// rounding there would be too coarse), with the results in the same lanes:
//   sums[m][n][0..1]: kept row 16 m + g,     streamed rows 8 n + 2 t and 8 n + 2 t + 1
//   sums[m][n][2..3]: kept row 16 m + g + 8, the same       (lane 4 g + t)
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/dispatch.cuh"
#include "common/dtype.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"

namespace adakv {

/// Elements from one row to the next in shared memory: 16 bytes more than a row has, so that eight
/// rows side by side lie in different banks.
template <typename Element, int kDim>
constexpr int kRowPitch = kDim + 16 / static_cast<int>(sizeof(Element));

/// 16 bytes to shared memory, or zeros. Completes with the group of copies (see commit_copies).
__device__ inline void copy_16_bytes_or_zeros(uint32_t to, const void* from, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(is_valid ? 16 : 0)
               : "memory");
}

/// The 16 bytes of a row from element `column` on to shared memory, or zeros.
template <typename Element>
__device__ inline void copy_chunk(Element* to,
                                  const Element* row,
                                  int column,
                                  bool is_valid,
                                  bool is_aligned,
                                  const void* anywhere) {
  if (is_aligned) {
    copy_16_bytes_or_zeros(shared_address(to), is_valid ? row + column : anywhere, is_valid);
  } else {
    for (int j = 0; j < 16 / static_cast<int>(sizeof(Element)); ++j) {
      to[j] = is_valid ? row[column + j] : from_float<Element>(0.f);
    }
  }
}

/// Copies rows to shared memory, [num_rows, kRowPitch], by the threads `thread` of `num_threads`.
/// row_of(i) points to `head_dim` elements or is null; what is missing up to kDim becomes zero.
/// Completes with the group of copies. `is_aligned`: rows lie at multiples of 16 bytes.
template <int kDim, typename Element, typename RowOf>
__device__ inline void copy_rows(Element* tile,
                                 int num_rows,
                                 int head_dim,
                                 bool is_aligned,
                                 const void* anywhere,
                                 int thread,
                                 int num_threads,
                                 const RowOf& row_of) {
  constexpr int kChunk = 16 / sizeof(Element), kChunks = kDim / kChunk;
  for (int i = thread; i < num_rows * kChunks; i += num_threads) {
    const int row = i / kChunks, column = i % kChunks * kChunk;
    const auto source = row_of(row);  // a pointer, or what else copy_chunk knows
    const bool is_valid = source && column < head_dim;
    copy_chunk(tile + row * kRowPitch<Element, kDim> + column, source, column, is_valid, is_aligned,
               anywhere);
  }
}

/// The rows that a warp keeps, 16 * kTiles of them, in registers.
template <typename Element, int kDim, int kTiles>
class KeptRows {
 public:
  /// Bytes of shared memory that a warp needs: here to load through, 16 rows at a time.
  static constexpr int kSharedBytes = 16 * kRowPitch<Element, kDim> * sizeof(Element);

  template <typename RowOf>
  __device__ void load(
      void* shared, int head_dim, bool is_aligned, const void* anywhere, const RowOf& row_of) {
    const int lane = threadIdx.x % kWarpSize;
    Element* tile = static_cast<Element*>(shared);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      copy_rows<kDim>(tile, 16, head_dim, is_aligned, anywhere, lane, kWarpSize,
                      [&](int row) { return row_of(16 * m + row); });
      commit_copies();
      wait_copies<0>();
      __syncwarp();
      take(m, tile);
      __syncwarp();
    }
  }

  /// Takes rows 16 m to 16 m + 15, which lie in shared memory, [16, kRowPitch].
  __device__ void take(int m, const Element* tile) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int column = k * 16 + lane / 16 * 8;
      load_matrices(rows_[m][k], shared_address(tile + lane % 16 * kPitch + column));
    }
  }

  /// sums = these rows times 16 streamed rows.
  __device__ void multiply(const Element* streamed, float (&sums)[kTiles][2][4]) const {
    const int lane = threadIdx.x % kWarpSize;
    const int row = lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8;
    const uint32_t address = shared_address(streamed + row * kPitch + column);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][0][i] = sums[m][1][i] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t b[4];
      load_matrices(b, address + k * 16 * static_cast<int>(sizeof(Element)));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma_16x8x16<Element>(sums[m][0], rows_[m][k], {b[0], b[1]});
        mma_16x8x16<Element>(sums[m][1], rows_[m][k], {b[2], b[3]});
      }
    }
  }

  /// The elements of kept rows that lie where sums[m] has them, if the streamed rows were columns
  /// 16 * step .. 16 * step + 15.
  __device__ void columns(int m, int step, float (&elements)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = rows_[m][step][i];
      elements[i / 2][i % 2 * 2] = to_float(half_of(pair, 0));
      elements[i / 2][i % 2 * 2 + 1] = to_float(half_of(pair, 1));
    }
  }

 private:
  static constexpr int kPitch = kRowPitch<Element, kDim>;
  static constexpr int kSteps = kDim / 16;

  __device__ static Element half_of(uint32_t pair, int i) {
    const uint16_t bits = static_cast<uint16_t>(pair >> 16 * i);
    return reinterpret_cast<const Element&>(bits);
  }

  uint32_t rows_[kTiles][kSteps][4];
};

/// The same for float32; the rows stay in shared memory. Sums of sums of a few products round less
/// than one long sum does.
template <int kDim, int kTiles>
class KeptRows<float, kDim, kTiles> {
 public:
  static constexpr int kSharedBytes = 16 * kTiles * kRowPitch<float, kDim> * sizeof(float);

  template <typename RowOf>
  __device__ void load(
      void* shared, int head_dim, bool is_aligned, const void* anywhere, const RowOf& row_of) {
    float* tile = static_cast<float*>(shared);
    const int lane = threadIdx.x % kWarpSize;
    copy_rows<kDim>(tile, 16 * kTiles, head_dim, is_aligned, anywhere, lane, kWarpSize, row_of);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    rows_ = tile + lane / 4 * kPitch;
  }

  __device__ void multiply(const float* streamed, float (&sums)[kTiles][2][4]) const {
    const float* columns = streamed + threadIdx.x % 4 * 2 * kPitch;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][0][i] = sums[m][1][i] = 0.f;
    }
#pragma unroll 1
    for (int k = 0; k < kDim; k += kBlock) {
      float block[kTiles][2][4] = {};
#pragma unroll 2
      for (int i = k; i < k + kBlock; i += 4) add_products(columns + i, i, block);
#pragma unroll
      for (int i = 0; i < 8 * kTiles; ++i) {
        sums[i / 8][i / 4 % 2][i % 4] += block[i / 8][i / 4 % 2][i % 4];
      }
    }
  }

  __device__ void columns(int m, int step, float (&elements)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = 16 * step + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      elements[i / 4][i % 4] = rows_[(16 * m + i % 4 / 2 * 8) * kPitch + column];
    }
  }

 private:
  static constexpr int kPitch = kRowPitch<float, kDim>;
  static constexpr int kBlock = 16;  // products that are summed before they come to the others

  /// Adds the products of four columns from `k` on.
  __device__ void add_products(const float* columns, int k, float (&sums)[kTiles][2][4]) const {
    float4 b[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = load4(columns + (i / 2 * 8 + i % 2) * kPitch);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 a = load4(rows_ + (16 * m + 8 * i) * kPitch + k);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          add_product(sums[m][n][2 * i], a, b[n][0]);
          add_product(sums[m][n][2 * i + 1], a, b[n][1]);
        }
      }
    }
  }

  __device__ static float4 load4(const float* x) { return *reinterpret_cast<const float4*>(x); }

  __device__ static void add_product(float& sum, float4 a, float4 b) {
    sum = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
  }

  const float* rows_ = nullptr;  // this lane's first row
};

/// Calls the body with the row length that tiles of this head dim are padded to.
template <typename Body>
void dispatch_tile_dim(int64_t head_dim, const Body& body) {
  if (head_dim <= 64) return body(IntTag<64>{});
  if (head_dim <= 96) return body(IntTag<96>{});
  if (head_dim <= 128) return body(IntTag<128>{});
  body(IntTag<256>{});
}

}  // namespace adakv
