/** @file
 * Branches for C: caches whose sequences share pages, and the verb fork() of ops.h. c.h includes it. */
#pragma once

#include "adakv/c.h"

#pragma GCC visibility push(default) /* what a shared adakv shows */
#ifdef __cplusplus
extern "C" {
#endif

/** A cache of the sequences `sources` [num_sources] of this one, which share their pages with it but
 * for those that rows may still write to (all of them, if `whole`); without back[i] newest tokens each,
 * if it isn't NULL. adakv_fork() must fill every layer, with pages[l] and stretch [num_sources], before
 * anything else is done with either cache; both are for one thread at a time. `pages` has an element
 * for each layer. Each cache is destroyed by itself, in any order; functions given as memory must live
 * as long as one of them. */
AdakvStatus adakv_cache_fork(AdakvCache* cache,
                             const int32_t* sources,
                             int32_t num_sources,
                             const int32_t* back,
                             int32_t whole,
                             void* stream,
                             AdakvCache** fork,
                             AdakvPageList* pages,
                             int32_t* stretch);

/** The same, but the branches are sequences of this cache from `first_sequence` on, which must be empty:
 * adakv_fork() fills rows of its own layers. `pages` are good until the next call that gives some. */
AdakvStatus adakv_cache_fork_into(AdakvCache* cache,
                                  int32_t first_sequence,
                                  const int32_t* sources,
                                  int32_t num_sources,
                                  const int32_t* back,
                                  int32_t whole,
                                  AdakvPageList* pages,
                                  int32_t* stretch);

/** Whether a page of the sequence is one of another sequence, too: then adakv_cache_begin_again()
 * wants it forked whole. 0 or 1; -1 for NULL and wrong numbers. */
int32_t adakv_cache_is_shared(const AdakvCache* cache, int32_t sequence);

/** What adakv_fork() takes: ForkArgs of ops.h. */
typedef struct AdakvForkArgs {
  const AdakvTensor* source_table;   /* [A, Hkv, M] int32 */
  const AdakvTensor* source_lengths; /* [A, Hkv] int32 */
  const AdakvTensor* source_seen;    /* [A] int32 */
  const AdakvTensor* source_tails;   /* [A, Hkv, 2 P, D] int4, int2, else NULL */
  const AdakvTensor* sources;        /* [B] int32 */
  const AdakvTensor* stretch;        /* [B] int32, of adakv_cache_fork() */
  const AdakvTensor* back;           /* [B] int32, optional */
  const AdakvTensor* page_ids;       /* [Q] int32, of adakv_cache_fork(), on the tensors' device */
  const AdakvTensor* page_indptr;    /* [B + 1] int32 */
  int32_t whole;                     /* 0; whether rows share nothing */
  AdakvLayer layer;                  /* of the fork, out */
  void* stream;                      /* a cudaStream_t; NULL on the CPU */
} AdakvForkArgs;

/** Arguments with the defaults of ops.h and no tensors. */
AdakvForkArgs adakv_fork_defaults(void);

/** The function of the same name in ops.h. */
AdakvStatus adakv_fork(const AdakvForkArgs* args);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
