// The inner loops that are compiled once per instruction set (simd_*.h), and the table to reach them by. Which table serves this
// machine is found out once, when first asked.
#pragma once

#include <cstdint>

#include "adakv/types.h"

namespace adakv {

/// Query vectors that one attend_span call works on at most.
constexpr int kMaxSpanQueries = 32;
constexpr int kMaxHeadDim = 256;

/// Attention of some queries of one row over some of its slots, not yet divided by the sum of the exponentials. The queries are
/// numbered s * group + g.
struct AttendSpan {
  const void* pages;        // [N, 2, P, D]
  int64_t page_stride;      // in elements
  const int32_t* page_ids;  // pages of the row, from its slot 0
  int page_size;
  int head_dim;
  int group;
  int begin_slot, end_slot;  // begin_slot: a multiple of the page size
  const void* queries;       // of the group's first q head and s = 0
  int64_t query_head_stride, query_token_stride;  // in elements
  int first_query, num_queries;
  int first_visible;  // query s sees the slots below first_visible + s
  float scale;
  float softcap;  // 0: none
  float* max;     // [num_queries] out: largest logit; -inf if the query saw nothing
  float* sum;     // [num_queries] out: sum of exp(logit - max)
  float* acc;     // [num_queries, D] out: sum of exp(logit - max) * value
};

struct Kernels {
  const char* isa;
  void (*attend_span[3])(const AttendSpan&);  // by DType: float32, float16, bfloat16
};

/// The fastest kernels that this machine can run.
const Kernels& kernels();

}  // namespace adakv
