#include "adakv/kv_cache.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "adakv/error.h"
#include "cache/config.h"
#include "cache/layout.h"
#include "cache/shared_pages.h"

namespace adakv {
namespace {

constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max();

// Memory for some tensors, which become views of it.
std::shared_ptr<void> allocate(Memory& memory,
                               void (*lay_out)(Layout&, const CacheConfig&, LayerView&),
                               const CacheConfig& config,
                               LayerView& view) {
  Layout size(nullptr, config.device);
  lay_out(size, config, view);
  const std::shared_ptr<void> data(memory.allocate(size.bytes()),
                                   [&memory](void* data) { memory.free(data); });
  Layout layout(data.get(), config.device);
  lay_out(layout, config, view);
  return data;
}

void fill(Memory& memory, const TensorView& view, int value, Stream stream) {
  memory.fill_rows(view.data, view.bytes(), value, view.bytes(), 1, stream);
}

// The same for the part that belongs to one sequence: [L, B, ...] -> all layers of sequence b.
void fill_sequence(
    Memory& memory, const TensorView& view, int32_t sequence, int value, Stream stream) {
  const size_t row = view.stride[1] * dtype_size(view.dtype),
               pitch = view.stride[0] * dtype_size(view.dtype);
  memory.fill_rows(view.ptr<char>() + sequence * row, pitch, value, row, view.shape[0], stream);
}

// Copies the first `count` of what lies along the first dimension.
void copy_first(
    Memory& memory, const TensorView& to, const TensorView& from, int64_t count, Stream stream) {
  const size_t bytes = count * from.stride[0] * dtype_size(from.dtype);
  if (bytes > 0) memory.copy_rows(to.data, bytes, from.data, bytes, bytes, 1, stream);
}

// Copies a table into one with more columns, -1 behind what it had.
void widen(Memory& memory, const TensorView& to, const TensorView& from, Stream stream) {
  const size_t row_bytes = from.shape[3] * sizeof(int32_t);
  fill(memory, to, -1, stream);
  memory.copy_rows(to.data, to.shape[3] * sizeof(int32_t), from.data, row_bytes, row_bytes,
                   from.size() / from.shape[3], stream);
}

}  // namespace

KVCache::KVCache(const CacheConfig& config, Memory& memory, Stream stream)
    : config_(checked(config)), memory_(memory) {
  ADAKV_CHECK(memory.device() == config.device, "KVCache: memory is on ",
              device_name(memory.device()), ", but config.device is ", device_name(config.device));
  std::shared_ptr<void> pool_data = allocate(memory, lay_out_pool, config_, all_layers_);
  shared_ = std::make_shared<SharedPages>(
      SharedPages{PagePool(config.num_pages), std::move(pool_data), {}});
  make_tables(stream);
}

// Empty tables and rows for a fork, and the pages of the other one.
KVCache::KVCache(const KVCache& from, int32_t num_sequences, Stream stream)
    : config_(from.config_),
      memory_(from.memory_),
      all_layers_(from.all_layers_),
      shared_(from.shared_) {
  config_.num_sequences = num_sequences;
  checked(config_);
  make_tables(stream);
}

// All that sequences have of their own, empty; the cache becomes a member of those that share pages.
void KVCache::make_tables(Stream stream) {
  sequences_.resize(config_.num_sequences);
  table_data_ = allocate(memory_, lay_out_table, config_, all_layers_);
  row_data_ = allocate(memory_, lay_out_rows, config_, all_layers_);
  fill(memory_, all_layers_.block_table, -1, stream);
  fill(memory_, all_layers_.fresh_pages, -1, stream);
  fill(memory_, all_layers_.lengths, 0, stream);
  fill(memory_, all_layers_.seen, 0, stream);
  shared_->members.push_back(this);
}

KVCache::~KVCache() {
  for (const Sequence& sequence : sequences_) {
    for (const std::vector<int32_t>& pages : sequence.pages) shared_->pool.give_back(pages);
  }
  std::vector<KVCache*>& members = shared_->members;
  members.erase(std::find(members.begin(), members.end(), this));
}

const PagePool& KVCache::pool() const {
  return shared_->pool;
}

void KVCache::reserve(int32_t num_pages, int32_t max_row_pages, Stream stream) {
  ADAKV_CHECK(num_pages >= 0, "reserve: num_pages must not be negative, got ", num_pages);
  ADAKV_CHECK(max_row_pages >= 0, "reserve: max_row_pages must not be negative, got ",
              max_row_pages);
  CacheConfig config = config_;
  config.num_pages = std::max(num_pages, config.num_pages);
  config.max_row_pages = std::max(max_row_pages, config.max_row_pages);
  checked(config);
  const LayerView& old = all_layers_;
  LayerView pool = old;
  std::shared_ptr<void> pool_data = shared_->data;
  if (config.num_pages > config_.num_pages) {
    pool_data = allocate(memory_, lay_out_pool, config, pool);
    const int64_t touched = shared_->pool.num_touched();
    copy_first(memory_, pool.pages, old.pages, touched, stream);
    if (config.format == PageFormat::kPlain) {  // else they lie in the pages
      copy_first(memory_, pool.page_positions, old.page_positions, touched, stream);
      copy_first(memory_, pool.page_biases, old.page_biases, touched, stream);
    }
  }
  struct Table {
    CacheConfig config;
    LayerView view;
    std::shared_ptr<void> data;
  };
  std::vector<Table> tables;  // of each member
  for (const KVCache* member : shared_->members) {
    Table table = {member->config_, pool, member->table_data_};
    table.config.num_pages = config.num_pages;
    if (member == this) table.config.max_row_pages = config.max_row_pages;
    for (TensorView LayerView::* own :
         {&LayerView::block_table, &LayerView::lengths, &LayerView::seen, &LayerView::fresh_pages,
          &LayerView::tails}) {
      table.view.*own = member->all_layers_.*own;
    }
    if (num_columns(table.config) > num_columns(member->config_)) {
      table.data = allocate(memory_, lay_out_table, table.config, table.view);
      widen(memory_, table.view.block_table, member->all_layers_.block_table, stream);
    }
    tables.push_back(std::move(table));
  }
  shared_->pool.grow(config.num_pages);
  shared_->data.swap(pool_data);
  for (size_t i = 0; i < tables.size(); ++i) {
    KVCache& member = *shared_->members[i];
    member.config_ = tables[i].config;
    member.all_layers_ = tables[i].view;
    member.table_data_.swap(tables[i].data);
  }
}

std::shared_ptr<const void> KVCache::holder() const {
  return std::make_shared<std::array<std::shared_ptr<void>, 3>>(
      std::array<std::shared_ptr<void>, 3>{shared_->data, table_data_, row_data_});
}

size_t KVCache::page_bytes() const {
  return static_cast<size_t>(PageParts(config_).bytes());
}

size_t KVCache::tail_bytes() const {
  return all_layers_.tails.bytes() / config_.num_sequences;
}

size_t KVCache::bytes_used() const {
  const auto holds = [](const Sequence& sequence) { return !sequence.pages.empty(); };
  size_t bytes = shared_->pool.num_used() * page_bytes();
  for (const KVCache* member : shared_->members) {
    const std::vector<Sequence>& sequences = member->sequences_;
    bytes += std::count_if(sequences.begin(), sequences.end(), holds) * tail_bytes();
  }
  return bytes;
}

LayerView KVCache::layer(int32_t layer) const {
  check_layer(layer);
  LayerView view = all_layers_;
  if (view.tails) {
    view.tails =
        view.tails.narrow(0, int64_t{layer} * config_.num_sequences, config_.num_sequences);
  }
  for (TensorView* tensor : {&view.block_table, &view.lengths, &view.seen, &view.fresh_pages}) {
    *tensor = tensor->select(layer);
  }
  return view;
}

int64_t KVCache::pages_for(int64_t num_kept,
                           int64_t num_new,
                           int32_t num_kv_heads,
                           int32_t page_size) {
  check_page_size("pages_for", page_size);
  ADAKV_CHECK(num_kept >= 0, "pages_for: num_kept must not be negative, got ", num_kept);
  ADAKV_CHECK(num_new >= 0 && num_new <= kMostTokens, "pages_for: num_new must lie in 0 .. ",
              kMostTokens, ", got ", num_new);
  ADAKV_CHECK(num_kv_heads >= 1, "pages_for: num_kv_heads must be at least 1, got ", num_kv_heads);
  // The first fresh page of each row comes with the prompt, another after every page_size tokens.
  const int64_t row_pages = 1 + std::max<int64_t>(num_new - 1, 0) / page_size;
  return num_kept / page_size + num_kv_heads + row_pages * num_kv_heads;
}

int64_t KVCache::row_pages(int64_t entries) const {
  return entries / config_.page_size + (entries % config_.page_size != 0);
}

// Throws unless a row of so many entries has its pages in the block table.
void KVCache::check_row(int64_t entries) const {
  const int64_t pages = row_pages(entries);
  if (pages > config_.max_row_pages) {
    throw Error(detail::concat("a row may grow to ", entries, " entries, which needs ", pages,
                               " pages; max_row_pages is ", config_.max_row_pages));
  }
}

void KVCache::check_layer(int32_t layer) const {
  ADAKV_CHECK(layer >= 0 && layer < config_.num_layers, "layer must be 0 .. ",
              config_.num_layers - 1, ", got ", layer);
}

void KVCache::check_sequence(int32_t sequence) const {
  ADAKV_CHECK(sequence >= 0 && sequence < config_.num_sequences, "sequence must be 0 .. ",
              config_.num_sequences - 1, ", got ", sequence);
}

// Pages that a sequence needs in a layer for so many entries.
int64_t KVCache::pages_of(int64_t num_kept) const {
  return pages_for(num_kept, 0, config_.num_kv_heads, config_.page_size);
}

// Throws unless sequences may keep so many entries; the pages that they need in a layer.
int64_t KVCache::check_kept(int32_t first_sequence,
                            const std::vector<int64_t>& num_kept,
                            const std::vector<int64_t>& longest_row) const {
  ADAKV_CHECK(num_kept.size() == longest_row.size(),
              "num_kept and longest_row must have the same size, got ", num_kept.size(), " and ",
              longest_row.size());
  int64_t needed = 0;
  for (size_t i = 0; i < num_kept.size(); ++i) {
    check_sequence(first_sequence + static_cast<int32_t>(i));
    ADAKV_CHECK(num_kept[i] >= 0 && num_kept[i] <= kMostTokens, "num_kept must lie in 0 .. ",
                kMostTokens, ", got ", num_kept[i]);
    ADAKV_CHECK(longest_row[i] >= 0, "longest_row must not be negative, got ", longest_row[i]);
    check_row(longest_row[i]);
    needed += pages_of(num_kept[i]);
  }
  return needed;
}

// Takes pages for entries that were checked; they are those of the sequences from now on.
PageList KVCache::take(int32_t layer,
                       int32_t first_sequence,
                       const std::vector<int64_t>& num_kept) {
  PageList list;
  list.indptr.push_back(0);
  for (size_t i = 0; i < num_kept.size(); ++i) {
    std::vector<int32_t>& pages = sequences_[first_sequence + i].pages[layer];
    pages.clear();
    shared_->pool.take(pages_of(num_kept[i]), pages);
    list.ids.insert(list.ids.end(), pages.begin(), pages.end());
    list.indptr.push_back(static_cast<int32_t>(list.ids.size()));
  }
  return list;
}

PageList KVCache::begin(int32_t layer,
                        int32_t first_sequence,
                        const std::vector<int64_t>& num_kept,
                        const std::vector<int64_t>& longest_row) {
  check_layer(layer);
  const int64_t needed = check_kept(first_sequence, num_kept, longest_row);
  for (size_t i = 0; i < num_kept.size(); ++i) {
    ADAKV_CHECK(sequences_[first_sequence + i].num_pages(layer) == 0, "sequence ",
                first_sequence + i, " holds entries in layer ", layer,
                " already: remove() it first");
  }
  shared_->pool.check_free(needed);
  for (size_t i = 0; i < num_kept.size(); ++i) {
    Sequence& sequence = sequences_[first_sequence + i];
    sequence.pages.resize(config_.num_layers);
    sequence.longest_row = std::max(sequence.longest_row, longest_row[i]);
  }
  return take(layer, first_sequence, num_kept);
}

std::vector<PageList> KVCache::begin_again(int32_t first_sequence,
                                           const std::vector<std::vector<int64_t>>& num_kept,
                                           const std::vector<int64_t>& longest_row,
                                           bool own_pages) {
  ADAKV_CHECK(static_cast<int32_t>(num_kept.size()) == config_.num_layers, "num_kept must have ",
              config_.num_layers, " elements, one for each layer, got ", num_kept.size());
  for (const std::vector<int64_t>& of_layer : num_kept) {
    check_kept(first_sequence, of_layer, longest_row);
  }
  int64_t missing = 0;
  for (size_t i = 0; i < longest_row.size(); ++i) {
    const int32_t sequence = first_sequence + static_cast<int32_t>(i);
    ADAKV_CHECK(!is_shared(sequence), "sequence ", sequence,
                " has pages in common with a fork: fork() it whole first");
    for (int32_t l = 0; l < config_.num_layers; ++l) {
      const auto owned = static_cast<int64_t>(sequences_[first_sequence + i].num_pages(l));
      ADAKV_CHECK(owned > 0, "sequence ", first_sequence + i, " holds nothing in layer ", l,
                  ": begin() it first");
      missing += std::max<int64_t>(0, pages_of(num_kept[l][i]) - (own_pages ? owned : 0));
    }
  }
  shared_->pool.check_free(missing);
  std::vector<PageList> lists;
  std::vector<int32_t> leaving;
  for (int32_t l = 0; l < config_.num_layers; ++l) {
    lists.emplace_back();
    lists[l].indptr.push_back(0);
    for (size_t i = 0; i < longest_row.size(); ++i) {
      std::vector<int32_t>& pages = sequences_[first_sequence + i].pages[l];
      const auto needed = static_cast<size_t>(pages_of(num_kept[l][i]));
      if (!own_pages) {
        leaving.insert(leaving.end(), pages.begin(), pages.end());
        pages.clear();
      }
      if (pages.size() > needed) {  // the newest ones leave, which rows hold their last entries in
        leaving.insert(leaving.end(), pages.begin() + needed, pages.end());
        pages.resize(needed);
      } else {
        shared_->pool.take(static_cast<int64_t>(needed - pages.size()), pages);
      }
      lists[l].ids.insert(lists[l].ids.end(), pages.begin(), pages.end());
      lists[l].indptr.push_back(static_cast<int32_t>(lists[l].ids.size()));
    }
  }
  for (size_t i = 0; i < longest_row.size(); ++i) {
    sequences_[first_sequence + i].longest_row = longest_row[i];
    sequences_[first_sequence + i].appended = 0;
    sequences_[first_sequence + i].num_started = 0;
  }
  shared_->pool.give_back(
      leaving);  // at the end: a layer's must not be another one's before it is done
  return lists;
}

int32_t KVCache::num_pages(int32_t layer, int32_t sequence) const {
  check_layer(layer);
  check_sequence(sequence);
  return static_cast<int32_t>(sequences_[sequence].num_pages(layer));
}

int64_t KVCache::pages_to_grow(const std::vector<int32_t>& num_new) const {
  ADAKV_CHECK(static_cast<int32_t>(num_new.size()) == config_.num_sequences, "num_new must have ",
              config_.num_sequences, " elements, one for each sequence, got ", num_new.size());
  const auto pages_after = [&](int64_t tokens) {
    return pages_for(0, tokens, config_.num_kv_heads, config_.page_size);
  };
  int64_t pages = 0;
  for (size_t b = 0; b < num_new.size(); ++b) {
    ADAKV_CHECK(num_new[b] >= 0, "num_new must not be negative, got ", num_new[b], " for sequence ",
                b);
    const int64_t before = sequences_[b].appended;
    ADAKV_CHECK(before + num_new[b] <= kMostTokens, "num_new: sequence ", b, " may append ",
                kMostTokens - before, " tokens more, got ", num_new[b]);
    pages += (pages_after(before + num_new[b]) - pages_after(before)) * config_.num_layers;
  }
  return pages;
}

int64_t KVCache::row_pages_to_grow(const std::vector<int32_t>& num_new) const {
  pages_to_grow(num_new);  // checks them
  int64_t pages = 0;
  for (size_t b = 0; b < num_new.size(); ++b) {
    const Sequence& sequence = sequences_[b];
    pages = std::max(pages, row_pages(sequence.longest_row + sequence.appended + num_new[b]));
  }
  return pages;
}

int32_t KVCache::grow(const std::vector<int32_t>& num_new, int32_t num_columns, Stream stream) {
  ADAKV_CHECK(num_columns >= 0, "num_columns must not be negative, got ", num_columns);
  const int64_t needed = pages_to_grow(num_new);
  for (size_t b = 0; b < num_new.size(); ++b) {
    ADAKV_CHECK(num_new[b] <= num_columns, "num_new must be at most num_columns = ", num_columns,
                ", got ", num_new[b], " for sequence ", b);
    if (num_new[b] == 0) continue;
    check_row(sequences_[b].longest_row + sequences_[b].appended + num_new[b]);
    for (int32_t l = 0; l < config_.num_layers; ++l) {
      ADAKV_CHECK(sequences_[b].num_pages(l) > 0, "sequence ", b, " holds nothing in layer ", l,
                  ": begin() it first");
    }
  }
  shared_->pool.check_free(needed);

  // Columns that go in one piece. A row starts exactly one new page in each stretch of page_size
  // tokens counted from its compact(), so a piece ends with a stretch; where all sequences begin
  // one together, it may be several whole ones.
  const int32_t page_size = config_.page_size;
  int64_t piece = num_columns;
  bool all_begin = true;
  for (size_t b = 0; b < num_new.size(); ++b) {
    if (num_new[b] == 0) continue;
    const int32_t done = static_cast<int32_t>(sequences_[b].appended % page_size);
    piece = std::min<int64_t>(piece, int64_t{num_columns} - num_new[b] + page_size - done);
    all_begin = all_begin && done == 0 && num_new[b] == num_columns;
  }
  if (all_begin && num_columns >= page_size) {
    piece = std::min(num_columns / page_size, kFreshColumns) * page_size;
  }

  for (int32_t b = 0; b < config_.num_sequences; ++b) {
    const auto tokens =
        static_cast<int32_t>(std::max<int64_t>(0, piece - (int64_t{num_columns} - num_new[b])));
    Sequence& sequence = sequences_[b];
    if (tokens > 0 && sequence.appended % page_size == 0) {
      const int32_t first =
          sequence.appended == 0 ? 1 : 0;  // column 0 of a new sequence was dealt by compact()
      refill(b, first, std::max(1, tokens / page_size), stream);
    }
    sequence.appended += tokens;
  }
  return static_cast<int32_t>(piece);
}

// Writes new pages into the columns [first, last) of fresh_pages, for every row of a sequence in
// every layer.
void KVCache::refill(int32_t sequence, int32_t first, int32_t last, Stream stream) {
  const int32_t columns = last - first, heads = config_.num_kv_heads;
  if (columns <= 0) return;
  std::vector<int32_t> pages;  // [L, columns, Hkv], as they are owned
  shared_->pool.take(config_.num_layers * columns * heads, pages);
  std::vector<int32_t> of_rows(pages.size());  // [L, Hkv, columns]
  for (int32_t l = 0; l < config_.num_layers; ++l) {
    const auto begin = pages.begin() + l * columns * heads;
    std::vector<int32_t>& owned = sequences_[sequence].pages[l];
    owned.insert(owned.end(), begin, begin + columns * heads);
    for (int32_t i = 0; i < columns * heads; ++i) {
      of_rows[(l * heads + i % heads) * columns + i / heads] = begin[i];
    }
  }
  sequences_[sequence].num_started += columns;
  const TensorView& fresh = all_layers_.fresh_pages;
  memory_.copy_rows_from_host(fresh.ptr<int32_t>() + sequence * fresh.stride[1] + first,
                              kFreshColumns * sizeof(int32_t), of_rows.data(),
                              columns * sizeof(int32_t), config_.num_layers * heads, stream);
}

void KVCache::remove(int32_t sequence, Stream stream) {
  check_sequence(sequence);
  Sequence& owner = sequences_[sequence];
  for (const std::vector<int32_t>& pages : owner.pages) shared_->pool.give_back(pages);
  owner.pages.clear();
  owner.longest_row = owner.appended = owner.num_started = 0;
  fill_sequence(memory_, all_layers_.block_table, sequence, -1, stream);
  fill_sequence(memory_, all_layers_.lengths, sequence, 0, stream);
  fill_sequence(memory_, all_layers_.seen, sequence, 0, stream);
}

}  // namespace adakv
