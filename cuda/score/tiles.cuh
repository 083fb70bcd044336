// The tiles of score's kernels for any device: how rows and entries are dealt to warps, and how
// queries and keys come to them.
#pragma once

#include "common/tile.cuh"
#include "score/keys.cuh"
#include "score/score.cuh"

namespace adakv {

/// Sizes of one CTA: kRowWarps warps side by side on the rows of a chunk, kEntryWarps on entries. A
/// warp's rows are kUnits units of kUnit rows.
template <typename Element_, int kDim_>
struct ScoreTile {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr int kRowBytes = kDim * sizeof(Element);
  static constexpr bool kIsFloat = sizeof(Element) == 4;
  static constexpr int kUnits = kIsFloat || kDim > 128 ? 1 : 2;
  static constexpr int kUnit = kIsFloat ? 16 : 32, kUnitTiles = kUnit / 16;
  static constexpr int kTiles = kUnits * kUnitTiles;
  static constexpr int kRowWarps = kRowBytes > 512 ? 2 : 4 / kUnits;
  static constexpr int kEntryWarps = kRowBytes > 256 ? 1 : 2;
  static constexpr int kRows = kRowWarps * kUnits * kUnit;
  static constexpr int kWarpEntries = 32;
  static constexpr int kEntries = kEntryWarps * kWarpEntries;  // of a tile
  static constexpr int kStages = kIsFloat ? 2 : 4;
  static constexpr int kWarps = kRowWarps * kEntryWarps, kThreads = kWarps * kWarpSize;
  static constexpr int kCtas = kRowBytes > 256 ? 1 : 2;  // of a multiprocessor, at least
  static constexpr int kPitch = kRowPitch<Element, kDim>;
  static constexpr int kStageElements = kEntries * kPitch;

  using Kept = KeptRows<Element, kDim, kTiles>;
  static constexpr size_t kStageBytes = kStages * kStageElements * sizeof(Element);
  // 16-bit queries only pass through the last stages, while the first ones are filled.
  static constexpr int kQueryStages = kIsFloat ? 0 : (kRows + kEntries - 1) / kEntries;
  static constexpr size_t kKeptBytes = kIsFloat ? kWarps * Kept::kSharedBytes : 0;
  static constexpr size_t kSharedBytes = kStageBytes + kKeptBytes;
  static_assert(kQueryStages <= kStages, "the queries don't fit");
};

/// Where a warp works: its first row in the chunk's rows, its first entry in a tile.
template <typename Tile>
struct Place {
  int warp, lane, row_warp, entry, row_in_chunk, first_row;

  __device__ Place() {
    warp = threadIdx.x / kWarpSize;
    lane = threadIdx.x % kWarpSize;
    row_warp = warp % Tile::kRowWarps;
    entry = warp / Tile::kRowWarps * Tile::kWarpEntries;
    row_in_chunk = row_warp * Tile::kUnits * Tile::kUnit;
    first_row = blockIdx.y * Tile::kRows + row_in_chunk;
  }
};

/// Tiles of keys that a CTA works on: they start with entry `first`, which may be negative. What is
/// not in [0, limit) becomes zeros.
struct KeyTiles {
  int32_t first, count, limit;
};

/// Brings tiles of a head's keys to shared memory, one after the other, [kEntries, kPitch]. Each
/// thread copies the same 16 bytes of some rows.
template <typename Tile>
class KeyLoader {
 public:
  using Element = typename Tile::Element;

  __device__ KeyLoader(const ScoreParams& params,
                       const ScoreRow& row,
                       const KeyTiles& tiles,
                       Element* stages)
      : params_(params),
        row_(row),
        stages_(stages),
        entry_(tiles.first + thread_row()),
        limit_(tiles.limit) {
    head_ = static_cast<const Element*>(params.keys) + row.b * params.key_stride[0] +
            row.h * params.key_stride[1];
    source_ = head_ + entry_ * params.key_stride[2] + column();
    step_ = kRowStep * params.key_stride[2];
  }

  /// Copies the next tile to a stage.
  __device__ void load(int stage) {
    if (threadIdx.x % kLanes * kChunk >= Tile::kDim) return;
    Element* to = stages_ + stage * Tile::kStageElements + thread_row() * Tile::kPitch + column();
    const bool has_column = column() < params_.head_dim;
    if (params_.held.pages) return load_held(to, has_column);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      copy(to + i * kRowStep * Tile::kPitch, has_column && is_inside(entry_));
      entry_ += kRowStep;
      source_ += step_;
    }
  }

 private:
  static constexpr int kChunk = 16 / sizeof(Element);
  static constexpr int kLanes = Tile::kDim / kChunk <= 8    ? 8
                                : Tile::kDim / kChunk <= 16 ? 16
                                : Tile::kDim / kChunk <= 32 ? 32
                                                            : 64;
  static constexpr int kRowStep = Tile::kThreads / kLanes;
  static constexpr int kRows = Tile::kEntries / kRowStep;  // of a thread in a tile
  static_assert(Tile::kThreads % kLanes == 0 && Tile::kEntries % kRowStep == 0, "whole rows");

  __device__ static int thread_row() { return threadIdx.x / kLanes; }
  __device__ static int column() { return threadIdx.x % kLanes * kChunk; }

  __device__ bool is_inside(int32_t entry) const { return static_cast<uint32_t>(entry) < limit_; }

