// What attend checks of schedules, which it may look at on the CPU.
#pragma once

#include <cstdint>

#include "adakv/error.h"
#include "adakv/ops.h"
#include "ops/schedule.h"

namespace adakv {

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
