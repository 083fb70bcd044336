// What attend checks of pages and schedules, which it may look at on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "adakv/error.h"
#include "adakv/ops.h"
#include "ops/schedule.h"

namespace adakv {

/// Throws unless every page that a row holds lies in the pool: a wild id would lead outside of it.
inline void check_pages(const AttendArgs& args) {
  const TensorView &table = args.layer.block_table, &lengths = args.layer.lengths;
  const auto num_pages = static_cast<uint32_t>(args.layer.pages.shape[0]);
  const int32_t page_size = static_cast<int32_t>(args.layer.pages.shape[2]);
  const int64_t most = table.shape[2] * page_size;
  for (int64_t b = 0; b < lengths.shape[0]; ++b) {
    for (int64_t h = 0; h < lengths.shape[1]; ++h) {
      const int32_t length = lengths.ptr<int32_t>()[b * lengths.stride[0] + h * lengths.stride[1]];
      ADAKV_CHECK(length >= 0 && length <= std::min<int64_t>(most, schedule::kMostLength),
                  "attend: lengths must lie in 0 .. M * P = ", most, ", got ", length);
      const int32_t* ids = table.ptr<int32_t>() + b * table.stride[0] + h * table.stride[1];
      const int32_t* end = ids + schedule::ceil_div(length, page_size);
      bool are_there = true;
      for (const int32_t* id = ids; id != end; ++id) {
        are_there &= static_cast<uint32_t>(*id) < num_pages;
      }
      if (are_there) continue;
      const int32_t* wild = std::find_if(
          ids, end, [&](int32_t id) { return static_cast<uint32_t>(id) >= num_pages; });
      throw InvalidArgument(detail::concat("attend: block_table must name pages 0 .. ",
                                           args.layer.pages.shape[0] - 1, ", got ", *wild,
                                           " for sequence ", b, ", kv head ", h));
    }
  }
}

/// A schedule of other lengths than the layer's, or no schedule at all, would lead outside of the
/// rows' pages and of the workspace. It is a few integers for each row and worker.
class ScheduleCheck {
 public:
  explicit ScheduleCheck(const AttendArgs& args)
      : args_(args),
        num_rows_(args.layer.lengths.shape[0] * args.layer.lengths.shape[1]),
        workers_(args.schedule.ptr<const schedule::Worker>()),
        rows_(reinterpret_cast<const schedule::RowFacts*>(workers_ + args.num_workers)) {}

  void run() const {
    int64_t units = 0, partials = 0;
    for (int64_t r = 0; r < num_rows_; ++r) {
      const schedule::RowFacts& row = rows_[r];
      const int64_t length = length_after(r);
      const int64_t pages = (length + page_size_ - 1) / page_size_;
      ADAKV_CHECK(row.length == length && row.begin == units && row.end == units + pages,
                  "attend: the schedule must be that of the layer's lengths, new tokens included, ",
                  "but it says ", row.length, " for row ", r, ", which has ", length);
      units = row.end;
      require(row.num_partials == num_workers_of(row));
      if (row.num_partials <= 1) continue;
      require(row.first_partial == partials);
      partials += row.num_partials;
    }
    int64_t begin = 0;
    for (int64_t w = 0; w < args_.num_workers; ++w) {
      const schedule::Worker& worker = workers_[w];
      if (worker.begin == 0 && worker.end == 0) continue;  // has nothing to do
      require(worker.begin == begin && worker.end > begin && worker.end <= units);
      require(worker.row >= 0 && worker.row < num_rows_ && rows_[worker.row].begin <= begin &&
              rows_[worker.row].end > begin);
      begin = worker.end;
    }
    require(begin == units);
  }

 private:
  static void require(bool condition) {
    ADAKV_CHECK(condition,
                "attend: schedule must be what plan wrote for this layer and num_workers");
  }

  /// Entries of a row when the new ones are there.
  int64_t length_after(int64_t row) const {
    const TensorView& lengths = args_.layer.lengths;
    const int64_t b = row / lengths.shape[1], h = row % lengths.shape[1];
    const int64_t length = lengths.ptr<int32_t>()[b * lengths.stride[0] + h * lengths.stride[1]];
    if (!args_.keys) return length;
    return length + (args_.num_new ? args_.num_new.ptr<int32_t>()[b] : args_.keys.shape[2]);
  }

  /// Workers that share a row: from its first one on, each begins where the one before ends.
  int64_t num_workers_of(const schedule::RowFacts& row) const {
    if (row.begin == row.end) return 0;
    require(row.first_worker >= 0 && row.first_worker < args_.num_workers);
    const schedule::Worker& first = workers_[row.first_worker];
    require(first.begin <= row.begin && first.end > row.begin);
    int64_t last = row.first_worker;
    while (last + 1 < args_.num_workers && workers_[last].end < row.end) ++last;
    require(workers_[last].end >= row.end);
    return last - row.first_worker + 1;
  }

  const AttendArgs& args_;
  const int64_t num_rows_, page_size_ = args_.layer.pages.shape[2];
  const schedule::Worker* workers_;  // [num_workers]
  const schedule::RowFacts* rows_;   // [num_rows]
};

}  // namespace adakv
