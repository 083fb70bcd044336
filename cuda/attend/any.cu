// attend for any dtype, page size, head dim and address: the definition, told step by step. What
// the fast kernels (attend.cuh) don't take is done here.
//
//   z[t] = q . key[t] * scale, or softcap * tanh(that / softcap)       of the slots that q sees
//          + bias[t], if the entries have biases
//   out  = sum over t of exp(z[t]) * value[t] / total
//   lse  = log(total),  total = exp(sink) + sum over t of exp(z[t])
//
// grid: [num_rows * G * S]; one CTA: one query over its whole row, tier by tier if its entries lie in
// several. Its warps take 32 slots at a time, in turn, and each keeps a maximum, a sum and an output of
// its own until the tier ends; then all threads join these, a column each. Powers of e are relative to
// the maximum so far; when that grows, what is there is rescaled.
#include <algorithm>

#include "attend/slots.cuh"
#include "common/check.cuh"
#include "ops/tiers.h"

namespace adakv {
namespace {

constexpr int kMostColumns = 512;  // of out

/// Threads of a CTA: as many as registers allow.
template <typename Kinds>
constexpr int num_threads(int columns) {
  return Kinds::kHasTails && columns == 8 ? 256 : 512;
}

/// Of what kind a tier's entries are.
enum class EntryKind : int32_t { kPlain, kBiased, kInt8, kFp8, kInt4, kMixed, kInt2 };

EntryKind entry_kind(const LayerView& layer) {
  switch (layer.format()) {
    case PageFormat::kPlain:
      return layer.page_biases ? EntryKind::kBiased : EntryKind::kPlain;
    case PageFormat::kInt8:
      return EntryKind::kInt8;
    case PageFormat::kFp8:
      return EntryKind::kFp8;
    case PageFormat::kInt2:
      return EntryKind::kInt2;
    default:
      return layer.key_dims().are_mixed() ? EntryKind::kMixed : EntryKind::kInt4;
  }
}

/// What the kernel knows of one tier.
struct TierParams {
  LayerRows layer;
  EntryRows queries;               // [B, Hq, S, D]
  const schedule::RowFacts* rows;  // [num_rows]
  const int32_t* num_new;          // [B] or null
  int32_t head_dim, value_dim;
  int32_t column;          // of out, to which the first element of a value belongs
  EntryKind kind;          // for kernels of all kinds
  bool sees_all;           // no slot holds a token of this step
  bool leaves_full_tails;  // those that one new token fills have no codes yet

  /// Where the entries of a row begin that are read from its tail.
  __device__ int32_t tail_begin(int32_t b, int32_t length) const {
    const int32_t uncoded = !leaves_full_tails ? 0 : num_new ? num_new[b] : 1;
    return (length - uncoded) / kPageSlots * kPageSlots;
  }
};

template <int kTiers>
struct AnyParams {
  EntryRows out;             // [B, Hq, S, O]
  EntryRows lse;             // [B, Hq, S] float32, or none
  EntryRows before_out;      // [B, Hq, S, O] float32: what tiers with fast kernels gave, or none
  EntryRows before_lse;      // [B, Hq, S] float32, or none
  const int32_t* num_new;    // [B] or null
  const float* sink_logits;  // [Hq] or null
  int32_t num_tokens;        // S
  Divisor group, num_heads;  // G, Hkv
  float scale, softcap;      // as in AttendParams
  int32_t width, num_tiers;  // O, and how many tiers there are
  int32_t before_width;      // columns that before_out has, others are 0
  TierParams tiers[kTiers];

  __device__ int32_t new_tokens(int32_t b) const { return num_new ? num_new[b] : num_tokens; }
};
static_assert(sizeof(AnyParams<1 + kMostOthers>) <= 4096, "no more parameters fit");

// Query number = token * G + q head of the group. The last of S new tokens sees the whole row, the
// one before it a slot less, and so on. Sequences with fewer than S new tokens are padded in front.
template <int kTiers>
__device__ Query find_query(const AnyParams<kTiers>& p) {
  const int32_t num_queries = p.group.value * p.num_tokens;
  const int32_t row = blockIdx.x / num_queries, number = blockIdx.x % num_queries;
  Query query = {};
  query.b = p.num_heads.quotient(row);
  query.h = p.num_heads.remainder(row);
  query.head = query.h * p.group.value + p.group.remainder(number);
  query.token = p.group.quotient(number);
  return query;
}

template <typename Entry>
constexpr bool kIsTailed = false;
template <typename Element, typename Format, bool kMixed>
constexpr bool kIsTailed<TailedEntry<Element, Format, kMixed>> = true;

/// Entries of one kind, which is known.
template <typename Entry>
struct OneKind {
  static constexpr int kTiers = 1;
  static constexpr bool kHasTails = kIsTailed<Entry>;

