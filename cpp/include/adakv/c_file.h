/** @file
 * Caches in files for C: CacheFile and save_cache() of cache_file.h. c.h includes it. */
#pragma once

#include "adakv/c.h"

#pragma GCC visibility push(default) /* what a shared adakv shows */
#ifdef __cplusplus
extern "C" {
#endif

/** A cache's file, open: CacheFile of cache_file.h. For one thread at a time. */
typedef struct AdakvCacheFile AdakvCacheFile;

/** A text that is kept beside a cache. */
typedef struct AdakvText {
  const char* name; /* UTF-8 */
  const char* text; /* UTF-8 */
} AdakvText;

/** A tensor that is kept beside a cache. */
typedef struct AdakvNamedTensor {
  const char* name;          /* UTF-8 */
  const AdakvTensor* tensor; /* contiguous, in host memory */
} AdakvNamedTensor;

/** Maps a file that adakv_cache_save() or Python wrote; checks its head and its lengths. */
AdakvStatus adakv_cache_file_open(const char* path, AdakvCacheFile** file);

/** The same of bytes in memory, which must outlive the file. */
AdakvStatus adakv_cache_file_from_memory(const void* data, size_t bytes, AdakvCacheFile** file);

/** NULL is allowed. */
void adakv_cache_file_close(AdakvCacheFile* file);

/** A text beside the cache, "model" for example; NULL if there is none of that name. It belongs to the
 * file. */
const char* adakv_cache_file_text(const AdakvCacheFile* file, const char* name);

/** Tokens of each sequence that went by, [num_sequences of the config]; NULL for NULL. They belong to
 * the file. */
const int32_t* adakv_cache_file_seen(const AdakvCacheFile* file);

/** Sizes of a cache that has room for what the file holds and for max_new_tokens tokens behind each
 * sequence; on the CPU, which is yours to change. page_size 0 is 16, of quantised pages 32. */
AdakvStatus adakv_cache_file_config(const AdakvCacheFile* file,
                                    int64_t max_new_tokens,
                                    int32_t page_size,
                                    AdakvCacheConfig* config);

/** A tensor that was saved beside the cache. It belongs to the file, and is not to be written to. */
AdakvStatus adakv_cache_file_other(AdakvCacheFile* file,
                                   const char* name,
                                   const AdakvTensor** tensor);

/** Puts what the file holds into empty sequences of a cache, from first_sequence on. */
AdakvStatus adakv_cache_load(AdakvCache* cache,
                             const AdakvCacheFile* file,
                             int32_t first_sequence,
                             void* stream);

/** Writes what a cache holds to a file, with `texts` [num_texts] and `others` [num_others] beside it.
 * Waits for `stream`. A cache on a GPU in memory of your own can't be saved. */
AdakvStatus adakv_cache_save(const AdakvCache* cache,
                             const char* path,
                             const AdakvText* texts,
                             int32_t num_texts,
                             const AdakvNamedTensor* others,
                             int32_t num_others,
                             void* stream);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
