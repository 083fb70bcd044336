// Shares the pages of all rows out to workers, a layer at a time. The rules and the format are in
// ops/schedule.h.
#include <algorithm>
#include <vector>

#include "adakv/error.h"
#include "cpu/cpu_backend.h"
#include "cpu/parallel.h"
#include "ops/listing.h"
#include "ops/schedule.h"

namespace adakv {
namespace {

using schedule::RowFacts;
using schedule::Worker;

// Whether rows cut into chunks of at most `chunk` units make at most `most` chunks.
bool makes_few_chunks(const RowFacts* rows, int64_t num_rows, int32_t chunk, int32_t most) {
  int64_t chunks = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    chunks += schedule::ceil_div(rows[r].end - rows[r].begin, chunk);
  }
  return chunks <= most;
}

// Whole rows that a worker does, if all have the same units and that is even enough, else 0.
int32_t rows_of_a_worker(const RowFacts* rows, int64_t num_rows, int32_t active, int page_size) {
  const int32_t units = rows[0].end - rows[0].begin;
  for (int64_t r = 0; r < num_rows; ++r) {
    if (rows[r].end - rows[r].begin != units) return 0;
  }
  return schedule::whole_rows(static_cast<int32_t>(num_rows), units, active, page_size);
}

// Where the workers' ranges begin and end: ascending, from 0 to the number of units.
std::vector<int32_t> find_borders(const RowFacts* rows,
                                  int64_t num_rows,
                                  int num_workers,
                                  int page_size) {
  const int32_t num_units = num_rows ? rows[num_rows - 1].end : 0;
  const int32_t active = schedule::active_workers(num_units, num_workers);
  std::vector<int32_t> borders = {0};
  if (num_units == 0) return borders;

  int32_t chunk = 1, longest = num_units;  // the smallest chunk lies in chunk .. longest
  while (chunk < longest) {
    const int32_t middle = chunk + (longest - chunk) / 2;
    if (makes_few_chunks(rows, num_rows, middle, active)) {
      longest = middle;
    } else {
      chunk = middle + 1;
    }
  }
  if (makes_few_chunks(rows, num_rows, chunk, active) &&
      chunk <= schedule::largest_even_chunk(num_units, active, page_size)) {
    for (int64_t r = 0; r < num_rows; ++r) {
      const int32_t units = rows[r].end - rows[r].begin, parts = schedule::ceil_div(units, chunk);
      for (int32_t j = 1; j <= parts; ++j) {
        borders.push_back(rows[r].begin + schedule::even_border(j, units, parts));
      }
    }
    return borders;
  }
  if (const int32_t whole = rows_of_a_worker(rows, num_rows, active, page_size)) {
    for (int64_t r = 0; r < num_rows; r += whole) {
      borders.push_back(rows[std::min<int64_t>(r + whole, num_rows) - 1].end);
    }
    return borders;
  }
  const int32_t row_end = schedule::row_end_units(num_units, active, page_size);
  int64_t row = -1;
  int32_t total = 0, before = 0;  // of units and row ends: of all rows, and of those before `row`
  const auto counted = [&](int64_t r) {
    const int32_t units = rows[r].end - rows[r].begin;
    return units > 0 ? units + row_end : 0;
  };
  for (int64_t r = 0; r < num_rows; ++r) total += counted(r);
  int32_t behind = 0;  // the same, with `row`
  for (int32_t k = 1; k <= active; ++k) {
    const int32_t border = schedule::even_border(k, total, active);
    while (behind < border) {
      before = behind;
      behind += counted(++row);
    }
    const RowFacts& of = rows[row];
    const int32_t even = std::min(of.end, of.begin + border - before);
    borders.push_back(
        schedule::snapped_border(even, of.begin, of.end, num_units, active, page_size));
  }
  return borders;
}

// One layer of the arguments.
struct LayerPlan {
  const PlanArgs& args;
  int64_t layer;
  int64_t heads = args.lengths.shape[2];
  int64_t num_rows = args.lengths.shape[1] * heads;
  Worker* workers =
      reinterpret_cast<Worker*>(args.schedule.ptr<int32_t>() + layer * args.schedule.stride[0]);
  RowFacts* rows = reinterpret_cast<RowFacts*>(workers + args.num_workers);

  const int32_t* row_of(const TensorView& x, int64_t row) const {
    return x.ptr<int32_t>() + layer * x.stride[0] + row / heads * x.stride[1] +
           row % heads * x.stride[2];
  }

