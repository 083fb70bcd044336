// The memory of a compressed KV cache: who owns which page, and the tensors that the verbs of ops.h
// work on.
//
// A KVCache holds, counts and hands out; it computes nothing. The life of a sequence:
//
//   for each layer:  pages = cache.begin(layer, sequence, ...)   host: takes pages for the kept
//                    compact(..., cache.layer(layer), pages)     device: deals and fills them
//   for each step:   cache.grow({1, 1, ...})                     host: fresh pages, all layers
//                    for each layer: append(...), attend(...)    device
//   now and then:    pages = cache.begin_again(...)              host: which pages stay
//                    for each layer: compact(...)                device: in place
//   at the end:      cache.remove(sequence)                      host: every page goes back
//
// The host never asks the device how long a row is, because two facts suffice.
//  1. A (sequence, layer) that keeps K entries over Hkv rows fills at most K / P + Hkv pages,
//     however they are spread.
//  2. In P appends every row starts exactly one new page, wherever it stood before. So each row
//     has one fresh page in reserve, and all rows of a sequence are given the next one after
//     every P tokens.
//
// Threads: different caches are independent, also on the same Memory of device_memory(). Of one
// cache, const functions may be called by several threads at once; the others by one thread while
// no other uses the cache. The tensors of different layers may be worked on at the same time.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "adakv/memory.h"
#include "adakv/page_pool.h"
#include "adakv/types.h"

#pragma GCC visibility push(default)  // what a shared adakv shows
namespace adakv {

/// How pages hold keys and values.
///   kPlain  as they are
///   kInt8   x = scale * code + zero, code 0 .. 255
///   kFp8    x = scale * code, code float8_e4m3fn
///   kInt4   x = scale * code + zero, code 0 .. 15
///   kInt2   x = scale * code + zero, code 0 .. 3
/// Quantised entries have their own scale (and zero) for each group of dimensions of the key, and of
/// the value. In kInt4 and kInt2, which have tails, a dimension of the keys has one for all 32 entries
/// of a page instead, and a row's last page stays in 16 bits until it is full. ops/quantise.h says
/// which codes and scales they get.
enum class PageFormat : uint8_t { kPlain, kInt8, kFp8, kInt4, kInt2 };

/// Dimensions of a head that share a scale, but for values in kInt2.
constexpr int32_t kScaleGroup = 64;

/// Entries of a page of a format with tails.
constexpr int32_t kTailedPageSize = 32;

/// What tells a format from the others.
struct FormatFacts {
  const char* name;    // what files and Python call it
  int32_t code_bits;   // of a number; 0: it is no code
  int32_t group;       // dimensions of a value that share a scale, and without tails of a key
  int32_t num_scales;  // 16-bit numbers of a group: its scale, and its zero
  bool has_tails;
};

/// Those of each PageFormat.
inline constexpr FormatFacts kFormats[] = {
    {"auto", 0, 1, 0, false},            // kPlain
    {"int8", 8, kScaleGroup, 2, false},  // kInt8
    {"fp8", 8, kScaleGroup, 1, false},   // kFp8
    {"int4", 4, kScaleGroup, 2, true},   // kInt4
    {"int2", 2, 32, 2, true},            // kInt2
};
inline constexpr int32_t kNumFormats = sizeof(kFormats) / sizeof(kFormats[0]);

constexpr const FormatFacts& facts_of(PageFormat format) {
  return kFormats[static_cast<int32_t>(format)];
}

/// 16-bit numbers that a value has beside its codes, and without tails a key.
constexpr int64_t num_scales(PageFormat format, int64_t width) {
  const FormatFacts& facts = facts_of(format);
  return (width + facts.group - 1) / facts.group * facts.num_scales;
}

/// How many dimensions of keys in pages of kInt4 have other bits than 4: the first `in_16` are stored
/// as they are, the last `in_2` are codes 0 .. 3. Multiples of 4 and of 8.
struct KeyDims {
  int32_t in_16 = 0, in_2 = 0;

