// The fast attend kernel: decode attention over ragged pages, one block per worker of the schedule.
//
// A tile is 16 slots of a page, keys and values. Each warp takes every kWarps-th tile of its worker's
// range and keeps kStages of them under way in a pipeline of its own, so that nothing waits for the
// slowest warp before a row ends. Products have slots as their 16 rows and queries as their 8
// columns:
//
//   logits[slot, query] = keys[slot, :] queries[:, query]         keys are A, queries stay in B
//   out[:, query]      += values[:, slot] probability[slot, query] values are A, read transposed
//
// At the end of a row the warps' results (maximum, sum, out) meet in shared memory. If several
// workers share the row, each writes a partial result, and the one that arrives last adds them up in
// the order of the workers: the same bits whoever it is.
//
// Loads bypass the caches' memory (evict first): without that other data leaves L2, 5 us at 16 x 1024.
// One block of 8 warps per multiprocessor was best of 4 to 16 warps and 1 to 4 blocks.
#pragma once

#include <algorithm>
#include <cmath>

#include "attend.h"
#include "common/async_copy.cuh"
#include "common/check.cuh"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/tensor_map.h"

namespace adakv {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kTileShift = 4, kTileSlots = 1 << kTileShift;

/// Sizes of one instance. Boxes: tiles come by the bulk copy engine into most of the shared memory
/// of sm_90; else by 16-byte copies into as much as every device has.
template <typename Element_, int kHeadDim_, int kQueries_, bool kCopiesBoxes_>
struct AttendConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kQueries = kQueries_;
  static constexpr bool kCopiesBoxes = kCopiesBoxes_;
  static constexpr int kSteps = kHeadDim / 16;             // of the products along the head dim
  static constexpr int kColumnTiles = (kQueries + 7) / 8;  // of 8 queries
  // The appending warp makes it 8 at most where registers are short.
  static constexpr int kWarps =
      kCopiesBoxes ? (kHeadDim > 128 ? 4 : kColumnTiles > 1 ? 7 : 8) : (kHeadDim > 128 ? 2 : 4);
  static constexpr int kThreads = kWarps * kWarpSize;  // one more warp appends
  static constexpr bool kHoldsQueries = kSteps * kColumnTiles <= 16;  // in registers
  static constexpr int kImages = kQueries <= 4 ? 2 : 1;

  static constexpr int kEntryChunks = kHeadDim / 8;  // of 16 bytes
  static constexpr int kHalfBytes = kTileSlots * kHeadDim * 2;
  static constexpr int kTileBytes = 2 * kHalfBytes;
  static constexpr int kImageStride = kHeadDim + 4;  // floats; keeps the warps' stores apart

  static constexpr int kMostBytes = kCopiesBoxes ? 227 << 10 : 99 << 10;
  static constexpr int kOtherBytes =
      kImages * kWarps * kQueries * (kImageStride + 2) * 4 + 1024;  // and barriers
  static constexpr int kStages = std::min(5, (kMostBytes - kOtherBytes) / (kWarps * kTileBytes));
  static_assert(kStages >= 2, "loads would not overlap");

  // The layout of a half tile: boxes of kBoxColumns columns, one after the other, in which the
  // 16-byte chunks of a row are swapped as the copy engine does it, so that eight rows of one chunk
  // lie in different banks.
  static constexpr int kBoxColumns = kHeadDim % 64 == 0 ? 64 : kHeadDim % 32 == 0 ? 32 : 16;
  static constexpr int kBoxChunks = kBoxColumns / 8;

  static __device__ uint32_t chunk_offset(int slot, int chunk) {
    const int box = chunk / kBoxChunks, in_box = chunk % kBoxChunks;
    const int swapped = in_box ^ (slot / (8 / kBoxChunks) % kBoxChunks);
    return ((box * kTileSlots + slot) * kBoxChunks + swapped) * 16;
  }
};

template <typename Config>
struct alignas(1024) AttendShared {
  uint8_t tiles[Config::kWarps][Config::kStages][Config::kTileBytes];
  float image[Config::kImages][Config::kWarps][Config::kQueries][Config::kImageStride];
  float2 max_sum[Config::kImages][Config::kWarps][Config::kQueries];
  uint64_t barriers[Config::kWarps][Config::kStages];
  int32_t is_last;
};

