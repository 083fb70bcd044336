// What plan writes and attend reads, for one layer. All integers are int32. A unit is one page of
// one row; units are numbered through all rows, row by row, in slot order.
//
//   schedule = [num_workers x kWorkerInts | num_rows x kRowInts]
//
//   worker:  begin, end   the units this worker does; begin == end: nothing (and all 0)
//            row          the row that unit `begin` belongs to; the worker goes on with row + 1,
//            ...
//                         until `end`; rows without units may lie between
//            looks_up     1: no page ids follow, as a listed block table will have them; else 0
//            row facts    of that row (kRowInts integers, a copy)
//            page ids     of the first kWorkerPages units of the range (0 behind its end)
//   row:     begin, end   the units of this row (ceil(length / page_size) of them)
//            length       entries of the row, this step's new ones included
//            first_partial, num_partials
//                         results of the workers that share this row are kept at first_partial +
//                         (worker - first_worker); num_partials <= 1: not shared (0: no units)
//            first_worker the worker that does unit `begin`; sharing workers follow each other
//            arrived      0; while attend runs on CUDA, how many of the sharing workers are done
//            0
//
// How the P units of a layer are shared out (integers only, so both backends agree):
//   1. N = clamp(P / 8, 1, num_workers) workers are used: below 8 pages a worker, merging costs
//      more than reading.
//   2. C is the smallest chunk with sum over rows of ceil(units / C) <= N. If C is at most 1.4 P / N
//      and at most 256 slots above P / N, each row is cut into ceil(units / C) even parts, one worker
//      each: nobody does two rows.
//   3. Else, if all rows have u units: ceil(rows / N) whole rows a worker take as many times u + c, with
//      the c of 4. If that is no more than an Nth of all of them and c for a row that is cut, then so.
//   4. Else every row counts as its units and c more, for what its end costs the worker: as long as
//      reading 256 slots, but not above P / (4 N). All are cut into N equal ranges; a border in a
//      row's c lies at its end. A border within 256 slots and a fifth of P / N of the end of a row
//      moves there (the nearest end, the lower of two).
#pragma once

#include <cstdint>

#include "ops/host_device.h"

namespace adakv::schedule {

constexpr int kWorkerInts = 64;
constexpr int kRowInts = 8;
constexpr int kWorkerHeader = 12;
constexpr int kWorkerPages = kWorkerInts - kWorkerHeader;

struct RowFacts {
  int32_t begin, end, length, first_partial, num_partials, first_worker, arrived, unused;
};
static_assert(sizeof(RowFacts) == kRowInts * 4);

struct Worker {
  int32_t begin, end, row, looks_up;
  RowFacts facts;
  int32_t pages[kWorkerPages];
};
static_assert(sizeof(Worker) == kWorkerInts * 4);

constexpr int kMostWorkers = (1 << 15) - 1;
constexpr int32_t kMostLength = INT32_MAX - 256;  // of a row: its pages are counted in int32
constexpr int64_t kMostUnits = (int64_t{1} << 32) / 7 - 1;  // of a layer, see largest_even_chunk()

/// Partial results that a layer can have: a worker shares at most its first and its last row.
constexpr int64_t max_partials(int num_workers) {
  return 2 * static_cast<int64_t>(num_workers);
}

ADAKV_HOST_DEVICE inline int32_t ceil_div(int32_t a, int32_t b) {
  return (a + b - 1) / b;
}

/// N: workers that get something to do.
ADAKV_HOST_DEVICE inline int32_t active_workers(int32_t num_units, int32_t num_workers) {
  const int32_t wanted = num_units / 8;
  return wanted < 1 ? 1 : wanted < num_workers ? wanted : num_workers;
}

/// Slots that a worker reads in the time that the end of a row takes it, under load (H200: 2 us).
constexpr int32_t kRowEndSlots = 256;

/// The largest chunk of units that never cross rows that is even enough. (Divisions are of 32 bits,
/// which GPUs have in 20 instructions instead of 70: pages are fewer than 2^32 / 7, workers than
/// 2^15.)
ADAKV_HOST_DEVICE inline int32_t largest_even_chunk(int32_t num_units,
                                                    int32_t active,
                                                    int32_t page_size) {
  const uint32_t wider = 7 * static_cast<uint32_t>(num_units) / (5 * static_cast<uint32_t>(active));
  const uint32_t later = num_units / active + kRowEndSlots / page_size;
  return static_cast<int32_t>(wider < later ? wider : later);
}

/// c: units that the end of a row counts as.
ADAKV_HOST_DEVICE inline int32_t row_end_units(int32_t num_units,
                                               int32_t active,
                                               int32_t page_size) {
  const int32_t most = num_units / (4 * active), wanted = kRowEndSlots / page_size;
  return wanted < most ? wanted : most;
}

/// Whole rows of so many units that a worker does, or 0 where equal ranges take less.
ADAKV_HOST_DEVICE inline int32_t whole_rows(int32_t num_rows,
                                            int32_t units,
                                            int32_t active,
                                            int32_t page_size) {
  const int32_t row_end = row_end_units(num_rows * units, active, page_size);
  const int32_t rows = ceil_div(num_rows, active), row = units + row_end;
  return rows * row <= ceil_div(num_rows * row, active) + row_end ? rows : 0;
}

/// First unit of part `part` of `num_parts`, of a range of `num_units` units.
ADAKV_HOST_DEVICE inline int32_t even_border(int32_t part, int32_t num_units, int32_t num_parts) {
  const int32_t whole = num_units / num_parts, rest = num_units % num_parts;
  return part * whole + part * rest / num_parts;
}

/// The border of equal ranges at `even`, of which `left <= even <= right` are the nearest row ends.
ADAKV_HOST_DEVICE inline int32_t snapped_border(int32_t even,
                                                int32_t left,
                                                int32_t right,
                                                int32_t num_units,
                                                int32_t active,
                                                int32_t page_size) {
  const int32_t nearest = even - left <= right - even ? left : right;
  const int32_t distance = nearest < even ? even - nearest : nearest - even;
  const bool is_near = int64_t{5} * distance * active <= num_units;
  return is_near && distance <= kRowEndSlots / page_size ? nearest : even;
}

}  // namespace adakv::schedule