  /// Whether any have.
  constexpr bool are_mixed() const { return in_16 > 0 || in_2 > 0; }

  /// Bytes of a key, without scales.
  constexpr int64_t bytes(int64_t head_dim) const {
    return 2 * in_16 + (head_dim - in_16 - in_2) / 2 + in_2 / 4;
  }
};

/// Sizes of a cache; all memory follows from them. KVCache::reserve() raises num_pages and
/// max_row_pages.
struct CacheConfig {
  int32_t num_layers = 0;          // with full attention: those that hold compressed entries
  int32_t num_sequences = 0;       // most sequences at a time
  int32_t num_kv_heads = 0;        // of each layer
  int32_t head_dim = 0;            // of queries and keys: a multiple of 8, at most 256
  int32_t page_size = 16;          // entries of a page: a power of two, 8 to 256; with tails 32
  int32_t num_pages = 0;           // pages of the pool, over all layers
  int32_t max_row_pages = 0;       // most pages of one row
  DType dtype = DType::kBFloat16;  // of keys and values; kFloat32 only in plain pages
  PageFormat format = PageFormat::kPlain;  // of the pages
  bool has_biases = false;                 // one for each entry; only in plain pages
  int32_t value_dim = 0;                   // of values, as head_dim; 0: the same. Not with tails
  KeyDims key_dims = {};                   // of kInt4
  Device device = {};                      // where the tensors live: that of the Memory
};

/// The tensors of one layer (or of some of its sequences). Letters: B sequences, N pages, M most
/// pages of a row, P page size, D and Dv dimensions of a key and of a value, Z = ceil(D / 64) scale
/// groups. What is [N, ...] is shared by all layers.
struct LayerView {
  /// [N, 2, P, D]  keys, then values, of one row each: of the dtype of keys and values, or their
  /// codes, uint8 (int8) or float8 (fp8). [N, 2, P, D / 2] uint8 (int4): two codes a byte, that of
  /// the dimension before in the low half; [N, 2, P, D / 4] (int2): four, the first in the lowest
  /// bits. [N, 1, P, D] keys alone, where there are value_pages; of int4 with mixed KeyDims bytes of
  /// keys: dimensions in 16 bits, in 4, and four in a byte in 2
  TensorView pages;
  /// [N, P] int32  where the entry of each slot stood in its sequence
  TensorView page_positions;
  /// [B, Hkv, M] int32  pages of each row in slot order; -1 behind the last
  TensorView block_table;
  /// [B, Hkv] int32  entries that each row holds
  TensorView lengths;
  /// [B] int32  tokens that went by, kept or not: the position of the next one
  TensorView seen;
  /// [B, Hkv, F] int32  pages for rows that outgrow their last one: the k-th new page of a row
  /// within one append is fresh_pages[b, h, k]
  TensorView fresh_pages;
  /// [N, P, 2 Z] (int8: scale and zero of group 0, of group 1, ...) or [N, P, Z] (fp8: scales), of the
  /// dtype of keys and values; not given for plain pages. [N, 2, D] (int4, int2): the scale of each
  /// dimension of the page's keys, then the zeros; of mixed KeyDims not of those in 16 bits
  TensorView key_scales;
  /// The same for values; int4 as int8, int2 with groups of 32 dimensions.
  TensorView value_scales;
  /// [B, Hkv, 2 P, D]  of the dtype of keys and values; only of int4 and int2: the last lengths % P
  /// entries of each row, P keys, then P values. Their page has their positions, and gets their codes
  /// when it is full. With all layers [L * B, Hkv, 2 P, D]
  TensorView tails;
  /// [N, P] float16  what attend adds to the logit of each slot's entry, a finite number; only where
  /// the config has_biases
  TensorView page_biases;
  /// [N, 1, P, Dv]  values, of the dtype of pages and as far apart; only where Dv isn't D. Of int4
  /// [N, 1, P, D / 2], where KeyDims are mixed
  TensorView value_pages;

