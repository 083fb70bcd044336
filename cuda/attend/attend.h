// What the launcher of attend hands to its kernels.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "adakv/ops.h"
#include "append.cuh"
#include "common/codes.cuh"
#include "common/divisor.cuh"
#include "common/int4_page.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "ops/schedule.h"

namespace adakv {

struct AttendParams {
  CUtensorMap page_map;             // of the pages, for devices that copy boxes
  const schedule::Worker* workers;  // [num_workers]
  schedule::RowFacts* rows;         // [num_rows]; attend counts in `arrived`
  LayerRows layer;
  EntryRows queries;         // [B, Hq, S, D]
  EntryRows out;             // [B, Hq, S, Dv]
  EntryRows lse;             // [B, Hq, S] float32, or none
  EntryRows before_out;      // [B, Hq, S, D] float32: what tiers before this one gave, or none
  EntryRows before_lse;      // [B, Hq, S] float32, or none
  AppendParams append;       // keys.data is null: nothing to append
  const int32_t* num_new;    // [B] or null
  const float* sink_logits;  // [Hq] or null
  float* partials;  // [max_partials, queries, D], then (max, sum) [max_partials, queries, 2]
  int32_t num_rows, num_workers, max_partials;
  int32_t num_tokens;        // S
  Divisor group, num_heads;  // G, Hkv
  bool sees_all;             // no slot holds a token of this step
  bool writes_floats;        // out is float32, for the next tier
  bool prefetches;           // pages and schedule are read before the previous kernel has ended
  bool leaves_full_tails;    // those that one new token fills have no codes yet
  bool scales_adjoin;        // a tile's scales of values lie right behind those of its keys
  float scale, softcap;      // z = softcap * tanh(q . k * scale); softcap 0: q . k * scale
  // [num_rows, logits_length, padded queries]: z, by log2(e), of all slots of the rows' pages; or null
  float* logits;
  int32_t logits_length;

  __device__ int32_t new_tokens(int32_t b) const { return num_new ? num_new[b] : num_tokens; }

  /// Newest slots of a row that a token doesn't see.
  __device__ int32_t num_hidden(int32_t token) const {
    return sees_all ? 0 : num_tokens - 1 - token;
  }

  /// The lse of what tiers before this one gave a query: -inf if there are none, and of padding.
  __device__ float before_of(int32_t b, int32_t head, int32_t token) const {
    if (!before_lse.data || token < num_tokens - new_tokens(b)) return -INFINITY;
    return *reinterpret_cast<const float*>(before_lse.at(b, head, token));
  }

