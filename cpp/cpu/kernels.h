// The inner loops that are compiled once per instruction set (simd_*.h), and the table to reach
// them by. Which table serves this machine is found out once, when first asked.
#pragma once

#include <cstdint>

#include "adakv/ops.h"

namespace adakv {

/// Query vectors that one attend_span call works on at most.
constexpr int kMaxSpanQueries = 32;
constexpr int kMaxHeadDim = 256;

/// Attention of some queries of one row over some of its slots, not yet divided by the sum of the
/// exponentials. The queries are numbered s * group + g.
struct AttendSpan {
  const void* keys;         // [N, P, D] in pages
  const void* values;       // [N, P, Dv]
  int64_t page_stride;      // in elements, of both
  const void* scales[2];    // [N, P, num_scales] of keys and of values, for quantised pages; of
                            // int4 and int2 keys [N, 2, D]
  int64_t scale_stride[2];  // in elements, from page to page
  const void* tail;         // [2 P, D] with tails: keys and values of the slots from tail_begin on
  int tail_begin;           // a multiple of the page size
  KeyDims key_dims;         // of int4
  const void* biases;       // [N, P] float16 of plain pages, added to logits; null: none
  int64_t bias_stride;      // in elements, from page to page
  const int32_t* page_ids;  // pages of the row, from its slot 0
  int page_size;
  int head_dim, value_dim;
  int group;
  int begin_slot, end_slot;                       // begin_slot: a multiple of the page size
  const void* queries;                            // of the group's first q head and s = 0
  int64_t query_head_stride, query_token_stride;  // in elements
  int first_query, num_queries;
  int first_visible;  // query s sees the slots below first_visible + s
  float scale;
  float softcap;  // 0: none
  float* max;     // [num_queries] out: largest logit; -inf if the query saw nothing
  float* sum;     // [num_queries] out: sum of exp(logit - max)
  float* acc;     // [num_queries, Dv] out: sum of exp(logit - max) * value
  float* logits;  // [num_queries, logits_stride] out, of the slots from begin_slot on that a query
                  // sees: q . k, before scale and softcap; null: not wanted
  int64_t logits_stride;
};

/// What one token's q heads of a group give some slots that they see; AttendArgs says how.
struct AccumulateSpan {
  const float*
      logits;  // [group, logits_stride] as of AttendSpan, read up to a multiple of kMaxLanes
  int64_t logits_stride;  // in elements
  const float* lse;       // [group]
  int group;
  int num_slots;
  float scale;
  float softcap;  // 0: none
  Accumulate accumulate;
  Reduce group_reduce;
  float decay;
  float threshold;
  float number;        // of the token, from 1
  float* accumulated;  // [num_slots] in and out
};

/// Results for vectors of this many are written, and read, whole.
constexpr int kMaxLanes = 16;

/// The keys that a row of a cache holds.
struct HeldKeys {
  const void* pages;        // [N, 2, P, D] elements or codes
  int64_t page_stride;      // in elements
  const void* scales;       // [N, P, num_scales] of codes
  int64_t scale_stride;     // in elements, from page to page
  const int32_t* page_ids;  // of the row, from its slot 0
  int page_size;
  PageFormat format;
  int num_scales;  // of a key
};

/// Some keys of a row, before one q head's queries of the window.
struct ScoreSpan {
  const void* keys;  // [num_keys, D]; null: those of `held` from first_slot on
  HeldKeys held;
  int first_slot;
  const void* queries;               // [W, D]
  int64_t key_stride, query_stride;  // in elements
  int num_keys;
  int window;  // W: queries
  int head_dim;
  int stride;         // positions from one query to the next
  int first_visible;  // query w sees, or counts for, the keys below first_visible + w * stride
  float scale;
  float softcap;   // 0: none
  bool takes_max;  // over the window; else sums
  // The next five are written, and read, up to a multiple of kMaxLanes.
  // max, sum: [W] out of score_sums: largest logit of each query, and sum of exp(logit - max).
  // lse: [W] into score_window: max + log(sum) over all keys, +inf behind the window.
  // lanes: [num_keys, kMaxLanes] scratch of score_window.
  // scores: [num_keys] out of score_window: probabilities, reduced over the window.
  float* max;
  float* sum;
  const float* lse;
  float* lanes;
  float* scores;
};

/// Some entries of a row, and one q head's part of the output projection.
struct ValueNormSpan {
  const void* values;                // [num_values, D]
  const void* w_o;                   // [E, D]
  int64_t value_stride, w_o_stride;  // in elements
  int num_values;
  int width;  // E
  int head_dim;
  float* norms;  // [num_values up to kMaxLanes] out: || v Wo ||_1
};

/// Gram matrices are kept as panels of so many columns as suit the machine: [head_dim_padded /
/// columns, head_dim_padded, columns].
constexpr int kGramFloats = kMaxHeadDim * kMaxHeadDim;

/// One kv head's part of the output projection.
struct GramSpan {
  const void* w_o;     // [E, G * D]
  int64_t w_o_stride;  // in elements
  int width;           // E
  int group;           // G
  int head_dim;
  float* gram;  // [kGramFloats] out: mean over the group of Wo Wo^T
};

/// Some entries of a row, and the Gram matrix of their kv head.
struct GramNormSpan {
  const void* values;    // [num_values, D]
  int64_t value_stride;  // in elements
  int num_values;
  int head_dim;
  const float* gram;  // [kGramFloats]
  float* norms;       // [num_values] out: sqrt(v G v^T)
};

/// Makes codes [D] and scales of an entry [D] as ops/quantise.h says.
using QuantiseEntry = void (*)(const void* entry, int head_dim, uint8_t* codes, uint16_t* scales);

/// Where the codes and scales of a page of int4 or int2 go.
struct PageCodes {
  uint8_t* keys;           // [P, D / 2], or as KeyDims have them
  uint8_t* values;         // [P, D / 2], or int2 [P, D / 4]
  uint16_t* key_scales;    // [2, D], or those of the dimensions that have some
  uint16_t* value_scales;  // [P, 2 Z]
};

/// Makes a page of int4 or int2 of the P keys and then P values that `entries` points to, as ops/quantise.h says;
/// fetches those of `next`, unless it is null.
using QuantisePage = void (*)(const void* const* entries,
                              const void* const* next,
                              int head_dim,
                              PageFormat format,
                              KeyDims key_dims,
                              const PageCodes& to);

/// By DType: float32, float16, bfloat16.
template <typename Span>
using PerDType = void (*[3])(const Span&);

struct Kernels {
  const char* isa;
  PerDType<AttendSpan> attend_span[kNumFormats];  // by PageFormat; quantised pages: no float32
  PerDType<AttendSpan> attend_mixed;              // of int4 with mixed KeyDims
  void (*accumulate_span)(const AccumulateSpan&);
  QuantiseEntry quantise[kNumFormats][3];  // by PageFormat and DType, where entries are quantised
  QuantisePage quantise_page[3];           // by DType
  PerDType<ScoreSpan> score_sums;
  PerDType<ScoreSpan> score_window;
  PerDType<ValueNormSpan> value_norm_span;
  PerDType<GramSpan> gram_span;
  PerDType<GramNormSpan> gram_norm_span;
};

/// The fastest kernels that this machine can run.
const Kernels& kernels();

}  // namespace adakv