  /// Copies a tile's rows of pages. All that a thread waits for is on its way before the first is
  /// used: the numbers of the pages, then codes.
  __device__ void load_held(Element* to, bool has_column) {
    int32_t pages[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t t = entry_ + i * kRowStep;
      pages[i] = has_column && is_inside(t) ? page_of(params_.held, row_.b, row_.h, t) : -1;
    }
    const auto key = [&](int i) {
      return key_in_page<Element>(params_, max(pages[i], 0), entry_ + i * kRowStep);
    };
    const auto target = [&](int i) { return to + i * kRowStep * Tile::kPitch; };
    if (params_.held.key_scales.data == nullptr) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        copy_chunk(target(i), key(i), column(), pages[i] >= 0, params_.is_aligned, params_.keys);
      }
    } else if constexpr (sizeof(Element) == 2) {
      KeyCodes codes[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        codes[i] = pages[i] >= 0 ? codes_of(key(i), column()) : KeyCodes{};
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        *reinterpret_cast<uint4*>(target(i)) = decoded<Element>(codes[i], params_.is_fp8);
      }
    }
    entry_ += kRows * kRowStep;
  }

  __device__ void copy(Element* to, bool is_valid) const {
    if (params_.is_aligned) {
      copy_16_bytes_or_zeros(shared_address(to), is_valid ? source_ : head_, is_valid);
    } else {
      for (int j = 0; j < kChunk; ++j) to[j] = is_valid ? source_[j] : from_float<Element>(0.f);
    }
  }

  const ScoreParams& params_;
  const ScoreRow& row_;
  Element* stages_;
  int32_t entry_;
  uint32_t limit_;
  const Element *head_, *source_;
  int64_t step_;
};

/// Fetches a warp's rows of queries, and calls compute(i, keys) for tile after tile, all threads
/// together.
template <typename Tile, typename Compute>
__device__ void for_each_tile(const ScoreParams& params,
                              const ScoreRow& row,
                              const KeyTiles& tiles,
                              char* memory,
                              typename Tile::Kept& queries,
                              const Compute& compute) {
  using Element = typename Tile::Element;
  const Place<Tile> place;
  Element* stages = reinterpret_cast<Element*>(memory);
  KeyLoader<Tile> keys(params, row, tiles, stages);
  const auto query = [&](int r) { return query_row<Element>(params, row, r); };
  const auto load = [&](int32_t i) {
    if (i < tiles.count) keys.load(i % Tile::kStages);
    commit_copies();
  };
  constexpr int kFirst = Tile::kStages - (Tile::kIsFloat ? 1 : Tile::kQueryStages);
  if constexpr (Tile::kIsFloat) {
    char* kept = memory + Tile::kStageBytes + place.warp * Tile::Kept::kSharedBytes;
    queries.load(kept, params.head_dim, params.is_aligned, params.queries,
                 [&](int i) { return query(place.first_row + i); });
    for (int i = 0; i < kFirst; ++i) load(i);
  } else {
    Element* rows = stages + (Tile::kStages - Tile::kQueryStages) * Tile::kStageElements;
    copy_rows<Tile::kDim>(rows, Tile::kRows, params.head_dim, params.is_aligned, params.queries,
                          threadIdx.x, Tile::kThreads,
                          [&](int i) { return query(blockIdx.y * Tile::kRows + i); });
    commit_copies();
    for (int i = 0; i < kFirst; ++i) load(i);
    wait_copies<kFirst>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < Tile::kTiles; ++m) {
      queries.take(m, rows + (place.row_in_chunk + 16 * m) * Tile::kPitch);
    }
  }
  __syncthreads();
  for (int i = kFirst; i < Tile::kStages - 1; ++i) load(i);
  for (int32_t i = 0; i < tiles.count; ++i) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();
    load(i + Tile::kStages - 1);
    compute(i, stages + i % Tile::kStages * Tile::kStageElements);
  }
}

/// tanh(x) as exact as elements are: tanhf is off by two units in the last place, which a cap makes
/// more of.
template <typename Element>
__device__ inline float capped(float x) {
  return sizeof(Element) == 4 ? static_cast<float>(tanh(static_cast<double>(x))) : tanhf(x);
}

/// The logits of a warp's kept rows (queries, or keys) and 16 rows in shared memory, still to be
/// multiplied to get z.
template <typename Tile>
__device__ inline void logits(const ScoreParams& params,
                              const typename Tile::Kept& kept,
                              const typename Tile::Element* streamed,
                              float (&x)[Tile::kTiles][2][4]) {
  kept.multiply(streamed, x);
  if (params.softcap == 0.f) return;
#pragma unroll
  for (int i = 0; i < 8 * Tile::kTiles; ++i) {
    float& logit = x[i / 8][i / 4 % 2][i % 4];
    logit = params.softcap * capped<typename Tile::Element>(logit * params.cap_scale);
  }
}

/// Takes four logits z into each row's maximum and sum. New maxima get rare.
template <int kRows>
__device__ inline void add_logits(float2 (&sums)[kRows], const float (&z)[kRows][4]) {
  float highest[kRows];
  bool grows = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    highest[r] = fmaxf(fmaxf(z[r][0], z[r][1]), fmaxf(z[r][2], z[r][3]));
    grows |= highest[r] > sums[r].x;
  }
  if (__any_sync(kFullWarp, grows)) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float maximum = fmaxf(sums[r].x, highest[r]);
      sums[r].y *= fast_exp2(sums[r].x - maximum);
      sums[r].x = maximum;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    sums[r].y += (fast_exp2(z[r][0] - sums[r].x) + fast_exp2(z[r][1] - sums[r].x)) +
                 (fast_exp2(z[r][2] - sums[r].x) + fast_exp2(z[r][3] - sums[r].x));
  }
}

}  // namespace adakv
