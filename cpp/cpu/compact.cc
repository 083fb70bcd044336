// Copies the kept entries of a prompt into pages, a row at a time. The first pass over the (small)
// integers deals the pages and finds everything that could go wrong, before anything is written.
#include <algorithm>
#include <vector>

#include "adakv/error.h"
#include "cpu/cpu_backend.h"
#include "cpu/page_writer.h"
#include "cpu/parallel.h"
#include "cpu/tail_writer.h"
#include "ops/schedule.h"

namespace adakv {
namespace {

// [K]: where kept entries lie among keys and values.
const int32_t* places_of(const CompactArgs& args) {
  return (args.places ? args.places : args.positions).ptr<int32_t>();
}

// For every row the index of its first page in page_ids, and for the fresh page the index behind
// the last row's: rows of sequence b start at first_page[b * (Hkv + 1)].
std::vector<int64_t> deal_pages(const CompactArgs& args) {
  const int64_t batch = args.keys.shape[0], heads = args.keys.shape[1];
  const int32_t length = static_cast<int32_t>(args.keys.shape[2]);
  const int32_t page_size = static_cast<int32_t>(args.layer.pages.shape[2]);
  const int32_t* indptr = args.indptr.ptr<int32_t>();            // [B * Hkv + 1]
  const int32_t* page_indptr = args.page_indptr.ptr<int32_t>();  // [B + 1]
  const int32_t* positions = args.positions.ptr<int32_t>();      // [K]
  const int32_t* places = places_of(args);                       // [K]
  const int32_t* page_ids = args.page_ids.ptr<int32_t>();        // [Q]
  std::vector<int64_t> first_page;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t next = page_indptr[b];
    ADAKV_CHECK(
        next >= 0 && next <= page_indptr[b + 1] && page_indptr[b + 1] <= args.page_ids.shape[0],
        "compact: page_indptr must lie in 0 .. ", args.page_ids.shape[0], " and ascend");
    for (int64_t r = b * heads; r < (b + 1) * heads; ++r) {
      ADAKV_CHECK(
          indptr[r] >= 0 && indptr[r] <= indptr[r + 1] && indptr[r + 1] <= args.positions.shape[0],
          "compact: indptr must ascend from 0 to at most ", args.positions.shape[0]);
      const int32_t kept = indptr[r + 1] - indptr[r];
      ADAKV_CHECK(kept <= schedule::kMostLength, "compact: a row holds at most ",
                  schedule::kMostLength, " entries, got ", kept);
      const int32_t pages = schedule::ceil_div(kept, page_size);
      ADAKV_CHECK(pages <= args.layer.block_table.shape[2], "compact: a row keeps ", kept,
                  " entries, which needs ", pages, " pages; the block table has room for ",
                  args.layer.block_table.shape[2]);
      first_page.push_back(next);
      next += pages;
    }
    first_page.push_back(next);
    next += heads;
    ADAKV_CHECK(next <= page_indptr[b + 1], "compact: sequence ", b, " needs ",
                next - page_indptr[b], " pages, got ", page_indptr[b + 1] - page_indptr[b]);
  }
  for (int32_t i = indptr[0]; i < indptr[batch * heads]; ++i) {
    ADAKV_CHECK(places[i] >= 0 && places[i] < length,
                "compact: ", args.places ? "places" : "positions", " must lie in 0 .. ", length - 1,
                ", got ", places[i]);
    ADAKV_CHECK(positions[i] >= 0, "compact: positions must not be negative, got ", positions[i]);
  }
  for (int32_t i = page_indptr[0]; i < page_indptr[batch]; ++i) {
    ADAKV_CHECK(page_ids[i] >= 0 && page_ids[i] < args.layer.pages.shape[0],
                "compact: page_ids must lie in 0 .. ", args.layer.pages.shape[0] - 1, ", got ",
                page_ids[i]);
  }
  return first_page;
}

constexpr int kAhead = 4;  // entries that are fetched before they are needed

// Where the entries of a row lie in keys or values.
struct Row {
  Row(const TensorView& x, int64_t b, int64_t h)
      : pitch(x.stride[2] * static_cast<int64_t>(dtype_size(x.dtype))),
        bytes(x.shape[3] * static_cast<int64_t>(dtype_size(x.dtype))),
        data(x.ptr<char>() + (b * x.stride[0] + h * x.stride[1]) * dtype_size(x.dtype)) {}

  const char* entry(int32_t place) const { return data + place * pitch; }
  void fetch(int32_t place) const {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(entry(place) + i);
  }

