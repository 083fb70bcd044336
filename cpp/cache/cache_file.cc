// Opening a cache's file: what it says is checked before anything is made of it.
#include "adakv/cache_file.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>
#include <tuple>

#include "adakv/error.h"
#include "cache/crc32.h"
#include "cache/file_parts.h"
#include "cache/scanner.h"

namespace adakv {
namespace {

constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max();
constexpr int32_t kFloats = 3;  // dtypes of keys and values come first

bool is_equal(const TensorView& a, const TensorView& b) {
  return a.rank == b.rank && a.dtype == b.dtype && std::equal(a.shape, a.shape + a.rank, b.shape);
}

}  // namespace

CacheFile::CacheFile(const std::string& path) : file_(path) {
  read();
}

CacheFile::CacheFile(const void* data, size_t bytes) : file_(data, bytes) {
  read();
}

void CacheFile::fail(const std::string& why) const {
  throw Error(file_.name() + " can't be read: " + why);
}

const std::string& CacheFile::text(const std::string& name) const {
  const auto found = texts().find(name);
  if (found == texts().end()) fail("it doesn't say its " + name);
  return found->second;
}

void CacheFile::read() {
  const auto kind = texts().find("kind");
  if (kind == texts().end() || kind->second != kFileKind) fail("it is no adakv cache");
  if (text("version") != kFileVersion) {
    fail("its version is " + json_string(text("version")) + ", and " + kFileVersion +
         " is known here");
  }
  read_sums();
  read_texts();
  lengths_ = file_.tensor("lengths");
  const TensorView expected(
      nullptr, {config_.num_layers, config_.num_sequences, config_.num_kv_heads}, DType::kInt32);
  if (!is_equal(lengths_, expected)) fail("lengths are not those of its shape");
  check_sum("lengths");
  const auto* length = lengths_.ptr<int32_t>();
  for (int64_t i = 0; i < lengths_.size(); ++i) {
    const int32_t most = seen_[i / config_.num_kv_heads % config_.num_sequences];
    if (length[i] < 0 || length[i] > most) fail("its lengths make no sense");
  }
  check_parts();
}

// "checksums" has that of the head, then those of all other tensors as they lie in the file.
void CacheFile::read_sums() {
  const TensorView sums = file_.tensor("checksums");
  const auto count = static_cast<int64_t>(file_.tensors().size());
  if (!is_equal(sums, TensorView(nullptr, {count}, DType::kInt32))) fail("it has no checksums");
  const auto* sum = sums.ptr<uint32_t>();
  if (*sum++ != crc32(file_.head().data(), file_.head().size())) fail("its head was altered");
  // Of those that begin at one place all but the last are empty, and have the sum 0.
  std::map<std::tuple<const void*, size_t, std::string>, uint32_t*> in_order;
  for (const auto& [name, view] : file_.tensors()) {
    if (name != "checksums") in_order[{view.data, view.bytes(), name}] = &sums_[name];
  }
  for (const auto& [place, known] : in_order) *known = *sum++;
}

void CacheFile::read_texts() {
  const auto numbers = [&](const char* name, int64_t count, int64_t most, int64_t optional = 0) {
    std::vector<int32_t> result;
    try {
      Scanner scanner(text(name));
      scanner.elements([&] {
        const int64_t number = scanner.count();
        if (number < 1 || number > most) scanner.fail("numbers in 1 .. " + std::to_string(most));
        result.push_back(static_cast<int32_t>(number));
      });
      scanner.end();
    } catch (const Error& error) {
      fail(detail::concat("its ", name, " makes no sense, ", error.what()));
    }
    const auto given = static_cast<int64_t>(result.size());
    if (given < count || given > count + optional) {
      fail(detail::concat("its ", name, " must be ", count, " numbers, got ", result.size()));
    }
    return result;
  };
  const std::vector<int32_t> shape = numbers("shape", 4, kMostTokens, 1);
  config_.num_layers = shape[0], config_.num_sequences = shape[1];
  config_.num_kv_heads = shape[2], config_.head_dim = shape[3];
  config_.value_dim = shape.back();  // that of keys, too, if no other is there
  for (const int32_t dim : {config_.head_dim, config_.value_dim}) {
    if (dim % 8 != 0 || dim > 256) fail("its head dim makes no sense");
  }
  int32_t dtype = 0, format = 0;
  while (dtype < kFloats && text("dtype") != dtype_name(static_cast<DType>(dtype))) ++dtype;
  while (format < kNumFormats && text("kv_dtype") != kFormats[format].name) ++format;
  config_.dtype = static_cast<DType>(dtype), config_.format = static_cast<PageFormat>(format);
  if (dtype == kFloats || format == kNumFormats ||
      (format > 0 && config_.dtype == DType::kFloat32)) {
    fail("its dtype " + text("dtype") + " or kv_dtype " + text("kv_dtype") + " makes no sense");
  }
  seen_ = numbers("seen", config_.num_sequences, kMostTokens);
  config_.has_biases = bool(file_.tensor(kFirstBiases));
  if (facts_of(config_.format).has_tails && config_.value_dim != config_.head_dim) {
    fail("its values of " + text("kv_dtype") + " have another head dim than its keys");
  }
  if (config_.has_biases && format > 0) fail("it has biases in pages of " + text("kv_dtype"));
}

// Its tensors are exactly those that its lengths ask for, and what the writer gave beside them.
void CacheFile::check_parts() const {
  const int64_t rows = int64_t{config_.num_sequences} * config_.num_kv_heads;
  std::set<std::string> known = {"lengths", "checksums"};
  for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
    const auto parts = parts_of(config_, layer, lengths_.ptr<int32_t>() + layer * rows, rows);
    for (const FilePart& part : parts) {
      const TensorView tensor = file_.tensor(part.name);
      if (!is_equal(tensor, part.tensor)) {
        fail(part.name + " must be " + dtype_name(part.tensor.dtype) + " " +
             part.tensor.shape_string() + ", got " +
             (tensor ? dtype_name(tensor.dtype) + (" " + tensor.shape_string()) : "none"));
      }
      known.insert(part.name);
    }
  }
  for (const auto& [name, view] : file_.tensors()) {
    if (is_files_own(name) && known.count(name) == 0) fail("it has a tensor " + json_string(name));
  }
}