  int32_t length_before(int64_t row) const { return *row_of(args.lengths, row); }

  int32_t page_of(int32_t unit, int64_t row) const {
    const int32_t index = unit - rows[row].begin;
    const int32_t used = schedule::ceil_div(length_before(row), args.page_size);
    return index < used ? row_of(args.block_table, row)[index]
                        : row_of(args.fresh_pages, row)[index - used];
  }

  // Of a row, as attend will see it.
  int32_t length_then(int64_t row) const {
    const int32_t length = length_before(row) + num_new(row);
    if (args.share == 0) return length;
    return listing::Rule(args).listed_length(length, !args.new_tokens || num_new(row) > 0);
  }

  int32_t num_new(int64_t row) const {
    return args.new_tokens && args.num_new ? args.num_new.ptr<int32_t>()[row / heads]
                                           : args.new_tokens;
  }

  // Throws unless the block table has room for what rows hold, and all can be counted.
  void check_rows() const {
    const int64_t most = args.block_table.shape[3] * args.page_size;
    int64_t units = 0;
    for (int64_t r = 0; r < num_rows; ++r) {
      const int32_t length = length_before(r);
      ADAKV_CHECK(length >= 0 && length <= most, "plan: lengths must lie in 0 .. M * P = ", most,
                  ", got ", length);
      ADAKV_CHECK(num_new(r) <= schedule::kMostLength - length, "plan: a row holds at most ",
                  schedule::kMostLength, " entries, got ", length, " and ", num_new(r),
                  " new ones");
      units += schedule::ceil_div(length + num_new(r), args.page_size);
    }
    ADAKV_CHECK(units <= schedule::kMostUnits, "plan: the rows of a layer hold at most ",
                schedule::kMostUnits, " pages, got ", units);
  }

  void write_rows() {
    int32_t begin = 0;
    for (int64_t r = 0; r < num_rows; ++r) {
      const int32_t length = length_then(r);
      const int32_t end = begin + schedule::ceil_div(length, args.page_size);
      rows[r] = {begin, end, length, 0, 0, 0, 0, 0};
      begin = end;
    }
  }

  // Tells rows who does them. A worker's range holds units of the rows from its first to its last.
  void share_rows(const std::vector<int32_t>& borders) {
    int64_t worker = 0;
    int32_t partials = 0;
    for (int64_t r = 0; r < num_rows; ++r) {
      RowFacts& row = rows[r];
      row.first_partial = partials;
      if (row.begin == row.end) continue;
      while (borders[worker + 1] <= row.begin) ++worker;
      row.first_worker = static_cast<int32_t>(worker);
      int64_t last = worker;
      while (borders[last + 1] < row.end) ++last;
      row.num_partials = static_cast<int32_t>(last - worker + 1);
      if (row.num_partials > 1) partials += row.num_partials;
    }
  }

  void write_workers(const std::vector<int32_t>& borders) {
    int64_t row = 0;
    for (int64_t w = 0; w < args.num_workers; ++w) {
      Worker& worker = workers[w] = {};
      if (w + 1 >= static_cast<int64_t>(borders.size())) continue;
      worker.begin = borders[w];
      worker.end = borders[w + 1];
      while (rows[row].end <= worker.begin) ++row;
      worker.row = static_cast<int32_t>(row);
      worker.facts = rows[row];
      worker.looks_up = args.share > 0;
      if (worker.looks_up) continue;
      int64_t r = row;
      const int32_t listed = std::min<int32_t>(worker.end - worker.begin, schedule::kWorkerPages);
      for (int32_t i = 0; i < listed; ++i) {
        while (rows[r].end <= worker.begin + i) ++r;
        worker.pages[i] = page_of(worker.begin + i, r);
      }
    }
  }
};

}  // namespace

void CpuBackend::plan(const PlanArgs& args) {
  const int64_t num_layers = args.lengths.shape[0];
  for (int64_t layer = 0; layer < num_layers; ++layer) LayerPlan{args, layer}.check_rows();
  parallel_for(num_layers, [&](int64_t layer) {
    LayerPlan plan{args, layer};
    plan.write_rows();
    const std::vector<int32_t> borders =
        find_borders(plan.rows, plan.num_rows, args.num_workers, args.page_size);
    plan.share_rows(borders);
    plan.write_workers(borders);
  });
}

}  // namespace adakv