/// Units [begin, end) of a worker, as one warp walks over them: tile i of the warp is tile
/// warp + i * kWarps of the range.
struct Range {
  int32_t begin, end, row;
  const int32_t* listed;    // page ids of the first units
  int32_t num_listed;
  int32_t page_shift;  // a page has 1 << page_shift tiles
};

/// Page ids of a warp's tiles: lane l holds that of tile (i & ~31) + l. The first come with the
/// worker; others take two round trips to find, so they are looked up while tiles are under way.
template <typename Config>
class PageIds {
 public:
  __device__ PageIds(const AttendParams& p, const Range& range, int32_t num_tiles)
      : p_(p), range_(range), num_tiles_(num_tiles), row_(range.row) {
    const int32_t offset = unit_offset(0);
    current_ = offset < range.num_listed ? __ldg(range.listed + offset) : 0;
  }

  /// Page of tile i; for i = 0, 1, ... in turn.
  __device__ int32_t operator[](int32_t i) {
    if (i % kWarpSize == 0 && i > 0) current_ = next_;
    return __shfl_sync(kFullWarp, current_, i % kWarpSize);
  }

  /// Looks up what later tiles need; called after tile i, from i = kStages on.
  __device__ void look_ahead(int32_t i) {
    const bool is_first = i == Config::kStages;
    if (!is_first && i % kWarpSize != kLead) return;
    const int32_t block = is_first ? 0 : i - kLead + kWarpSize;
    const int32_t tile = block + threadIdx.x % kWarpSize, offset = unit_offset(block);
    const bool is_missing = tile < num_tiles_ && offset >= range_.num_listed;
    int32_t id = offset < range_.num_listed ? __ldg(range_.listed + offset) : 0;
    if (__any_sync(kFullWarp, is_missing)) look_up(range_.begin + offset, is_missing, id);
    (is_first ? current_ : next_) = id;
  }

 private:
  static constexpr int kLead = 8;  // the next ids are fetched when so many are used up
  static_assert(Config::kStages < kLead);
  static_assert((Config::kStages + 1) * Config::kWarps <= schedule::kWorkerPages,
                "the tiles before the first look ahead are listed");

  __device__ int32_t unit_offset(int32_t block) const {
    const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    return (warp + (block + lane) * Config::kWarps) >> range_.page_shift;
  }

  /// Pages of ascending units, where needed. Each lane reads one row's facts, then each finds the
  /// row of its unit among them; again with the next rows until all have.
  __device__ void look_up(int32_t unit, bool is_needed, int32_t& id) {
#pragma unroll 1
    while (true) {
      const int32_t row = min(row_ + static_cast<int32_t>(threadIdx.x) % kWarpSize, p_.num_rows - 1);
      const int4 facts = __ldcg(reinterpret_cast<const int4*>(p_.rows + row));  // begin, end, length
      int32_t before = 0;
#pragma unroll
      for (int step = kWarpSize / 2; step > 0; step /= 2) {
        if (__shfl_sync(kFullWarp, facts.y, before + step - 1) <= unit) before += step;
      }
      const int32_t begin = __shfl_sync(kFullWarp, facts.x, before);
      const int32_t end = __shfl_sync(kFullWarp, facts.y, before);
      const int32_t length = __shfl_sync(kFullWarp, facts.z, before);
      if (is_needed && unit < end) {
        id = page_of(row_ + before, unit - begin, length);
        is_needed = false;
      }
      if (!__any_sync(kFullWarp, is_needed)) return;
      row_ += kWarpSize;
    }
  }

  __device__ int32_t page_of(int32_t row, int32_t index, int32_t length) const {
    const LayerRows& layer = p_.layer;
    const int32_t b = p_.num_heads.quotient(row), h = p_.num_heads.remainder(row);
    if (p_.append.keys.data) {
      const int32_t used = layer.num_pages(length - p_.new_tokens(b));
      if (index >= used) return layer.fresh_pages.at(b, h)[index - used];
    }
    return layer.block_table.at(b, h)[index];
  }

