// Caches in files: what a KVCache holds, in one safetensors file, for tomorrow or for another program.
// Files hold entries, not pages, so that they can be loaded into pages of another size and onto
// another device. docs/memory.md describes the format.
//
//   adakv::save_cache("book.kv", cache, {{"model", "..."}});
//
//   adakv::CacheFile file("book.kv");
//   adakv::CacheConfig config = file.config(max_new_tokens);  // sizes; say the device
//   adakv::KVCache cache(config, adakv::device_memory(config.device));
//   file.load(cache);
//   // the next token of sequence b stands at file.seen()[b]
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "adakv/kv_cache.h"
#include "adakv/safetensors.h"
#include "adakv/types.h"

#pragma GCC visibility push(default)  // what a shared adakv shows
namespace adakv {

/// A file that save_cache() wrote. Nothing that it says is believed before it was checked: its head
/// and its lengths when it is opened, what rows hold in load(). Its sums find accidents, not forgery:
/// who can write the file can put other entries there, but nothing else. Threads: as KVCache.
class CacheFile {
 public:
  /// Maps a file. Throws Error if it can't be read, is no cache, was cut or altered, or has another
  /// version.
  explicit CacheFile(const std::string& path);

  /// A file whose bytes are in memory; `data` must outlive this object. Throws as the other one does.
  CacheFile(const void* data, size_t bytes);

  /// What it says beside its tensors, by name. save_cache() writes kind, version, kv_dtype, dtype,
  /// shape and seen; all others are what it was given. "model" says what it was made for.
  const std::map<std::string, std::string>& texts() const { return file_.texts(); }

  /// Tokens of each sequence that went by: the position of the next one.
  const std::vector<int32_t>& seen() const { return seen_; }

  /// [L, B, Hkv] int32 in host memory: entries of the rows.
  TensorView lengths() const { return lengths_; }

  /// Whether entries have biases; then a cache that they are loaded into must have them.
  bool has_biases() const { return config_.has_biases; }

  /// Sizes of a cache that has room for what the file holds and for `max_new_tokens` tokens behind
  /// each sequence; on the CPU, which is yours to change. `page_size` 0 is 16, of quantised pages 32.
  /// Throws InvalidArgument for numbers that make no sense and Error if no cache is that large.
  CacheConfig config(int64_t max_new_tokens, int32_t page_size = 0) const;

  /// Puts what the file holds into the sequences of a cache from `first_sequence` on, which must be
  /// empty, in `stream`. Throws InvalidArgument for a cache of other layers, heads, dtype or format,
  /// and Error for entries that were altered and if too few pages are free; then those sequences are
  /// empty.
  void load(KVCache& cache, int32_t first_sequence = 0, Stream stream = nullptr) const;

  /// Names of the tensors that save_cache() was given beside the cache.
  std::vector<std::string> others() const;

  /// One of them, in the file's memory, which must not be written to. Throws InvalidArgument if there
  /// is none of that name and Error if it was altered.
  TensorView other(const std::string& name) const;

 private:
  void read();
  void read_texts();
  void read_sums();
  void check_parts() const;
  void check_positions(int32_t layer) const;
  const std::string& text(const std::string& name) const;
  void check_sum(const std::string& name) const;
  void check_cache(const KVCache& cache, int32_t first_sequence) const;
  void load_layer(KVCache& cache, int32_t layer, int32_t first_sequence, Stream stream) const;
  [[noreturn]] void fail(const std::string& why) const;

  SafeTensors file_;
  CacheConfig config_;  // without pages
  std::vector<int32_t> seen_;
  TensorView lengths_;
  std::map<std::string, uint32_t> sums_;  // of the tensors
};

/// Writes what a cache holds to a file, which is there as a whole or not at all.
///
/// `texts` are kept beside it; their names must not be those of CacheFile::texts() that are written
/// here. So are `others`, contiguous tensors in host memory, whose names must not be those of the
/// cache's own: lengths, checksums, and what begins with "layers.". Waits for `stream`. Throws
/// InvalidArgument for those and for a cache of which a sequence holds nothing, and Error if the file
/// can't be written.
void save_cache(const std::string& path,
                const KVCache& cache,
                const std::map<std::string, std::string>& texts,
                const std::map<std::string, TensorView>& others = {},
                Stream stream = nullptr);

}  // namespace adakv
#pragma GCC visibility pop