void CacheFile::check_sum(const std::string& name) const {
  const TensorView view = file_.tensor(name);
  if (sums_.at(name) != crc32(view.data, view.bytes())) fail(name + " was altered");
}

std::vector<std::string> CacheFile::others() const {
  std::vector<std::string> names;
  for (const auto& [name, view] : file_.tensors()) {
    if (!is_files_own(name)) names.push_back(name);
  }
  return names;
}

TensorView CacheFile::other(const std::string& name) const {
  const TensorView view = file_.tensor(name);
  ADAKV_CHECK(view, file_.name(), " has no tensor ", name);
  check_sum(name);
  return view;
}

CacheConfig CacheFile::config(int64_t max_new_tokens, int32_t page_size) const {
  CacheConfig config = config_;
  const bool is_plain = config.format == PageFormat::kPlain;
  config.page_size = page_size != 0 ? page_size : is_plain ? 16 : 32;
  int64_t pages = 0, longest = 0;
  const auto* length = lengths_.ptr<int32_t>();
  const int64_t heads = config.num_kv_heads, sequences = lengths_.size() / heads;
  for (int64_t i = 0; i < sequences; ++i, length += heads) {
    int64_t entries = 0;
    for (int64_t h = 0; h < heads; ++h) {
      entries += length[h];
      longest = std::max<int64_t>(longest, length[h]);
    }
    pages += KVCache::pages_for(entries, max_new_tokens, config.num_kv_heads, config.page_size);
  }
  const int64_t row_pages = (longest + max_new_tokens) / config.page_size + 2;
  if (pages > kMostTokens || row_pages > kMostTokens) {
    fail(detail::concat("a cache can't have ", pages, " pages"));
  }
  config.num_pages = static_cast<int32_t>(pages);
  config.max_row_pages = static_cast<int32_t>(row_pages);
  return config;
}

void CacheFile::check_cache(const KVCache& cache, int32_t first_sequence) const {
  const CacheConfig& c = cache.config();
  const auto shape = [](const CacheConfig& c) {
    const bool is_even = c.value_dim == c.head_dim;
    return detail::concat(c.num_layers, " layers of ", c.num_kv_heads, " kv heads of ", c.head_dim,
                          is_even ? "" : detail::concat(" and ", c.value_dim), " ",
                          dtype_name(c.dtype), ", ", facts_of(c.format).name,
                          c.has_biases ? " with biases" : "");
  };
  ADAKV_CHECK(shape(c) == shape(config_), "load: the cache must have ", shape(config_), ", got ",
              shape(c));
  const int32_t most = c.num_sequences - config_.num_sequences;
  ADAKV_CHECK(first_sequence >= 0 && first_sequence <= most, "load: first_sequence must be 0 .. ",
              most, " for ", config_.num_sequences, " sequences, got ", first_sequence);
  for (int32_t i = first_sequence; i < first_sequence + config_.num_sequences; ++i) {
    for (int32_t layer = 0; layer < c.num_layers; ++layer) {
      ADAKV_CHECK(cache.num_pages(layer, i) == 0, "load: sequence ", i, " holds entries already");
    }
  }
}