  const AttendParams& p_;
  const Range& range_;
  int32_t num_tiles_, row_;
  int32_t current_ = 0, next_ = 0;
};

/// The pipeline of one warp's tiles.
template <typename Config>
class TilePipeline {
 public:
  __device__ TilePipeline(const AttendParams& p, const Range& range, AttendShared<Config>& shared)
      : p_(p),
        warp_(threadIdx.x / kWarpSize),
        num_tiles_((((range.end - range.begin) << range.page_shift) - warp_ + Config::kWarps - 1) /
                   Config::kWarps),
        page_shift_(range.page_shift),
        tiles_(shared_address(shared.tiles[warp_])),
        barriers_(shared_address(shared.barriers[warp_])),
        policy_(read_once_policy()),
        ids_(p, range, num_tiles_) {
#pragma unroll 1
    for (int i = 0; i < Config::kStages; ++i) start(i);
  }

  /// Shared memory of tile i, once it is there.
  __device__ uint32_t wait(int32_t i) {
    const int stage = i % Config::kStages;
    if constexpr (Config::kCopiesBoxes) {
      wait_barrier(barriers_ + stage * 8, i / Config::kStages % 2);
    } else {
      wait_copies<Config::kStages - 1>();
      __syncwarp();
    }
    return tiles_ + stage * Config::kTileBytes;
  }

  /// Tile i is done with; starts the one that takes its place.
  __device__ void release(int32_t i) {
    const int32_t next = i + Config::kStages;
    __syncwarp();
    start(next);
    if (next < num_tiles_) ids_.look_ahead(next);
  }

 private:
  __device__ void start(int32_t i) {
    if (i < num_tiles_) {
      const int32_t page = ids_[i];
      const int32_t tile = (warp_ + i * Config::kWarps) & ((1 << page_shift_) - 1);
      const int stage = i % Config::kStages;
      const uint32_t to = tiles_ + stage * Config::kTileBytes;
      if constexpr (Config::kCopiesBoxes) {
        const int32_t row = ((page * 2 << page_shift_) + tile) * kTileSlots;
        if (threadIdx.x % kWarpSize == 0) {
          copy_box(to, &p_.page_map, {0, row, 0, 0}, Config::kTileBytes, barriers_ + stage * 8,
                   policy_);
        }
      } else {
        copy_chunks(to, p_.layer.key(page, tile * kTileSlots));
      }
    }
    if constexpr (!Config::kCopiesBoxes) commit_copies();
  }

  __device__ void copy_chunks(uint32_t to, const char* keys) const {
    constexpr int kHalfChunks = kTileSlots * Config::kEntryChunks;
#pragma unroll
    for (int first = 0; first < 2 * kHalfChunks; first += kWarpSize) {
      const int i = first + threadIdx.x % kWarpSize, in_half = i % kHalfChunks;
      const char* from = keys + in_half * 16 + (i / kHalfChunks) * p_.layer.half_page_bytes();
      const uint32_t offset =
          Config::chunk_offset(in_half / Config::kEntryChunks, in_half % Config::kEntryChunks);
      copy_16_bytes(to + i / kHalfChunks * Config::kHalfBytes + offset, from, policy_);
    }
  }