  /// Where the entries of a row begin that are read from its tail.
  __device__ int32_t tail_begin(int32_t b, int32_t length) const {
    const int32_t coded = length - (leaves_full_tails ? new_tokens(b) : 0);
    return coded / kPageSlots * kPageSlots;
  }
};

/// Whether there are fast kernels for codes of this head dim: for 80 and 96, and for int2 there are
/// not.
constexpr bool has_code_kernel(PageFormat format, int64_t head_dim) {
  return format != PageFormat::kInt2 && (head_dim == 64 || head_dim == 128 || head_dim == 256);
}

/// Slots that a warp takes at a time: with codes two products' rows, where registers allow, so that
/// one needn't wait for the other; in int4 a page.
constexpr int tile_slots(PageFormat format, int64_t head_dim) {
  if (format == PageFormat::kInt4) return kPageSlots;
  return format != PageFormat::kPlain && head_dim <= 128 ? 32 : 16;
}

/// Queries of a row that the fast kernels take at a time, at most; registers hold no more of int4.
constexpr int most_queries(PageFormat format, int64_t head_dim) {
  return format == PageFormat::kInt4 && head_dim > 128 ? 8 : 16;
}

/// Whether there are fast kernels that store logits; for most queries of large heads in codes, registers
/// are short.
constexpr bool has_storing_kernel(PageFormat format, int64_t head_dim, int num_queries) {
  return format == PageFormat::kPlain || head_dim <= 128 || num_queries <= 8;
}

/// Queries that partial results are kept for.
inline int padded_queries(int64_t num_queries) {
  return num_queries <= 4 ? 4 : num_queries <= 8 ? 8 : 16;
}

/// Whether the current device has the bulk copy engine and the shared memory that goes with it.
inline bool device_copies_boxes() {
  int device = 0;
  ADAKV_CUDA_CHECK("attend", cudaGetDevice(&device));
  return has_sm90("attend", device) &&
         device_attribute("attend", device, cudaDevAttrMaxSharedMemoryPerBlockOptin) >= 227 << 10;
}

/// The fast kernels, for pages of 16 slots or a multiple. Rows with more than most_queries() queries
/// are not cut: a block does that many queries of a row; then nothing can be appended in the launch.
template <typename Element, typename Format, int kHeadDim>
void launch_attend(const AttendParams& params, int64_t num_pages, cudaStream_t stream);

/// Tiers that the fast kernels take in one launch, at most.
constexpr int kMostFastTiers = 3;

/// What a tier may be of which the fast kernel takes several in one launch: a format, and by what the
/// head dim of the first tier is divided.
struct TierKind {
  PageFormat format;
  int divisor;
};

constexpr int kNumTierSets = 3, kTierKinds = 3;

/// Those that a kernel has, a row for each kernel: formats of whole entries, and ranks of a half and a
/// quarter. One kernel of all would be short of registers.
constexpr TierKind kTierSets[kNumTierSets][kTierKinds] = {
    {{PageFormat::kPlain, 1}, {PageFormat::kInt8, 1}, {PageFormat::kInt4, 1}},
    {{PageFormat::kPlain, 1}, {PageFormat::kInt8, 1}, {PageFormat::kFp8, 1}},
    {{PageFormat::kPlain, 1}, {PageFormat::kPlain, 2}, {PageFormat::kPlain, 4}}};

/// Whether a set has tiers that are narrower than the first one: then tiers may have any columns of
/// out, else all have the same.
constexpr bool has_narrow_tiers(int set) {
  bool has_narrow = false;
  for (int kind = 0; kind < kTierKinds; ++kind) has_narrow |= kTierSets[set][kind].divisor > 1;
  return has_narrow;
}

/// The tiers of a row, each with what its kind's kernel is given; `arrived` of the first one's rows
/// counts the blocks of all. Partial results lie tier by tier: those of rows that workers share, and
/// one for each row; each has place for the columns of the first tier.
struct AttendTiersParams {
  AttendParams tiers[kMostFastTiers];
  int32_t kinds[kMostFastTiers];    // of the set
  int32_t columns[kMostFastTiers];  // of out, to which the first element of a value belongs
  int32_t num_tiers, set, width;    // set: of kTierSets; width: columns of out

  __host__ __device__ int64_t partials_of_tier() const {
    return int64_t{tiers[0].max_partials} + tiers[0].num_rows;
  }
};
static_assert(sizeof(AttendTiersParams) <= 4096, "no more parameters fit");

/// Which kind of a set a tier is, beside a first one of head dim `first_dim`; kTierKinds if it is none.
constexpr int tier_kind(int set, PageFormat format, int64_t head_dim, int64_t first_dim) {
  int kind = 0;
  while (kind < kTierKinds && (kTierSets[set][kind].format != format ||
                               kTierSets[set][kind].divisor * head_dim != first_dim)) {
    ++kind;
  }
  return kind;
}

/// Whether there are fast kernels for several tiers. Others take tier by tier.
constexpr bool has_tiers_kernel(int64_t first_dim, int64_t num_queries) {
  return (first_dim == 64 || first_dim == 128) && num_queries <= 8;
}

/// The fast kernels for several tiers, where rows are cut and boxes are copied.
template <typename Element, int kHeadDim>
void launch_attend_tiers(const AttendTiersParams& params,
                         const int64_t* num_pages,
                         cudaStream_t stream);

/// Adds what one query of each q head gave to each slot, of which p.logits has the logits, to what is
/// accumulated (accumulate.cu). Starts early.
void accumulate_logits(const AttendArgs& args, const AttendParams& p);

/// The same for any queries, whose logits are made again from the keys.
void accumulate_keys(const AttendArgs& args, const AttendParams& p);

/// Numbers of tiers of a call.
using TierList = std::vector<size_t>;

/// The kernel for everything else (any.cu): some tiers in one launch, which may go on from what others
/// gave. It does each row in one piece and appends nothing.
void any_attend(const AttendArgs& args, const AttendParams& params, const TierList& tiers);

}  // namespace adakv