void CacheFile::load(KVCache& cache, int32_t first_sequence, Stream stream) const {
  check_cache(cache, first_sequence);
  try {
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      load_layer(cache, layer, first_sequence, stream);
    }
  } catch (...) {
    for (int32_t i = 0; i < config_.num_sequences; ++i) cache.remove(first_sequence + i, stream);
    throw;
  }
}

// What is copied before its sum is known goes nowhere if the sum is wrong: load() empties the rows.
void CacheFile::load_layer(KVCache& cache,
                           int32_t layer,
                           int32_t first_sequence,
                           Stream stream) const {
  const int32_t page_size = cache.config().page_size, heads = config_.num_kv_heads;
  const int64_t num_rows = int64_t{config_.num_sequences} * heads;
  const auto* lengths = lengths_.ptr<int32_t>() + layer * num_rows;
  check_positions(layer);
  std::vector<int64_t> totals, longest;
  for (int64_t r = 0; r < num_rows; r += heads) {
    totals.push_back(std::accumulate(lengths + r, lengths + r + heads, int64_t{0}));
    longest.push_back(*std::max_element(lengths + r, lengths + r + heads));
  }
  // As compact() deals them: each row's pages, row by row, then a fresh one for each.
  const PageList pages = cache.begin(layer, first_sequence, totals, longest);
  const LayerView view = cache.layer(layer);
  const int64_t columns = view.block_table.shape[2];
  std::vector<int32_t> tables(num_rows * columns, -1);
  Memory& memory = cache.memory();
  for (int32_t b = 0; b < config_.num_sequences; ++b) {
    const int32_t* next = &pages.ids[pages.indptr[b]];
    const int64_t sequence = first_sequence + b;
    for (int64_t r = int64_t{b} * heads; r < int64_t{b + 1} * heads; ++r) {
      const int32_t count = (lengths[r] + page_size - 1) / page_size;
      std::copy(next, next + count, &tables[r * columns]);
      next += count;
    }
    int32_t* fresh = view.fresh_pages.ptr<int32_t>() + sequence * view.fresh_pages.stride[0];
    memory.copy_rows_from_host(fresh, view.fresh_pages.stride[1] * 4, next, 4, heads, stream);
  }
  const auto put = [&](const TensorView& to, const int32_t* from, int64_t per_sequence) {
    memory.copy_from_host(to.ptr<int32_t>() + first_sequence * per_sequence, from,
                          config_.num_sequences * per_sequence * 4, stream);
  };
  put(view.block_table, tables.data(), heads * columns);
  put(view.lengths, lengths, heads);
  put(view.seen, seen_.data(), 1);

  CacheConfig config = config_;
  config.page_size = page_size;
  const FileRows rows = {lengths, tables.data(), num_rows, columns,
                         int64_t{first_sequence} * heads};
  for (const FilePart& part : parts_of(config, layer, lengths, num_rows)) {
    if (part.file_offset == 0) check_sum(part.name);
    const char* from = file_.tensor(part.name).ptr<char>() + part.file_offset;
    for_each_piece(part, view, rows, page_size,
                   [&](char* to, int64_t pitch, int64_t row_bytes, int64_t count) {
                     memory.copy_rows_from_host(to, pitch, from, row_bytes, count, stream);
                     from += row_bytes * count;
                   });
  }
}

// They ascend in every row and lie before what was seen.
void CacheFile::check_positions(int32_t layer) const {
  const std::string name = "layers." + std::to_string(layer) + ".positions";
  check_sum(name);
  const auto* position = file_.tensor(name).ptr<int32_t>();
  const int64_t heads = config_.num_kv_heads, num_rows = heads * config_.num_sequences;
  const auto* lengths = lengths_.ptr<int32_t>() + layer * num_rows;
  for (int64_t r = 0; r < num_rows; ++r) {
    int32_t last = -1;
    bool ascends = true;
    for (int32_t i = 0; i < lengths[r]; ++i, last = *position++) ascends &= *position > last;
    if (!ascends || last >= seen_[r / heads]) fail(name + " make no sense");
  }
}

}  // namespace adakv