  template <typename Body>
  static __device__ void with_entries(EntryKind, const Body& body) {
    body(TypeTag<Entry>{});
  }
};

/// Entries of all kinds, found when the kernel runs.
template <typename Element>
struct AllKinds {
  static constexpr int kTiers = 1 + kMostOthers;
  static constexpr bool kHasTails = true;

  template <typename Body>
  static __device__ void with_entries(EntryKind kind, const Body& body) {
    if (kind == EntryKind::kPlain) return body(TypeTag<Entry<Element>>{});
    if (kind == EntryKind::kBiased) return body(TypeTag<BiasedEntry<Element>>{});
    if constexpr (!std::is_same_v<Element, float>) {
      if (kind == EntryKind::kInt8) return body(TypeTag<CodedEntry<Element, Int8>>{});
      if (kind == EntryKind::kFp8) return body(TypeTag<CodedEntry<Element, Fp8>>{});
      if (kind == EntryKind::kInt4) return body(TypeTag<TailedEntry<Element, Int4, false>>{});
      if (kind == EntryKind::kInt2) return body(TypeTag<TailedEntry<Element, Int2, true>>{});
      body(TypeTag<TailedEntry<Element, Int4, true>>{});
    }
  }
};

template <typename Entry>
constexpr bool kHasBias = false;
template <typename Element>
constexpr bool kHasBias<BiasedEntry<Element>> = true;

/// What a warp has found out; out[j] is the j-th column of Slots.
template <int kColumns>
struct WarpResult {
  float max = -INFINITY, sum = 0;
  float out[kColumns] = {};
};

// Takes slots first_slot .. first_slot + 31 of the query's row into a warp's result. For products
// all lanes read one entry at a time, because that is what lies together, however it is aligned;
// for the softmax each lane has a slot.
template <typename Entry, int kColumns>
__device__ void add_slots(const TierParams& tier,
                          float scale,
                          float softcap,
                          const Query& query,
                          const float* q,  // [32 kColumns], 0 from head_dim on
                          int32_t first_slot,
                          WarpResult<kColumns>& result) {
  using SlotsOf = Slots<Entry, kColumns>;
  const int32_t lane = threadIdx.x % kWarpSize;
  const int32_t count = min(kWarpSize, query.visible - first_slot);
  const SlotsOf slots(tier, query, first_slot, count);

  // z of this lane's slot; -inf if it isn't seen.
  float z = -INFINITY;
  slots.visit([&](const auto& reader) {
#pragma unroll(SlotsOf::kAtOnce)
    for (int32_t i = 0; i < count; ++i) {
      float key[kColumns], dot = 0;
      reader.key(i, key);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) dot += q[SlotsOf::column(j)] * key[j];
      dot = warp_sum(dot);
      if (lane == i) z = dot * scale;
    }
  });
  if (softcap != 0 && lane < count) z = softcap * tanhf(z);  // the scale is divided by it
  if constexpr (kHasBias<Entry>) z += slots.bias();

  // The maximum so far, and by what factor the sum and output so far shrink.
  const float most = fmaxf(result.max, warp_max(z));
  const float factor = expf(result.max - most), probability = expf(z - most);
  result.max = most;
  result.sum = result.sum * factor + warp_sum(probability);

  // The values, each times its slot's probability.
  float out[kColumns] = {};
  slots.visit([&](const auto& reader) {
#pragma unroll(SlotsOf::kAtOnce)
    for (int32_t i = 0; i < count; ++i) {
      const float share = __shfl_sync(kFullWarp, probability, i);
      float value[kColumns];
      reader.value(i, value);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) out[j] += share * value[j];
    }
  });
#pragma unroll
  for (int j = 0; j < kColumns; ++j) result.out[j] = result.out[j] * factor + out[j];
}