  const AttendParams& p_;
  int warp_;
  int32_t num_tiles_, page_shift_;
  uint32_t tiles_, barriers_;
  uint64_t policy_;
  PageIds<Config> ids_;
};

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

  /// Takes in the tile of slots `first_slot` on.
  __device__ void add_tile(const AttendParams& p, uint32_t tile_data, int32_t first_slot) {
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
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      uint32_t values[4];
      load_matrices_transposed(values, tile_data + Config::kHalfBytes +
                                           Config::chunk_offset(slot, 2 * step + chunk));
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

/// Puts the slots that aren't in the page yet into the tile: new tokens from the arguments, zeros
/// behind them (there the page may hold NaN, which probability 0 doesn't cancel).
template <typename Config>
__device__ inline void patch_tile(const AttendParams& p,
                                  const RowContext& row,
                                  int32_t first_slot,
                                  uint32_t tile_data) {
  const int32_t begin = max(0, row.settled - first_slot);
  const int32_t num_chunks = (kTileSlots - begin) * 2 * Config::kEntryChunks;
#pragma unroll 1
  for (int32_t i = threadIdx.x % kWarpSize; i < num_chunks; i += kWarpSize) {
    const int32_t chunk = i % Config::kEntryChunks, half = i / Config::kEntryChunks % 2;
    const int32_t slot = begin + i / (2 * Config::kEntryChunks);
    uint4 data = make_uint4(0, 0, 0, 0);
    if (first_slot + slot < row.length) {
      const EntryRows& source = half ? p.append.values : p.append.keys;
      const int32_t token = p.num_tokens - (row.length - (first_slot + slot));
      data = __ldg(reinterpret_cast<const uint4*>(source.at(row.b, row.h, token)) + chunk);
    }
    const uint32_t to = tile_data + half * Config::kHalfBytes + Config::chunk_offset(slot, chunk);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(data.x), "r"(data.y),
                 "r"(data.z), "r"(data.w)
                 : "memory");
  }
  fence_before_boxes();
  __syncwarp();
}

/// Part of the result for one query: four of its columns.
struct Part {
  float max, sum;
  float4 out;

  static __device__ Part none() { return {-INFINITY, 0.f, make_float4(0, 0, 0, 0)}; }

  __device__ void add(const Part& part) {
    const float most = fmaxf(max, part.max), base = most == -INFINITY ? 0.f : most;
    const float mine = fast_exp2(max - base), other = fast_exp2(part.max - base);
    max = most;
    sum = sum * mine + part.sum * other;
    out.x = out.x * mine + part.out.x * other;
    out.y = out.y * mine + part.out.y * other;
    out.z = out.z * mine + part.out.z * other;
    out.w = out.w * mine + part.out.w * other;
  }
};

/// The end of a row: brings together what warps and workers found out about it.
template <typename Config>
class RowEnd {
 public:
  static constexpr int kQuads = Config::kHeadDim / 4;          // columns by four
  static constexpr int kAllQuads = Config::kQueries * kQuads;  // of all queries

  __device__ RowEnd(const AttendParams& p,
                    const RowContext& row,
                    AttendShared<Config>& shared,
                    int image)
      : p_(p),
        row_(row),
        image_(shared.image[image]),
        max_sum_(shared.max_sum[image]),
        is_last_(shared.is_last) {}

  /// All warps have stored their results, or are about to: barrier first.
  __device__ void run(const schedule::RowFacts& facts, int32_t row_index, bool cuts_rows) {
    bool is_whole = !cuts_rows || facts.num_partials <= 1;
    wait_for_warps();
#pragma unroll 1
    while (true) {  // at most twice: the same code adds up warps and workers, and stays small
#pragma unroll 1
      for (int i = threadIdx.x; i < kAllQuads; i += Config::kThreads) {
        const int query = i / kQuads, column = i % kQuads * 4;
        if (query >= row_.num_queries) break;
        const Part part = add_warps(query, column);
        if (is_whole) {
          finish(query, column, part);
        } else {
          publish(facts.first_partial + blockIdx.x - facts.first_worker, i, part);
        }
      }
      if (is_whole) return;
      wait_for_warps();
      if (threadIdx.x == 0) is_last_ = arrive(row_index, facts.num_partials);
      wait_for_warps();
      if (!is_last_) return;
      gather(facts.first_partial, facts.num_partials);
      wait_for_warps();
      is_whole = true;
    }
  }

  /// A barrier for the warps that attend.
  static __device__ void wait_for_warps() {
    asm volatile("bar.sync 1, %0;" ::"n"(Config::kThreads) : "memory");
  }

