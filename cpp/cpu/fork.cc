// Fills the rows of a fork: their tables, and pages of their own. The first pass over the (small)
// integers finds everything that could go wrong, before anything is written.
#include <algorithm>
#include <cstring>
#include <vector>

#include "adakv/error.h"
#include "cpu/cpu_backend.h"
#include "cpu/parallel.h"
#include "ops/page_pieces.h"
#include "ops/schedule.h"

namespace adakv {
namespace {

template <typename T = int32_t>
T* row_of(const TensorView& x, int64_t b, int64_t h) {
  const int64_t element = b * x.stride[0] + h * x.stride[1];
  return reinterpret_cast<T*>(x.ptr<char>() + element * static_cast<int64_t>(dtype_size(x.dtype)));
}

/// A row of the fork, and which of its pages are its own.
struct Branch {
  int64_t source;
  int32_t length, num_pages;
  int32_t first_own;   // column from which on pages are copied
  const int32_t* own;  // to these
  int32_t fresh;       // the row's fresh page, -1 if it has none
};

class Forking {
 public:
  explicit Forking(const ForkArgs& args)
      : args_(args),
        layer_(args.layer),
        pieces_(args.layer),
        batch_(layer_.lengths.shape[0]),
        heads_(layer_.lengths.shape[1]),
        page_size_(static_cast<int32_t>(layer_.page_positions.shape[1])) {}

  void run() {
    std::vector<Branch> branches;
    for (int64_t b = 0; b < batch_; ++b) find(b, branches);
    parallel_for(batch_ * heads_, [&](int64_t r) { fill(r / heads_, r % heads_, branches[r]); });
    for (int64_t b = 0; b < batch_; ++b) {
      layer_.seen.ptr<int32_t>()[b] = args_.source_seen.ptr<int32_t>()[source(b)] - back(b);
    }
  }

 private:
  int32_t source(int64_t b) const { return args_.sources.ptr<int32_t>()[b]; }
  int32_t back(int64_t b) const { return args_.back ? args_.back.ptr<int32_t>()[b] : 0; }

  // The rows of a sequence.
  void find(int64_t b, std::vector<Branch>& branches) const {
    const int64_t num_sources = args_.source_lengths.shape[0];
    ADAKV_CHECK(source(b) >= 0 && source(b) < num_sources, "fork: sources must lie in 0 .. ",
                num_sources - 1, ", got ", source(b), " for sequence ", b);
    const int32_t stretch = args_.stretch.ptr<int32_t>()[b];
    ADAKV_CHECK(stretch >= 0 && stretch <= page_size_, "fork: stretch must lie in 0 .. ",
                page_size_, ", got ", stretch, " for sequence ", b);
    const int32_t seen = args_.source_seen.ptr<int32_t>()[source(b)];
    ADAKV_CHECK(back(b) >= 0 && back(b) <= seen, "fork: back must lie in 0 .. ", seen, ", got ",
                back(b), " for sequence ", b);
    const int32_t* indptr = args_.page_indptr.ptr<int32_t>() + b;
    ADAKV_CHECK(indptr[0] >= 0 && indptr[0] <= indptr[1] && indptr[1] <= args_.page_ids.shape[0],
                "fork: page_indptr must lie in 0 .. ", args_.page_ids.shape[0], " and ascend");
    const int32_t *own = args_.page_ids.ptr<int32_t>() + indptr[0],
                  *end = args_.page_ids.ptr<int32_t>() + indptr[1];
    check_pages("page_ids", own, end);
    const int64_t first_row = static_cast<int64_t>(branches.size());
    for (int64_t h = 0; h < heads_; ++h) {
      const int32_t held = *row_of(args_.source_lengths, source(b), h);
      const int64_t most = args_.source_table.shape[2] * page_size_;
      ADAKV_CHECK(held >= back(b) && held <= most, "fork: source_lengths must lie in ", back(b),
                  " .. M * P = ", most, ", got ", held);
      const int32_t length = held - back(b);
      Branch branch = {source(b), length, schedule::ceil_div(length, page_size_), 0, own, -1};
      const int32_t* table = row_of(args_.source_table, source(b), h);
      check_pages("source_table", table, table + branch.num_pages);
      if (!args_.whole) own_last(branch, h, stretch, end);
      branches.push_back(branch);
    }
    if (args_.whole) deal(branches.data() + first_row, end);
  }

