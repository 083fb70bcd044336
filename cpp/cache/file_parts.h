// What a cache's file consists of, in one table for saving and loading: which numbers of an entry lie
// in which tensor of the file, and where in a layer's pages.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "adakv/kv_cache.h"

namespace adakv {

constexpr const char* kFileKind = "adakv cache";
constexpr const char* kFileVersion = "2";
constexpr const char* kFirstBiases = "layers.0.biases";  // there if entries have biases

/// Whether a tensor has its name from the format, not from who gave it beside the cache.
inline bool is_files_own(const std::string& name) {
  return name == "lengths" || name == "checksums" || name.rfind("layers.", 0) == 0;
}

/// Which entries of a row a part has: with tails those of full pages are codes, the others 16 bits.
enum class Which : uint8_t { kAll, kFull, kTail };

/// A tensor of a layer in the file, or a half of one, whose numbers are those of entries one behind
/// the other, row by row; in a page (in kTail: in a row's tail) they lie one behind the other, too.
struct FilePart {
  std::string name;               // of the tensor
  TensorView tensor;              // its dtype and shape, no data
  TensorView LayerView::* where;  // where it comes from
  Which which = Which::kAll;
  size_t entry_bytes = 0;  // of an entry; of full pages a 32nd of a page's
  size_t page_offset = 0;  // bytes from the beginning of the page's row of `where`
  size_t file_offset = 0;  // bytes from the beginning of the tensor: of its second half

  /// How many of a row's entries it has.
  int64_t count(int64_t length, int32_t page_size) const {
    return which == Which::kAll    ? length
           : which == Which::kFull ? length - length % page_size
                                   : length % page_size;
  }
};

/// The parts of layer `layer`, whose rows hold `lengths` [num_rows] entries.
std::vector<FilePart> parts_of(const CacheConfig& config,
                               int32_t layer,
                               const int32_t* lengths,
                               int64_t num_rows);

/// Where the rows of some sequences of a layer lie.
struct FileRows {
  const int32_t* lengths;  // [B * Hkv]
  const int32_t* tables;   // [B * Hkv, columns], pages in host memory
  int64_t num_rows, columns, first_row;
};

/// Calls body(place, pitch, row_bytes, rows) for all pieces of a part in the order of the file: `rows`
/// pieces of `row_bytes`, each `pitch` bytes behind the one before in the cache.
template <typename Body>
void for_each_piece(const FilePart& part,
                    const LayerView& layer,
                    const FileRows& rows,
                    int32_t page_size,
                    const Body& body) {
  const TensorView& where = layer.*part.where;
  const auto size = static_cast<int64_t>(dtype_size(where.dtype));
  char* base = where.ptr<char>() + part.page_offset;
  const auto entry_bytes = static_cast<int64_t>(part.entry_bytes);
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const int64_t count = part.count(rows.lengths[r], page_size);
    if (part.which == Which::kTail) {
      const int64_t row =
          (rows.first_row + r) * where.stride[1] * size;  // contiguous: [B, Hkv, ...]
      if (count > 0) body(base + row, count * entry_bytes, count * entry_bytes, 1);
      continue;
    }
    const int32_t* table = rows.tables + r * rows.columns;
    const int64_t pitch = where.stride[0] * size, full = count / page_size;
    for (int64_t i = 0, run; i < full; i += run) {
      for (run = 1; i + run < full && table[i + run] == table[i] + run;) ++run;
      body(base + table[i] * pitch, pitch, page_size * entry_bytes, run);
    }
    if (const int64_t rest = count % page_size; rest > 0) {
      body(base + table[full] * pitch, pitch, rest * entry_bytes, 1);
    }
  }
}

}  // namespace adakv