  /// Writes four columns of a query's result.
  __device__ void finish(int query, int column, const Part& part) const {
    const int32_t number = row_.first_query + query, token = p_.group.quotient(number);
    const int32_t head = row_.h * p_.group.value + p_.group.remainder(number);
    float factor = 0, lse = -INFINITY;
    if (token >= p_.num_tokens - p_.new_tokens(row_.b) && part.max != -INFINITY) {
      const float sink = p_.sink_logits ? p_.sink_logits[head] * kLog2e : -INFINITY;
      const float most = fmaxf(part.max, sink), share = fast_exp2(part.max - most);
      const float sum = part.sum * share + fast_exp2(sink - most);
      factor = share / sum;
      lse = (most + log2f(sum)) * kLn2;
    }
    using Element = typename Config::Element;
    const float4 x = part.out;
    uint2 packed = make_uint2(0, 0);
    if (factor != 0) {
      packed.x = pack<Element>(x.x * factor, x.y * factor);
      packed.y = pack<Element>(x.z * factor, x.w * factor);
    }
    char* to = p_.out.at(row_.b, head, token) + column * 2;
    *reinterpret_cast<uint2*>(to) = packed;
    if (column == 0 && p_.lse.data) {
      *reinterpret_cast<float*>(p_.lse.at(row_.b, head, token)) = lse;
    }
  }

 private:
  __device__ Part add_warps(int query, int column) const {
    Part part = Part::none();
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) part.max = fmaxf(part.max, max_sum_[w][query].x);
    const float base = part.max == -INFINITY ? 0.f : part.max;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) {
      const float2 max_sum = max_sum_[w][query];
      const float factor = fast_exp2(max_sum.x - base);
      const float4 x = *reinterpret_cast<const float4*>(&image_[w][query][column]);
      part.sum += factor * max_sum.y;
      part.out.x += factor * x.x;
      part.out.y += factor * x.y;
      part.out.z += factor * x.z;
      part.out.w += factor * x.w;
    }
    return part;
  }

  __device__ float4* partial_out(int32_t slot) const {
    return reinterpret_cast<float4*>(p_.partials) + int64_t{slot} * kAllQuads;
  }

  __device__ float2* partial_max_sum(int32_t slot) const {
    return reinterpret_cast<float2*>(partial_out(p_.max_partials)) + slot * Config::kQueries;
  }

  __device__ void publish(int32_t slot, int quad, const Part& part) const {
    partial_out(slot)[quad] = part.out;
    if (quad % kQuads == 0) {
      partial_max_sum(slot)[quad / kQuads] = make_float2(part.max, part.sum);
    }
  }

  /// Counts this worker in; true for the last one, to whom all partial results are visible then.
  __device__ bool arrive(int32_t row_index, int32_t num_partials) const {
    int32_t* counter = p_.rows[row_index].unused;
    int32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    const bool is_last = before == num_partials - 1;
    if (is_last) *counter = 0;  // the schedule serves again
    return is_last;
  }

  /// Partial results to images: warp w adds up those of workers w, w + kWarps, ...
  __device__ void gather(int32_t first_partial, int32_t num_partials) {
    constexpr int kPerLane = std::min(4, (kAllQuads + kWarpSize - 1) / kWarpSize), kAtOnce = 2;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int block = 0; block < kAllQuads; block += kPerLane * kWarpSize) {
      Part total[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) total[j] = Part::none();
#pragma unroll 1
      for (int32_t i = warp; i < num_partials; i += kAtOnce * Config::kWarps) {
        Part parts[kAtOnce][kPerLane];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int32_t slot = first_partial + min(i + k * Config::kWarps, num_partials - 1);
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) {
            const int quad = min(block + j * kWarpSize + lane, kAllQuads - 1);
            const float2 max_sum = __ldcg(partial_max_sum(slot) + quad / kQuads);
            parts[k][j] = {max_sum.x, max_sum.y, __ldcg(partial_out(slot) + quad)};
          }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (i + k * Config::kWarps >= num_partials) break;
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) total[j].add(parts[k][j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int quad = block + j * kWarpSize + lane, query = quad / kQuads;
        if (quad >= kAllQuads) break;
        *reinterpret_cast<float4*>(&image_[warp][query][quad % kQuads * 4]) = total[j].out;
        if (quad % kQuads == 0) max_sum_[warp][query] = make_float2(total[j].max, total[j].sum);
      }
    }
  }

  const AttendParams& p_;
  const RowContext& row_;
  float (&image_)[Config::kWarps][Config::kQueries][Config::kImageStride];
  float2 (&max_sum_)[Config::kWarps][Config::kQueries];
  int32_t& is_last_;
};