  void check_pages(const char* name, const int32_t* begin, const int32_t* end) const {
    const int64_t num_pages = layer_.pages.shape[0];
    for (const int32_t* page = begin; page < end; ++page) {
      ADAKV_CHECK(*page >= 0 && *page < num_pages, "fork: ", name, " must name pages 0 .. ",
                  num_pages - 1, ", got ", *page);
    }
  }

  // Of page_ids [2, Hkv] a row has one for the page before the one that begins in this stretch, and
  // one for this.
  void own_last(Branch& branch, int64_t h, int32_t stretch, const int32_t* end) const {
    const int64_t count = end - branch.own;
    ADAKV_CHECK(count == 2 * heads_ || (count == 0 && branch.length == 0),
                "fork: page_ids must name 2 * Hkv = ", 2 * heads_, " pages of a sequence, got ",
                count);
    if (count == 0) return;
    branch.own += h;
    branch.fresh = branch.own[heads_];
    const int32_t before = schedule::ceil_div(std::max(branch.length - stretch, 0), page_size_);
    const bool has_begun = branch.num_pages > before;
    branch.first_own = branch.num_pages - (has_begun ? 2 : 1);
  }

  // Of page_ids [Q] the rows get one for each page in turn, then a fresh one each.
  void deal(Branch* rows, const int32_t* end) const {
    if (heads_ == 0) return;
    const int32_t* next = rows[0].own;
    const int64_t count = end - next;
    int64_t needed = 0;
    for (int64_t h = 0; h < heads_; ++h) needed += rows[h].num_pages;
    ADAKV_CHECK(needed <= count, "fork: page_ids must name at least ", needed,
                " pages of a sequence, got ", count);
    for (int64_t h = 0; h < heads_; ++h) {
      rows[h].own = next;
      next += rows[h].num_pages;
    }
    for (int64_t h = 0; h < heads_ && next < end; ++h) rows[h].fresh = *next++;
  }

  void fill(int64_t b, int64_t h, const Branch& branch) const {
    const int32_t* from = row_of(args_.source_table, branch.source, h);
    int32_t* table = row_of(layer_.block_table, b, h);
    for (int32_t i = 0; i < branch.num_pages; ++i) {
      table[i] = from[i];
      if (i < branch.first_own) continue;
      table[i] = branch.own[(i - branch.first_own) * (args_.whole ? 1 : heads_)];
      copy_page(from[i], table[i]);
    }
    std::fill(table + branch.num_pages, table + layer_.block_table.shape[2], -1);
    int32_t* fresh = row_of(layer_.fresh_pages, b, h);
    std::fill(fresh, fresh + layer_.fresh_pages.shape[2], -1);
    fresh[0] = branch.fresh;
    *row_of(layer_.lengths, b, h) = branch.length;
    if (!layer_.tails) return;
    const size_t bytes = layer_.tails.shape[2] * layer_.tails.shape[3] * sizeof(uint16_t);
    std::memcpy(row_of<char>(layer_.tails, b, h),
                row_of<char>(args_.source_tails, branch.source, h), bytes);
  }

  void copy_page(int64_t from, int64_t to) const {
    for (int i = 0; i < pieces_.count; ++i) {
      const PagePiece& piece = pieces_.pieces[i];
      std::memcpy(piece.data + to * piece.page_stride, piece.data + from * piece.page_stride,
                  piece.bytes);
    }
  }

  const ForkArgs& args_;
  const LayerView& layer_;
  const PagePieces pieces_;
  const int64_t batch_, heads_;
  const int32_t page_size_;
};

}  // namespace

void CpuBackend::fork(const ForkArgs& args) {
  Forking(args).run();
}

}  // namespace adakv
