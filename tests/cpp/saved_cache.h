// A small cache that holds something in every row, to be saved.
#pragma once

#include <adakv/adakv.h>

#include <cstdint>
#include <random>
#include <vector>

namespace adakv {

/// Two layers of two kv heads, bfloat16; two sequences of which 90 and 70 tokens went by, whose rows
/// hold full pages and parts of one.
struct Saved {
  static constexpr int kLayers = 2, kBatch = 2, kHeads = 2, kDim = 16, kTokens = 90;

  KVCache cache;
  std::vector<float> numbers = {1, 2, 3};
  struct Beside {
    TensorView view;
  } beside = {TensorView(numbers.data(), {3}, DType::kFloat32)};

  explicit Saved(PageFormat format, int32_t value_dim = kDim)
      : cache(config_of(format, value_dim), device_memory({})) {
    std::mt19937 random(static_cast<uint32_t>(format));
    for (int32_t layer = 0; layer < kLayers; ++layer) compact_layer(layer, random);
  }
  Saved(const Saved&) = delete;

  static CacheConfig config_of(PageFormat format, int32_t value_dim = kDim) {
    CacheConfig config;
    config.num_layers = kLayers;
    config.num_sequences = kBatch;
    config.num_kv_heads = kHeads;
    config.head_dim = kDim;
    config.value_dim = value_dim;
    config.page_size = 32;
    config.num_pages = 64;
    config.max_row_pages = 8;
    config.dtype = DType::kBFloat16;
    config.format = format;
    return config;
  }

 private:
  void compact_layer(int32_t layer, std::mt19937& random) {
    const int32_t lengths[] = {70, 32 + layer, 3, 65}, seen[] = {kTokens, 70};
    const int64_t widths[] = {kDim, cache.config().value_dim};
    std::vector<uint16_t> entries(kBatch * kHeads * kTokens * (widths[0] + widths[1]));
    for (uint16_t& x : entries) {  // bfloat16 in -2 .. -1 and 1 .. 2
      x = static_cast<uint16_t>(0x3F80 | (random() & 0x7F) | (random() & 1) << 15);
    }
    const auto view = [&](size_t half) {
      return TensorView(&entries[half * kBatch * kHeads * kTokens * kDim],
                        {kBatch, kHeads, kTokens, widths[half]}, DType::kBFloat16);
    };
    std::vector<int32_t> positions, indptr = {0}, lens(seen, seen + kBatch);
    for (int r = 0; r < kBatch * kHeads; ++r) {
      const int32_t length = lengths[r], last = seen[r / kHeads];
      for (int32_t i = 0; i < length; ++i) positions.push_back(last - length + i);
      indptr.push_back(static_cast<int32_t>(positions.size()));
    }
    const std::vector<int64_t> totals = {lengths[0] + lengths[1], lengths[2] + lengths[3]};
    PageList pages = cache.begin(layer, 0, totals, {kTokens, kTokens});
    const auto ints = [](std::vector<int32_t>& x) {
      return TensorView(x.data(), {static_cast<int64_t>(x.size())}, DType::kInt32);
    };
    CompactArgs args;
    args.keys = view(0), args.values = view(1);
    args.positions = ints(positions), args.indptr = ints(indptr), args.seq_lens = ints(lens);
    args.page_ids = ints(pages.ids), args.page_indptr = ints(pages.indptr);
    args.layer = cache.layer(layer);
    std::vector<int32_t> scratch(workspace_bytes(args) / 4 + 1);
    args.workspace = ints(scratch);
    compact(args);
  }
};

/// The rows of a fork of two sequences of `cache`, 1 and 2, that was made `whole`.
inline void fill_fork(const KVCache& cache, const Fork& made) {
  const auto ints = [](const std::vector<int32_t>& x) {
    return TensorView(const_cast<int32_t*>(x.data()), {static_cast<int64_t>(x.size())},
                      DType::kInt32);
  };
  const std::vector<int32_t> sources = {1, 2};
  for (int32_t layer = 0; layer < cache.config().num_layers; ++layer) {
    const LayerView from = cache.layer(layer);
    ForkArgs args;
    args.source_table = from.block_table, args.source_lengths = from.lengths;
    args.source_seen = from.seen, args.source_tails = from.tails;
    args.sources = ints(sources), args.stretch = ints(made.stretch), args.whole = true;
    args.page_ids = ints(made.pages[layer].ids), args.page_indptr = ints(made.pages[layer].indptr);
    args.layer = made.cache->layer(layer);
    fork(args);
  }
}

}  // namespace adakv