/// Rows without entries have no worker: out is 0, lse -inf. By one warp of each block.
template <typename Config>
__device__ inline void clear_empty_rows(const AttendParams& p, bool cuts_rows) {
  const int32_t lane = threadIdx.x % kWarpSize;
  const int32_t end = cuts_rows ? p.num_rows : blockIdx.x + 1;
#pragma unroll 1
  for (int32_t r = blockIdx.x + lane * gridDim.x; r < end; r += kWarpSize * gridDim.x) {
    if (p.rows[r].begin < p.rows[r].end) continue;
    const RowContext row = row_context<Config>(p, r, 0);
#pragma unroll 1
    for (int i = 0; i < row.num_queries * Config::kHeadDim; ++i) {
      const int32_t query = row.first_query + i / Config::kHeadDim, column = i % Config::kHeadDim;
      const int32_t head = row.h * p.group.value + p.group.remainder(query);
      const int32_t token = p.group.quotient(query);
      reinterpret_cast<uint16_t*>(p.out.at(row.b, head, token))[column] = 0;
      if (column > 0 || !p.lse.data) continue;
      *reinterpret_cast<float*>(p.lse.at(row.b, head, token)) = -INFINITY;
    }
  }
}

__device__ inline schedule::RowFacts load_facts(const void* facts) {
  const int4 first = __ldg(static_cast<const int4*>(facts));
  const int4 second = __ldg(static_cast<const int4*>(facts) + 1);
  return {first.x, first.y, first.z, first.w, second.x, second.y, {0, 0}};
}

// grid: [num_workers] if rows are cut, else [num_rows, blocks of queries]; one block: the units of a
// worker, or of a row. The warp behind kWarps, if there is one, appends.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads + kWarpSize, 1)
    attend_kernel(const __grid_constant__ AttendParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  AttendShared<Config>& shared = *reinterpret_cast<AttendShared<Config>*>(memory);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const bool cuts_rows = gridDim.y == 1;
  if (warp < Config::kWarps && Config::kCopiesBoxes) {
    if (lane == 0) prefetch_map(&p.page_map);
    if (lane < Config::kStages) init_barrier(shared_address(&shared.barriers[warp][lane]));
    fence_barriers();
    __syncwarp();
  }
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (warp == Config::kWarps) {
#pragma unroll 1
    for (int32_t b = blockIdx.x; b < p.append.batch; b += gridDim.x) {
      append_entries<uint4>(p.append, b, {0, 1, 0, 1});
      __syncwarp();
      count_appended(p.append, b, lane, kWarpSize);
    }
    return;
  }

  Range range = {};
  range.page_shift = p.layer.page_shift - kTileShift;
  schedule::RowFacts facts;
  if (cuts_rows) {
    const schedule::Worker* worker = p.workers + blockIdx.x;
    const int4 header = __ldg(reinterpret_cast<const int4*>(worker));
    facts = load_facts(&worker->facts);
    range.begin = header.x;
    range.end = header.y;
    range.row = header.z;
    range.listed = worker->pages;
    range.num_listed = schedule::kWorkerPages;
  } else {
    facts = load_facts(p.rows + blockIdx.x);
    range.begin = facts.begin;
    range.end = facts.end;
    range.row = blockIdx.x;
    const int32_t b = p.num_heads.quotient(range.row), h = p.num_heads.remainder(range.row);
    range.listed = p.layer.block_table.at(b, h);
    range.num_listed = facts.end - facts.begin;
  }
  TilePipeline<Config> pipeline(p, range, shared);
  if (warp == Config::kWarps - 1) clear_empty_rows<Config>(p, cuts_rows);

  int32_t row_index = range.row, tile = 0, image = 0;
  int32_t end = range.begin;
#pragma unroll 1
  while (end < range.end) {
    end = min(range.end, facts.end);
    const bool has_more = end < range.end;
    schedule::RowFacts next = facts;
    if (has_more) next = load_facts(p.rows + row_index + 1);
    const RowContext row = row_context<Config>(p, row_index, facts.length);
    WarpState<Config> state;
    state.begin_row(p, row);
    const int32_t end_tile = (end - range.begin) << range.page_shift;
    const int32_t row_tile = (range.begin - facts.begin) * (1 << range.page_shift);
#pragma unroll 1
    for (int32_t t = warp + tile * Config::kWarps; t < end_tile; t += Config::kWarps, ++tile) {
      const uint32_t data = pipeline.wait(tile);
      const int32_t first_slot = (row_tile + t) * kTileSlots;
      if (first_slot + kTileSlots > row.settled) patch_tile<Config>(p, row, first_slot, data);
      state.add_tile(p, data, first_slot);
      pipeline.release(tile);
    }
    state.store(shared.image[image][warp], shared.max_sum[image][warp]);
    RowEnd<Config> row_end(p, row, shared, image);
    row_end.run(facts, row_index, cuts_rows);
    if (!has_more) return;
    // With two images in turn, nobody can still read the one that is written next.
    image = (image + 1) % Config::kImages;
    if (Config::kImages == 1) RowEnd<Config>::wait_for_warps();
    facts = next;
#pragma unroll 1
    for (++row_index; facts.begin == facts.end;) facts = load_facts(p.rows + ++row_index);
  }
}

