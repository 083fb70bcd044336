// compact of the entries that rows hold: they move to lower slots of their own rows, whose pages stay
// theirs. Pages that page_ids doesn't name are copied to others at the end. The first pass over the
// (small) integers finds everything that could go wrong, before anything is written.
#include <algorithm>
#include <cstring>
#include <vector>

#include "adakv/error.h"
#include "cpu/cpu_backend.h"
#include "cpu/parallel.h"
#include "ops/schedule.h"
#include "ops/slot_parts.h"

namespace adakv {
namespace {

struct Relocation {
  int32_t from, to;
};

class InPlace {
 public:
  explicit InPlace(const CompactArgs& args)
      : args_(args),
        layer_(args.layer),
        parts_(args.layer),
        batch_(layer_.lengths.shape[0]),
        heads_(layer_.lengths.shape[1]),
        page_size_(static_cast<int32_t>(layer_.page_positions.shape[1])),
        indptr_(args.indptr.ptr<int32_t>()) {}

  void run() {
    check_kept();
    std::vector<int32_t> tables(batch_ * heads_ * num_columns(), -1), fresh;
    std::vector<Relocation> relocations;
    for (int64_t b = 0; b < batch_; ++b) deal(b, tables.data(), fresh, relocations);
    parallel_for(batch_ * heads_, [&](int64_t r) { move_entries(r); });
    parallel_for(static_cast<int64_t>(relocations.size()),
                 [&](int64_t i) { copy_page(relocations[i]); });
    for (int64_t r = 0; r < batch_ * heads_; ++r) {
      const int32_t* table = tables.data() + r * num_columns();
      std::copy_n(table, num_columns(), row_of(layer_.block_table, r));
      std::fill_n(row_of(layer_.fresh_pages, r), layer_.fresh_pages.shape[2], -1);
      *row_of(layer_.fresh_pages, r) = fresh[r];
      *row_of(layer_.lengths, r) = num_kept(r);
    }
  }

 private:
  int64_t num_columns() const { return layer_.block_table.shape[2]; }
  int32_t num_kept(int64_t r) const { return indptr_[r + 1] - indptr_[r]; }
  int32_t num_pages(int64_t r) const { return schedule::ceil_div(num_kept(r), page_size_); }
  int32_t* row_of(const TensorView& x, int64_t r) const {
    return x.ptr<int32_t>() + r / heads_ * x.stride[0] + r % heads_ * x.stride[1];
  }

  void check_kept() const {
    const int64_t most = args_.positions.shape[0];
    for (int64_t r = 0; r < batch_ * heads_; ++r) {
      ADAKV_CHECK(indptr_[r] >= 0 && indptr_[r] <= indptr_[r + 1] && indptr_[r + 1] <= most,
                  "compact: indptr must ascend from 0 to at most ", most);
      const int32_t length = *row_of(layer_.lengths, r);
      int32_t before = -1;
      for (int32_t i = indptr_[r]; i < indptr_[r + 1]; ++i) {
        const int32_t slot = args_.positions.ptr<int32_t>()[i];
        ADAKV_CHECK(slot > before && slot < length,
                    "compact: positions must ascend within a row and lie in 0 .. ", length - 1,
                    ", got ", slot, " for row ", r);
        before = slot;
      }
    }
    const int32_t* page_ids = args_.page_ids.ptr<int32_t>();
    const int32_t* page_indptr = args_.page_indptr.ptr<int32_t>();
    for (int64_t b = 0; b < batch_; ++b) {
      ADAKV_CHECK(page_indptr[b] >= 0 && page_indptr[b] <= page_indptr[b + 1] &&
                      page_indptr[b + 1] <= args_.page_ids.shape[0],
                  "compact: page_indptr must lie in 0 .. ", args_.page_ids.shape[0], " and ascend");
    }
    for (int64_t i = batch_ > 0 ? page_indptr[0] : 0; i < (batch_ > 0 ? page_indptr[batch_] : 0);
         ++i) {
      ADAKV_CHECK(page_ids[i] >= 0 && page_ids[i] < layer_.pages.shape[0],
                  "compact: page_ids must lie in 0 .. ", layer_.pages.shape[0] - 1, ", got ",
                  page_ids[i]);
    }
  }