template <typename Element, typename Kinds, int kColumns>
__global__ void __launch_bounds__(num_threads<Kinds>(kColumns), 1)
    attend_any_kernel(const __grid_constant__ AnyParams<Kinds::kTiers> p) {
  constexpr int kThreads = num_threads<Kinds>(kColumns), kWarps = kThreads / kWarpSize;
  constexpr int kOuts = kMostColumns / kThreads;
  __shared__ float q[kColumns * kWarpSize];
  __shared__ float image[kWarps][kColumns * kWarpSize], max[kWarps], sum[kWarps];
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  Query query = find_query(p);
  const bool is_padding = query.token < p.num_tokens - p.new_tokens(query.b);
  float most = -INFINITY, total = 0;
  float out[kOuts] = {};  // of columns threadIdx.x + i * kThreads
  bool is_empty = true;
  if (p.before_lse.data && !is_padding) {
    most = *reinterpret_cast<const float*>(p.before_lse.at(query.b, query.head, query.token));
    is_empty = most == -INFINITY;
    total = is_empty ? 0 : 1;
    const char* before = p.before_out.at(query.b, query.head, query.token);
#pragma unroll
    for (int k = 0; k < kOuts; ++k) {
      const int32_t d = threadIdx.x + k * kThreads;
      if (d < p.before_width) out[k] = reinterpret_cast<const float*>(before)[d];
    }
  }

#pragma unroll 1
  for (int32_t i = 0; i < (Kinds::kTiers == 1 ? 1 : p.num_tiers); ++i) {
    const TierParams& tier = p.tiers[i];
    query.length = tier.rows[blockIdx.x / (p.group.value * p.num_tokens)].length;
    const int32_t hidden = tier.sees_all ? 0 : p.num_tokens - 1 - query.token;
    query.visible = is_padding || query.length < hidden ? 0 : query.length - hidden;
    is_empty = is_empty && query.visible == 0;

    // 1. The query comes to shared memory, as float32.
    const char* queries = tier.queries.at(query.b, query.head, query.token);
    for (int32_t k = threadIdx.x; k < kColumns * kWarpSize; k += kThreads) {
      q[k] = k < tier.head_dim ? to_float(reinterpret_cast<const Element*>(queries)[k]) : 0.f;
    }
    __syncthreads();

    // 2. Each warp takes every kWarps-th run of 32 slots, and leaves its result in shared memory.
    WarpResult<kColumns> result;
    Kinds::with_entries(tier.kind, [&](auto entry) {
      using Entry = typename decltype(entry)::type;
      for (int32_t first = warp * kWarpSize; first < query.visible; first += kThreads) {
        add_slots<Entry, kColumns>(tier, p.scale, p.softcap, query, q, first, result);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        image[warp][Slots<Entry, kColumns>::column(j)] = result.out[j];
      }
    });
    if (lane == 0) {
      max[warp] = result.max;
      sum[warp] = result.sum;
    }
    __syncthreads();

    // 3. All threads join the sums, relative to the highest maximum, and each a column.
    const float before = most;
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, max[w]);
    const float base = most == -INFINITY ? 0 : most, shrunk = expf(before - base);
    total *= shrunk;
#pragma unroll
    for (int k = 0; k < kOuts; ++k) out[k] *= shrunk;
    for (int w = 0; w < kWarps; ++w) {
      const float factor = expf(max[w] - base);
      total += factor * sum[w];
#pragma unroll
      for (int k = 0; k < kOuts; ++k) {
        const int32_t d = threadIdx.x + k * kThreads - tier.column;
        if (d >= 0 && d < tier.value_dim) out[k] += factor * image[w][d];
      }
    }
    __syncthreads();
  }

  // 4. A sink is one logit more, without a value. A query that sees nothing has out 0 and lse -inf,
  //    sink or not.
  const float sink = p.sink_logits && !is_empty ? p.sink_logits[query.head] : -INFINITY;
  const float highest = fmaxf(most, sink);
  is_empty = is_empty || highest == -INFINITY;
  const float share = is_empty ? 0 : expf(most - highest);
  total = total * share + (is_empty ? 0 : expf(sink - highest));
  Element* to = reinterpret_cast<Element*>(p.out.at(query.b, query.head, query.token));
