/** @file
 * Sparse reads for C: the verb shortlist() of ops.h. c.h includes it. */
#pragma once

#include "adakv/c.h"

#pragma GCC visibility push(default) /* what a shared adakv shows */
#ifdef __cplusplus
extern "C" {
#endif

/** What adakv_shortlist() takes: ShortlistArgs of ops.h. */
typedef struct AdakvShortlistArgs {
  const AdakvTensor* queries;        /* [B, Hq, S, D] */
  const AdakvTensor* bounds;         /* [N, 2 D]; largest, then smallest of a page's keys */
  const AdakvTensor* lengths;        /* [B, Hkv] int32, the step's tokens included */
  const AdakvTensor* block_table;    /* [B, Hkv, M] int32 */
  const AdakvTensor* num_new;        /* [B] int32, optional */
  float scale;                       /* 0: 1 / sqrt(D) */
  float softcap;                     /* 0: none */
  int32_t page_size;                 /* 16 */
  double share;                      /* 0.125; of a row's pages */
  double mass;                       /* 1 */
  int32_t least;                     /* 8; pages that a row lists at least */
  int32_t newest;                    /* 1; pages at the end, listed always */
  int32_t prefetch;                  /* 0; see ops.h */
  const AdakvTensor* listed;         /* [B, Hkv, X] int32, out */
  const AdakvTensor* listed_lengths; /* [B, Hkv] int32, out */
  void* workspace;                   /* scratch memory on the tensors' device */
  size_t workspace_bytes;            /* adakv_shortlist_workspace() */
  void* stream;                      /* a cudaStream_t; NULL on the CPU */
} AdakvShortlistArgs;

/** Arguments with the defaults of ops.h and no tensors. */
AdakvShortlistArgs adakv_shortlist_defaults(void);

/** The function of the same name in ops.h. */
AdakvStatus adakv_shortlist(const AdakvShortlistArgs* args);

/** Bytes of scratch memory that a call needs. Checks the arguments, but for the workspace itself. */
AdakvStatus adakv_shortlist_workspace(const AdakvShortlistArgs* args, size_t* bytes);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