  /// [N, 1, P, Dv]  values, or their codes, wherever they lie.
  TensorView values() const { return value_pages ? value_pages : pages.narrow(1, 1, 1); }

  /// With tails: which dimensions of keys have other bits than 4, as the widths of the tensors say;
  /// of int2 all of them.
  KeyDims key_dims() const {
    if (format() == PageFormat::kInt2) return {0, static_cast<int32_t>(tails.shape[3])};
    if (!tails || !value_pages) return {};
    const int64_t in_16 = tails.shape[3] - key_scales.shape[2];
    const int64_t others = tails.shape[3] - in_16, width = pages.shape[3];
    return {static_cast<int32_t>(in_16), static_cast<int32_t>(8 * in_16 + 2 * others - 4 * width)};
  }

  /// What the pages hold, which their dtype says, and whether there are tails; then their width.
  PageFormat format() const {
    const bool is_int2 = tails && !value_pages && 4 * pages.shape[3] == tails.shape[3];
    return is_int2                         ? PageFormat::kInt2
           : tails                         ? PageFormat::kInt4
           : pages.dtype == DType::kUInt8  ? PageFormat::kInt8
           : pages.dtype == DType::kFloat8 ? PageFormat::kFp8
                                           : PageFormat::kPlain;
  }
};

/// Pages of several sequences: those of sequence i are ids[indptr[i] .. indptr[i + 1]).
struct PageList {
  std::vector<int32_t> ids;     // pages, sequence by sequence
  std::vector<int32_t> indptr;  // [sequences + 1]  where each one's begin
};

class KVCache;
struct SharedPages;

/// A cache that shares pages with another one, and what the verb fork() has to know to fill it.
struct Fork {
  std::unique_ptr<KVCache> cache;  // null after fork_into()
  std::vector<PageList> pages;     // [L]  of each layer, page_ids and page_indptr
  std::vector<int32_t> stretch;    // [B]  tokens since rows were given fresh pages
};

/// Who owns which page, and the tensors of all layers. One thread at a time may change a cache and
/// its forks; different caches need no care.
class KVCache {
 public:
  /// Columns of LayerView::fresh_pages: with P = 16, up to 512 tokens in one append.
  static constexpr int32_t kFreshColumns = 32;

  /// Takes all memory at once and empties it in `stream`, which later calls have to come after.
  /// `memory` must outlive the cache. Throws InvalidArgument for a config that makes no sense and
  /// Error if the memory can't be had.
  KVCache(const CacheConfig& config, Memory& memory, Stream stream = nullptr);
  /// Gives the memory back, unless somebody has holder(), and pages that forks share; tensors of the
  /// cache must not be used any more.
  ~KVCache();
  KVCache(const KVCache&) = delete;
  KVCache& operator=(const KVCache&) = delete;

  /// As given, and raised by reserve().
  const CacheConfig& config() const { return config_; }
  /// Where its tensors lie.
  Memory& memory() const { return memory_; }

  /// How many pages are free and used. Forks have one pool.
  const PagePool& pool() const;

  /// Bytes of one page: keys, values and positions, scales and biases if there are any.
  size_t page_bytes() const;

  /// Bytes that a sequence takes beside its pages: the tails of all its rows, if it has any, or 0.
  size_t tail_bytes() const;

  /// Bytes of what sequences own: their pages, and the tails of those that hold anything; those of
  /// all forks, as pages may be shared.
  size_t bytes_used() const;

  /// The tensors of layer `layer`, all sequences.
  LayerView layer(int32_t layer) const;

  /// The same tensors with all layers in front, as plan() takes them: lengths [L, B, Hkv],
  /// block_table [L, B, Hkv, M], ...
  const LayerView& all_layers() const { return all_layers_; }