template <typename Config>
void launch_instance(const AttendParams& p, cudaStream_t stream) {
  static_assert(sizeof(AttendShared<Config>) <= Config::kMostBytes);
  const int blocks = schedule::ceil_div(p.group.value * p.num_tokens, Config::kQueries);
  LaunchShape shape;
  shape.grid = blocks == 1 ? dim3(p.num_workers) : dim3(p.num_rows, blocks);
  shape.threads = Config::kThreads + (p.append.keys.data ? kWarpSize : 0);
  shape.shared_bytes = sizeof(AttendShared<Config>);
  shape.early = Config::kCopiesBoxes;
  launch("attend", attend_kernel<Config>, shape, stream, p);
}

template <typename Element, int kHeadDim, bool kCopiesBoxes>
void launch_for_queries(const AttendParams& p, cudaStream_t stream) {
  switch (padded_queries(int64_t{p.group.value} * p.num_tokens)) {
    case 4: return launch_instance<AttendConfig<Element, kHeadDim, 4, kCopiesBoxes>>(p, stream);
    case 8: return launch_instance<AttendConfig<Element, kHeadDim, 8, kCopiesBoxes>>(p, stream);
    default: return launch_instance<AttendConfig<Element, kHeadDim, 16, kCopiesBoxes>>(p, stream);
  }
}

/// Whether the current device has the bulk copy engine and the shared memory that goes with it.
inline bool device_copies_boxes() {
  int device = 0, major = 0, bytes = 0;
  ADAKV_CUDA_CHECK("attend", cudaGetDevice(&device));
  ADAKV_CUDA_CHECK("attend",
                   cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  ADAKV_CUDA_CHECK("attend",
                   cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return major >= 9 && bytes >= 227 << 10;
}

template <typename Element, int kHeadDim>
void launch_attend(const AttendParams& params, int64_t num_pages, cudaStream_t stream) {
  if (!device_copies_boxes()) return launch_for_queries<Element, kHeadDim, false>(params, stream);
  constexpr uint32_t kColumns = AttendConfig<Element, kHeadDim, 4, true>::kBoxColumns;
  constexpr uint32_t kBoxes = kHeadDim / kColumns;
  const uint64_t half_bytes = uint64_t(params.layer.page_size) * kHeadDim * 2;
  AttendParams p = params;
  // Columns of a box, slots of all pages, boxes side by side, keys and values.
  p.page_map = encode_tensor_map(
      "attend", p.layer.pages,
      {{kColumns, uint64_t(num_pages) * 2 * p.layer.page_size, kBoxes, 2},
       {kHeadDim * 2, kColumns * 2, half_bytes},
       {kColumns, kTileSlots, kBoxes, 2}});
  launch_for_queries<Element, kHeadDim, true>(p, stream);
}

}  // namespace adakv
