// What attend has to do in one tier of the rows, on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "ops/schedule.h"
#include "ops/tiers.h"

namespace adakv {

/// One tier of a call: its entries, how its schedule cuts them, and where its partial results are.
struct TierWork {
  TierWork(const AttendArgs& args, size_t tier)
      : args(tier_args(args, tier)),
        values(this->args.layer.values()),
        key_dims(this->args.layer.key_dims()),
        head_dim(this->args.queries.shape[3]),
        value_dim(value_dim_of(this->args)),
        column(tier_column(args, tier)),
        num_hidden(tier == 0 ? args.queries.shape[2] - 1 : 0),
        workers(this->args.schedule.ptr<const schedule::Worker>()),
        rows(reinterpret_cast<const schedule::RowFacts*>(workers + args.num_workers)),
        attend_span((this->args.layer.tails && this->args.layer.value_pages
                         ? kernels().attend_mixed
                         : kernels().attend_span[static_cast<int>(
                               this->args.layer.format())])[static_cast<int>(args.queries.dtype)]) {
  }

  static int64_t value_dim_of(const AttendArgs& args) {
    const bool has_own = args.layer.value_pages && !args.layer.tails;
    return has_own ? args.layer.value_pages.shape[3] : args.queries.shape[3];
  }

  const AttendArgs args;  // over this tier alone
  const TensorView values;
  const KeyDims key_dims;
  const int64_t head_dim, value_dim, column;
  const int64_t num_hidden;         // newest slots that the first query doesn't see
  const schedule::Worker* workers;  // [num_workers]
  const schedule::RowFacts* rows;   // [num_rows]
  void (*attend_span)(const AttendSpan&);
  float* partials = nullptr;
};

}  // namespace adakv
