// What plan writes and attend reads, for one layer. All integers are int32. A unit is one page of one row; units are numbered
// through all rows, row by row, in slot order.
//
//   schedule = [num_workers x kWorkerInts | num_rows x kRowInts]
//
//   worker:  begin, end   the units this worker does; begin == end: nothing
//            row          the row that unit `begin` belongs to; the worker goes on with row + 1, ... until `end`
//            0
//            row facts    of that row (kRowInts integers, a copy)
//            page ids     of the first kWorkerPages units of the range (0 behind its end)
//   row:     begin, end   the units of this row (ceil(length / page_size) of them)
//            length       entries of the row, this step's new ones included
//            first_partial, num_partials  where the results of the workers that share this row are kept; num_partials <= 1: not shared
//            first_worker the worker that does unit `begin`
//            0, 0
#pragma once

#include <cstdint>

namespace adakv::schedule {

constexpr int kWorkerInts = 64;
constexpr int kRowInts = 8;
constexpr int kWorkerHeader = 12;
constexpr int kWorkerPages = kWorkerInts - kWorkerHeader;

struct RowFacts {
  int32_t begin, end, length, first_partial, num_partials, first_worker, unused[2];
};
static_assert(sizeof(RowFacts) == kRowInts * 4);

struct Worker {
  int32_t begin, end, row, unused;
  RowFacts facts;
  int32_t pages[kWorkerPages];
};
static_assert(sizeof(Worker) == kWorkerInts * 4);

/// Partial results that a layer can have: each worker starts at most one row that it doesn't finish, and ends one it didn't start.
constexpr int64_t max_partials(int num_workers) { return 2 * static_cast<int64_t>(num_workers); }

}  // namespace adakv::schedule