  /// Pages that one sequence takes in one layer for `num_kept` entries of its prompt, however they
  /// are spread over the rows, and for `num_new` tokens after it. Throws InvalidArgument for numbers
  /// that make no sense.
  static int64_t pages_for(int64_t num_kept,
                           int64_t num_new,
                           int32_t num_kv_heads,
                           int32_t page_size);

  /// Makes room for at least `num_pages` pages in the pool and `max_row_pages` in a row, and keeps
  /// what the cache holds. What has to grow is copied to new memory in `stream`, pages that were
  /// never taken excepted: the pool takes twice its memory for a moment. Views from before are
  /// stale: those of what is [N, ...] if the pool grew, those of `block_table` if rows did; the other
  /// tensors stay where they are. Forks have one pool, which grows for all. Throws InvalidArgument for
  /// sizes that make no sense and Error if the memory can't be had; then nothing changes.
  void reserve(int32_t num_pages, int32_t max_row_pages, Stream stream = nullptr);

  /// The memory of the tensors as they are now. Who holds it may use them after a reserve(), which
  /// writes others, and after the end of the cache; the Memory must live as long.
  std::shared_ptr<const void> holder() const;

  /// Takes the pages for what the sequences first_sequence + i keep of their prompts in a layer, to
  /// be passed to compact(). Sequence i keeps at most num_kept[i] entries over all its rows, and at
  /// most longest_row[i] in one of them. Throws Error if too few pages are free (the message says
  /// how many are needed and free) or a row might outgrow max_row_pages, and InvalidArgument if a
  /// sequence holds entries in this layer already. Then nothing changes.
  PageList begin(int32_t layer,
                 int32_t first_sequence,
                 const std::vector<int64_t>& num_kept,
                 const std::vector<int64_t>& longest_row);

  /// The pages for what the sequences first_sequence + i keep of all that they hold, in every layer,
  /// to be passed to compact(): at most num_kept[l][i] entries over all rows of layer l, and at most
  /// longest_row[i] in one of them. The pages are those that the sequence has had longest in the
  /// layer; only where hardly anything leaves, free ones come to them. The others are free at once,
  /// and hold their entries until the first begin, begin_again or grow after this one: compact()
  /// every layer before that. Throws Error if too few pages are free or a row might outgrow
  /// max_row_pages, and InvalidArgument for a sequence that no begin() was called for in every layer.
  /// Then nothing changes. Where compact() put a layer's entries into pages of another layer (as what
  /// is chosen over all layers at once is dealt out), `own_pages` must be false: all are free ones.
  /// Throws InvalidArgument, too, where is_shared(): fork() the sequence `whole` before.
  std::vector<PageList> begin_again(int32_t first_sequence,
                                    const std::vector<std::vector<int64_t>>& num_kept,
                                    const std::vector<int64_t>& longest_row,
                                    bool own_pages = true);

  /// Makes room for appending tokens, in all layers. A batch of `num_columns` columns comes, of
  /// which the last num_new[b] are tokens of sequence b (right-aligned). Returns how many columns,
  /// from the left, may be appended now: append those in every layer, then call again for the rest.
  /// Throws Error if there are too few free pages for all the columns or a row might outgrow
  /// max_row_pages, and InvalidArgument for a sequence that no begin() was called for; then nothing
  /// changes.
  int32_t grow(const std::vector<int32_t>& num_new, int32_t num_columns, Stream stream = nullptr);

  /// Pages that have to be free for appending num_new[b] tokens to each sequence b.
  int64_t pages_to_grow(const std::vector<int32_t>& num_new) const;

  /// Columns of the block table that the longest row may need after that: what max_row_pages has to
  /// be.
  int64_t row_pages_to_grow(const std::vector<int32_t>& num_new) const;

  /// Gives the pages of a sequence back and empties its rows.
  void remove(int32_t sequence, Stream stream = nullptr);

