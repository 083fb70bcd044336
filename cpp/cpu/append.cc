// Writes new entries behind the last one of every row. A row that fills its page goes on in its
// next fresh one.
#include <limits>

#include "adakv/error.h"
#include "cpu/cpu_backend.h"
#include "cpu/page_writer.h"
#include "cpu/parallel.h"
#include "cpu/tail_writer.h"
#include "ops/schedule.h"

namespace adakv {
namespace {

constexpr int64_t kBytesPerThread = 1 << 18;  // below, waking a thread costs more than copying

template <typename T = int32_t>
T* row_of(const TensorView& x, int64_t b, int64_t h) {
  return x.ptr<T>() + b * x.stride[0] + h * x.stride[1];
}

// Throws unless `count` more entries of a row have their pages, which lie in the pool.
void check_room(const LayerView& layer, int64_t b, int64_t h, int32_t count) {
  const int32_t page_size = static_cast<int32_t>(layer.pages.shape[2]);
  const int32_t length = *row_of(layer.lengths, b, h);
  const int64_t num_pages = layer.pages.shape[0];
  const int64_t most = layer.block_table.shape[2] * page_size;
  ADAKV_CHECK(length >= 0 && length <= most, "append: lengths must lie in 0 .. M * P = ", most,
              ", got ", length);
  ADAKV_CHECK(count <= schedule::kMostLength - length, "append: a row holds at most ",
              schedule::kMostLength, " entries, got ", length, " and ", count, " new ones");
  const int32_t used = schedule::ceil_div(length, page_size);
  const int32_t pages = schedule::ceil_div(length + count, page_size);
  const int32_t* fresh = row_of(layer.fresh_pages, b, h);
  ADAKV_CHECK(pages <= layer.block_table.shape[2], "append: a row of ", length + count,
              " entries needs ", pages, " pages; the block table has room for ",
              layer.block_table.shape[2]);
  if (count > 0 && length % page_size != 0) {
    const int32_t page = row_of(layer.block_table, b, h)[used - 1];
    ADAKV_CHECK(page >= 0 && page < num_pages, "append: block_table must name pages 0 .. ",
                num_pages - 1, ", got ", page, " for entry ", length, " of sequence ", b,
                ", kv head ", h);
  }
  for (int32_t k = 0; k < pages - used; ++k) {
    const bool is_there = k < layer.fresh_pages.shape[2] && fresh[k] >= 0 && fresh[k] < num_pages;
    ADAKV_CHECK(is_there, "append: sequence ", b, " has no fresh page: call grow() before");
  }
}

// Where a new entry of a row goes, and the row's counts.
template <typename Write>
void append_row(const AppendArgs& args, int64_t b, int64_t h, int32_t count, const Write& write) {
  const LayerView& layer = args.layer;
  const int64_t element = static_cast<int64_t>(dtype_size(args.keys.dtype));
  const int32_t page_size = static_cast<int32_t>(layer.pages.shape[2]);
  int32_t* table = row_of(layer.block_table, b, h);
  const int32_t* fresh = row_of(layer.fresh_pages, b, h);
  int32_t* length = row_of(layer.lengths, b, h);
  const int32_t seen = layer.seen.ptr<int32_t>()[b];
  const auto source = [&](const TensorView& x, int64_t column) {
    return x.ptr<char>() + (b * x.stride[0] + h * x.stride[1] + column * x.stride[2]) * element;
  };
  for (int32_t i = 0; i < count; ++i) {
    const int32_t slot = *length % page_size, column = *length / page_size;
    if (slot == 0) table[column] = *fresh++;
    const int64_t page = table[column];
    const int64_t from = args.keys.shape[2] - count + i;
    write(page, slot, source(args.keys, from), source(args.values, from));
    layer.page_positions.ptr<int32_t>()[page * layer.page_positions.stride[0] + slot] = seen + i;
    if (layer.page_biases) {
      layer.page_biases.ptr<uint16_t>()[page * layer.page_biases.stride[0] + slot] = 0;
    }
    ++*length;
  }
}

void append_row(const AppendArgs& args, int64_t b, int64_t h, int32_t count, FullTails full) {
  if (args.layer.tails) {
    const TailWriter tails(args.layer);
    append_row(args, b, h, count, [&](int64_t page, int32_t slot, const char* k, const char* v) {
      tails.write(b, h, slot, k, v);
      if (slot == kTailedPageSize - 1 && full == FullTails::kQuantise) tails.quantise(b, h, page);
    });
    return;
  }
  const PageWriter writer(args.layer, args.keys.dtype);
  append_row(args, b, h, count, [&](int64_t page, int32_t slot, const char* k, const char* v) {
    writer.write_key(page, slot, k);
    writer.write_value(page, slot, v);
  });
}

}  // namespace

void CpuBackend::append(const AppendArgs& args) {
  append_entries(args, FullTails::kQuantise);
}

void append_entries(const AppendArgs& args, FullTails full) {
  const int64_t batch = args.keys.shape[0], heads = args.keys.shape[1];
  const auto count = [&](int64_t b) {
    return args.num_new ? args.num_new.ptr<int32_t>()[b] : static_cast<int32_t>(args.keys.shape[2]);
  };
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t seen = args.layer.seen.ptr<int32_t>()[b];
    ADAKV_CHECK(seen >= 0 && seen <= std::numeric_limits<int32_t>::max() - count(b),
                "append: seen must not be negative, and leave room in int32 for ", count(b),
                " tokens, got ", seen, " for sequence ", b);
    for (int64_t h = 0; h < heads; ++h) check_room(args.layer, b, h, count(b));
  }
  const auto row = [&](int64_t r) {
    append_row(args, r / heads, r % heads, count(r / heads), full);
  };
  if (args.keys.size() * static_cast<int64_t>(dtype_size(args.keys.dtype)) > kBytesPerThread) {
    parallel_for(batch * heads, row);
  } else {
    for (int64_t r = 0; r < batch * heads; ++r) row(r);
  }
  for (int64_t b = 0; b < batch; ++b) args.layer.seen.ptr<int32_t>()[b] += count(b);
}

}  // namespace adakv