  // The block tables of a sequence's rows, their fresh pages, and which pages have to be copied.
  void deal(int64_t b,
            int32_t* tables,
            std::vector<int32_t>& fresh,
            std::vector<Relocation>& relocations) const {
    const int32_t* first = args_.page_ids.ptr<int32_t>() + args_.page_indptr.ptr<int32_t>()[b];
    const int32_t* last = args_.page_ids.ptr<int32_t>() + args_.page_indptr.ptr<int32_t>()[b + 1];
    std::vector<int32_t> named(first, last), kept;
    std::sort(named.begin(), named.end());
    const auto is_named = [&](int32_t page) {
      return std::binary_search(named.begin(), named.end(), page);
    };
    int64_t needed = heads_;
    for (int64_t r = b * heads_; r < (b + 1) * heads_; ++r) {
      const int32_t* table = row_of(layer_.block_table, r);
      kept.insert(kept.end(), table, table + num_pages(r));
      needed += num_pages(r);
    }
    std::sort(kept.begin(), kept.end());
    std::vector<int32_t> others;
    std::copy_if(first, last, std::back_inserter(others),
                 [&](int32_t page) { return !std::binary_search(kept.begin(), kept.end(), page); });
    ADAKV_CHECK(needed <= last - first, "compact: sequence ", b, " needs ", needed, " pages, got ",
                last - first);
    auto next = others.begin();
    for (int64_t r = b * heads_; r < (b + 1) * heads_; ++r) {
      int32_t* table = tables + r * num_columns();
      std::copy_n(row_of(layer_.block_table, r), num_pages(r), table);
      for (int32_t i = 0; i < num_pages(r); ++i) {
        if (is_named(table[i])) continue;
        relocations.push_back({table[i], *next});
        table[i] = *next++;
      }
    }
    fresh.insert(fresh.end(), next, next + heads_);
  }

  char* at(const SlotPart& part, const int32_t* pages, int32_t slot) const {
    return part.data + pages[slot / page_size_] * part.page_stride +
           slot % page_size_ * part.slot_bytes;
  }

  // Runs of entries that stay side by side move together, as far as pages go.
  void move_entries(int64_t r) const {
    const int32_t* slots = args_.positions.ptr<int32_t>() + indptr_[r];
    const int32_t* pages = row_of(layer_.block_table, r);
    const int32_t count = num_kept(r);
    int32_t i = 0;
    while (i < count && slots[i] == i) ++i;
    while (i < count) {
      const int32_t most =
          std::min({page_size_ - i % page_size_, page_size_ - slots[i] % page_size_, count - i});
      int32_t run = 1;
      while (run < most && slots[i + run] == slots[i] + run) ++run;
      for (int p = 0; p < parts_.count; ++p) {
        const SlotPart& part = parts_.parts[p];
        std::memmove(at(part, pages, i), at(part, pages, slots[i]),
                     static_cast<size_t>(run) * part.slot_bytes);
      }
      i += run;
    }
  }

  void copy_page(const Relocation& page) const {
    for (int p = 0; p < parts_.count; ++p) {
      const SlotPart& part = parts_.parts[p];
      std::memcpy(part.data + page.to * part.page_stride, part.data + page.from * part.page_stride,
                  static_cast<size_t>(page_size_) * part.slot_bytes);
    }
  }

  const CompactArgs& args_;
  const LayerView& layer_;
  const SlotParts parts_;
  const int64_t batch_, heads_;
  const int32_t page_size_;
  const int32_t* const indptr_;
};

}  // namespace

void cpu_compact_in_place(const CompactArgs& args) {
  InPlace(args).run();
}

}  // namespace adakv