  /// A cache of the sequences `sources` of this one, which may name some several times, some not at
  /// all: branches of their texts. They share their pages, but for those that a row may still write
  /// to, its last one and its fresh one, which come from the pool; with `whole` all of them do.
  /// back[i] newest tokens of a sequence stay behind, none if `back` isn't given; not with tails. The
  /// fork's rows are empty until the verb fork() has filled those of every layer: call it before
  /// anything else is done with either cache. Both have one pool, and one thread at a time; each may
  /// be destroyed first. Throws Error if too few pages are free or memory can't be had, and
  /// InvalidArgument for a sequence that was begun in some layers only; then nothing changes.
  Fork fork(const std::vector<int32_t>& sources,
            const std::vector<int32_t>& back = {},
            bool whole = false,
            Stream stream = nullptr);

  /// The same, but the branches are sequences of this cache from `first_sequence` on, which must be
  /// empty: Fork::cache is null, and the verb fork() fills rows of this cache's layers. Throws
  /// InvalidArgument, too, for a sequence that isn't empty; then nothing changes.
  Fork fork_into(int32_t first_sequence,
                 const std::vector<int32_t>& sources,
                 const std::vector<int32_t>& back = {},
                 bool whole = false);

  /// Pages that have to be free for that.
  int64_t pages_to_fork(const std::vector<int32_t>& sources, bool whole = false) const;

  /// Whether a page of the sequence is one of another sequence, too.
  bool is_shared(int32_t sequence) const;

  /// Pages that a sequence owns in a layer.
  int32_t num_pages(int32_t layer, int32_t sequence) const;

 private:
  struct Sequence {
    std::vector<std::vector<int32_t>> pages;  // [num_layers], owned pages; [0] before begin()
    int64_t longest_row = 0;                  // of the prompt's entries, at most
    int64_t appended = 0;                     // tokens since begin()
    // The last pages of each layer are those that its rows began last, or will begin next: num_kv_heads
    // by num_kv_heads, so many times. Which row has one of the others, only the device knows.
    int32_t num_started = 0;

    size_t num_pages(int32_t layer) const { return pages.empty() ? 0 : pages[layer].size(); }
  };

  KVCache(const KVCache& from, int32_t num_sequences, Stream stream);
  void check_sequence(int32_t sequence) const;
  void check_fork(const std::vector<int32_t>& sources, const std::vector<int32_t>& back) const;
  int64_t pages_of_fork(const std::vector<int32_t>& owned, bool whole) const;
  void fork_pages(const Sequence& source,
                  Sequence& branch,
                  int64_t back,
                  bool whole,
                  std::vector<PageList>& lists);
  void branch(KVCache& to,
              int32_t first,
              const std::vector<int32_t>& sources,
              const std::vector<int32_t>& back,
              bool whole,
              Fork& fork);
  int64_t row_starts(int64_t appended) const;
  void make_tables(Stream stream);
  int64_t check_kept(int32_t first_sequence,
                     const std::vector<int64_t>& num_kept,
                     const std::vector<int64_t>& longest_row) const;
  PageList take(int32_t layer, int32_t first_sequence, const std::vector<int64_t>& num_kept);
  void check_layer(int32_t layer) const;
  int64_t pages_of(int64_t num_kept) const;
  int64_t row_pages(int64_t entries) const;
  void check_row(int64_t entries) const;
  void refill(int32_t sequence, int32_t first, int32_t last, Stream stream);

  CacheConfig config_;
  Memory& memory_;
  std::vector<Sequence> sequences_;
  LayerView all_layers_;  // fresh_pages lies as [B, L, Hkv, F], so that a sequence's are one copy
  std::shared_ptr<SharedPages> shared_;  // with forks
  // What the other tensors lie in: the block table; the rest, which never grows.
  std::shared_ptr<void> table_data_, row_data_;
};

}  // namespace adakv
#pragma GCC visibility pop