  int64_t pitch, bytes;
  const char* data;
};

// Writes the entries at some places, of one page, as the page's format has it.
void write_page(const PageWriter& writer,
                const Row& keys,
                const Row& values,
                int64_t page,
                const int32_t* begin,
                const int32_t* end) {
  for (const int32_t* p = begin; p != end; ++p) {
    if (end - p > kAhead) keys.fetch(p[kAhead]);
    writer.write_key(page, p - begin, keys.entry(*p));
  }
  for (const int32_t* p = begin; p != end; ++p) {
    if (end - p > kAhead) values.fetch(p[kAhead]);
    writer.write_value(page, p - begin, values.entry(*p));
  }
}

// The biases of the entries at some places of row (b, h), of one page.
void write_biases(const CompactArgs& args,
                  int64_t b,
                  int64_t h,
                  int64_t page,
                  const int32_t* begin,
                  const int32_t* end) {
  const TensorView &from = args.biases, &to = args.layer.page_biases;
  uint16_t* out = to.ptr<uint16_t>() + page * to.stride[0];
  if (!from) {
    std::fill(out, out + (end - begin), uint16_t{0});
    return;
  }
  const uint16_t* biases = from.ptr<uint16_t>() + b * from.stride[0] + h * from.stride[1];
  std::transform(begin, end, out, [&](int32_t place) { return biases[place]; });
}

// The same of the whole pages of a row (b, h) with a tail; what is behind them goes to the row's tail.
void write_tailed_row(const TailWriter& writer,
                      const Row& keys,
                      const Row& values,
                      int64_t b,
                      int64_t h,
                      const int32_t* pages,
                      const int32_t* begin,
                      const int32_t* end) {
  constexpr int kSize = kTailedPageSize;
  const void* entries[2][2 * kSize];  // of a page, and of the one behind it
  const auto look_up = [&](const int32_t* first, const void** of_page) {
    for (int i = 0; i < kSize; ++i) {
      of_page[i] = keys.entry(first[i]);
      of_page[kSize + i] = values.entry(first[i]);
    }
  };
  if (end - begin >= kSize) look_up(begin, entries[0]);
  for (int i = 0; end - begin >= kSize; ++i, begin += kSize) {
    const void** next = end - begin >= 2 * kSize ? entries[(i + 1) % 2] : nullptr;
    if (next != nullptr) look_up(begin + kSize, next);
    writer.quantise(entries[i % 2], next, pages[i]);
  }
  for (const int32_t* p = begin; p != end; ++p) {
    writer.write(b, h, p - begin, keys.entry(*p), values.entry(*p));
  }
}

}  // namespace

void CpuBackend::compact(const CompactArgs& args) {
  if (!args.keys) return cpu_compact_in_place(args);
  const LayerView& layer = args.layer;
  const int64_t batch = args.keys.shape[0], heads = args.keys.shape[1];
  const int32_t page_size = static_cast<int32_t>(layer.pages.shape[2]);
  const PageWriter writer(layer, args.keys.dtype);
  const TailWriter tails(layer);
  const int64_t columns = layer.block_table.shape[2], num_fresh = layer.fresh_pages.shape[2];
  const int32_t* indptr = args.indptr.ptr<int32_t>();      // [B * Hkv + 1]
  const int32_t* page_ids = args.page_ids.ptr<int32_t>();  // [Q]
  const std::vector<int64_t> first_page = deal_pages(args);

  parallel_for(batch * heads, [&](int64_t r) {
    const int64_t b = r / heads, h = r % heads;
    const auto row_of = [&](const TensorView& x) {
      return x.ptr<int32_t>() + b * x.stride[0] + h * x.stride[1];
    };
    const int32_t kept = indptr[r + 1] - indptr[r];
    const int32_t* positions = args.positions.ptr<int32_t>() + indptr[r];  // [kept]
    const int32_t* places = places_of(args) + indptr[r];                   // [kept]
    const int32_t* pages = page_ids + first_page[b * (heads + 1) + h];
    const int32_t num_pages = schedule::ceil_div(kept, page_size);
    const Row keys(args.keys, b, h), values(args.values, b, h);
    for (int32_t i = 0; i < num_pages; ++i) {
      const int32_t first = i * page_size, last = std::min(first + page_size, kept);
      const int32_t *begin = places + first, *end = places + last;
      if (!layer.tails) write_page(writer, keys, values, pages[i], begin, end);
      std::copy(positions + first, positions + last,
                layer.page_positions.ptr<int32_t>() + pages[i] * layer.page_positions.stride[0]);
      if (layer.page_biases) write_biases(args, b, h, pages[i], begin, end);
    }
    if (layer.tails) {
      write_tailed_row(tails, keys, values, b, h, pages, places, places + kept);
    }
    int32_t* table = row_of(layer.block_table);
    std::copy(pages, pages + num_pages, table);
    std::fill(table + num_pages, table + columns, -1);
    int32_t* fresh = row_of(layer.fresh_pages);
    std::fill(fresh, fresh + num_fresh, -1);
    fresh[0] = page_ids[first_page[b * (heads + 1) + heads] + h];
    *row_of(layer.lengths) = kept;
  });
  for (int64_t b = 0; b < batch; ++b) {
    layer.seen.ptr<int32_t>()[b] =
        args.seq_lens ? args.seq_lens.ptr<int32_t>()[b] : static_cast<int32_t>(args.keys.shape[2]);
  }
}

size_t CpuBackend::workspace_bytes(const CompactArgs&) const {
  return 0;
}

}  // namespace adakv
