// What a history asks of the C face, beside its cache.
#pragma once

#include <adakv/adakv.h>
#include <adakv/c.h>

#include <memory>
#include <vector>

#include "input.h"

namespace adakv::fuzz {

inline int64_t wild_count(Input& input) {
  return static_cast<int64_t>(input.word()) << 32 | input.word();
}

/// Pages for counts that may be any: a number, or an error in both languages.
inline void count_anything(Input& input) {
  const int64_t num_kept = input.one_in(2) ? wild_count(input) : input.range(0, 999);
  const int64_t num_new = input.one_in(2) ? wild_count(input) >> input.range(0, 40) : 3;
  const auto heads = static_cast<int32_t>(input.one_in(2) ? input.word() : 2);
  const auto page_size = static_cast<int32_t>(input.one_in(2) ? input.word() : 8);
  int64_t pages = -1;
  try {
    pages = KVCache::pages_for(num_kept, num_new, heads, page_size);
    ADAKV_FUZZ_ASSERT(pages >= 0);
  } catch (const InvalidArgument&) {
  }
  ADAKV_FUZZ_ASSERT(adakv_pages_for(num_kept, num_new, heads, page_size) == pages);
}

/// The C face's cache: with none, and with arrays that end where their number says, or nowhere.
inline void begin_in_c(Input& input) {
  ADAKV_FUZZ_ASSERT(adakv_cache_num_free(nullptr) == -1 && adakv_cache_page_bytes(nullptr) == 0);
  ADAKV_FUZZ_ASSERT(adakv_cache_tail_bytes(nullptr) == 0);
  ADAKV_FUZZ_ASSERT(adakv_cache_bytes_used(nullptr) == 0);
  AdakvCacheConfig config = {};
  config.num_layers = config.num_kv_heads = config.max_row_pages = 1;
  config.num_sequences = input.range(1, 3);
  config.head_dim = config.page_size = 8;
  config.num_pages = 6;
  config.dtype = {2, 32, 1};
  config.device = {1, 0};
  AdakvCache* made = nullptr;
  ADAKV_FUZZ_ASSERT(adakv_cache_create(&config, nullptr, nullptr, &made) == ADAKV_OK);
  const std::unique_ptr<AdakvCache, void (*)(AdakvCache*)> cache(made, &adakv_cache_destroy);
  const int32_t size = input.range(0, 3);
  const auto any = [&](int32_t usual) {
    return input.one_in(4) ? static_cast<int32_t>(input.word()) : usual;
  };
  const int32_t first = any(input.range(0, 3)), count = any(size);
  const bool fits = first >= 0 && count >= 1 && first < config.num_sequences &&
                    count <= config.num_sequences - first;
  if (fits && count != size) return;  // reads as many as it says, as it must
  const std::vector<int64_t> counts(size, input.range(0, 8));
  AdakvPageList pages = {};
  const AdakvStatus status =
      adakv_cache_begin(made, 0, first, count, counts.data(), counts.data(), &pages);
  ADAKV_FUZZ_ASSERT(fits || status == ADAKV_INVALID_ARGUMENT);
  ADAKV_FUZZ_ASSERT(adakv_cache_num_free(made) == 6 - (status == ADAKV_OK ? pages.num_ids : 0));
}

}  // namespace adakv::fuzz