#pragma unroll
  for (int k = 0; k < kOuts; ++k) {
    const int32_t d = threadIdx.x + k * kThreads;
    if (d < p.width) to[d] = from_float<Element>(is_empty ? 0 : out[k] * share / total);
  }
  if (threadIdx.x == 0 && p.lse.data) {
    *reinterpret_cast<float*>(p.lse.at(query.b, query.head, query.token)) =
        is_empty ? -INFINITY : highest + logf(total);
  }
}

TierParams tier_params(const AttendArgs& args, size_t index, const AttendParams& params) {
  const AttendArgs of_tier = tier_args(args, index);
  TierParams tier = {};
  tier.layer = layer_rows(of_tier.layer);
  tier.queries = entry_rows(of_tier.queries);
  tier.rows = reinterpret_cast<const schedule::RowFacts*>(
      of_tier.schedule.ptr<const schedule::Worker>() + args.num_workers);
  tier.num_new = params.num_new;
  tier.head_dim = static_cast<int32_t>(of_tier.queries.shape[3]);
  const bool has_own = of_tier.layer.value_pages && !of_tier.layer.tails;
  tier.value_dim =
      has_own ? static_cast<int32_t>(of_tier.layer.value_pages.shape[3]) : tier.head_dim;
  tier.column = tier_column(args, index);
  tier.kind = entry_kind(of_tier.layer);
  tier.sees_all = index > 0;
  tier.leaves_full_tails = index == 0 && params.leaves_full_tails;
  return tier;
}

template <typename Element, typename Kinds, int kColumns>
void launch_any(const AttendArgs& args, const AttendParams& params, const TierList& tiers) {
  AnyParams<Kinds::kTiers> p = {};
  p.out = params.out;
  p.lse = params.lse;
  p.num_new = params.num_new;
  p.sink_logits = params.sink_logits;
  p.num_tokens = params.num_tokens;
  p.group = params.group;
  p.num_heads = params.num_heads;
  p.scale = params.scale;
  p.softcap = params.softcap;
  p.width = static_cast<int32_t>(args.out.shape[3]);
  p.before_out = params.before_out;
  p.before_lse = params.before_lse;
  p.before_width = static_cast<int32_t>(args.queries.shape[3]);
  for (const size_t tier : tiers) p.tiers[p.num_tiers++] = tier_params(args, tier, params);
  const int64_t grid = int64_t{params.num_rows} * params.group.value * params.num_tokens;
  attend_any_kernel<Element, Kinds, kColumns>
      <<<static_cast<uint32_t>(grid), num_threads<Kinds>(kColumns), 0,
         static_cast<cudaStream_t>(args.stream)>>>(p);
}

}  // namespace

void any_attend(const AttendArgs& args, const AttendParams& params, const TierList& tiers) {
  int64_t width = 0;
  for (const size_t i : tiers) {
    const TierParams tier = tier_params(args, i, params);
    width = std::max<int64_t>({width, tier.head_dim, tier.value_dim});
  }
  const auto run = [&](auto element, auto entry, auto columns) {
    launch_any<typename decltype(element)::type, OneKind<typename decltype(entry)::type>, columns>(
        args, params, tiers);
  };
  const AttendArgs first = tier_args(args, tiers[0]);
  if (tiers.size() > 1) {
    dispatch_dtype(args.queries.dtype, [&](auto element) {
      using Element = typename decltype(element)::type;
      dispatch_columns(width, [&](auto columns) {
        launch_any<Element, AllKinds<Element>, columns>(args, params, tiers);
      });
    });
  } else if (first.layer.page_biases) {
    dispatch_dtype(args.queries.dtype, [&](auto element) {
      using Biased = BiasedEntry<typename decltype(element)::type>;
      dispatch_columns(width, [&](auto columns) { run(element, TypeTag<Biased>{}, columns); });
    });
  } else {
    dispatch_entries(first, width, run);
  }
  ADAKV_CUDA_CHECK("attend", cudaGetLastError());
}

}  // namespace adakv
