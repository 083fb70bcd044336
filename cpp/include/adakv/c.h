/** @file
 * adakv for C, and for everything that can call C: the ten verbs of ops.h and the cache of
 * kv_cache.h. What a verb computes is said there, once; here is how to call it.
 *
 * Every function that can fail returns an AdakvStatus and throws nothing. After a failure nothing
 * was changed, and adakv_last_error() names the argument, what was expected and what came.
 *
 * Tensors are DLPack's DLTensor. Include dlpack/dlpack.h before this header to use that type; the
 * one declared here has the same layout. Where a tensor is optional, NULL leaves it out.
 *
 * @code
 * AdakvScoreArgs args = adakv_score_defaults();
 * args.queries = &queries; args.keys = &keys; args.scores = &scores;
 * if (adakv_score_workspace(&args, &args.workspace_bytes) != ADAKV_OK) return fail();
 * args.workspace = malloc(args.workspace_bytes);  // on the tensors' device
 * if (adakv_score(&args) != ADAKV_OK) return fail();
 * @endcode
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(default) /* what a shared adakv shows */
#ifdef __cplusplus
extern "C" {
#endif

/** How a call went. */
typedef enum AdakvStatus {
  ADAKV_OK = 0,               /* done */
  ADAKV_INVALID_ARGUMENT = 1, /* the caller passed something wrong */
  ADAKV_ERROR = 2             /* it could not be done: no memory, no device, no pages left */
} AdakvStatus;

/** What this thread's last failed call said; "" if none failed. Valid until its next failure. */
const char* adakv_last_error(void);

/** "0.1.0". Minor versions before 1.0 may change structs: compare with those of your headers. */
const char* adakv_version(void);

/* ---- Tensors --------------------------------------------------------------------------------- */

#ifdef DLPACK_DLPACK_H_
typedef DLTensor AdakvTensor;
typedef DLDevice AdakvDevice;
typedef DLDataType AdakvDataType;
#else
/** Where a tensor lies, DLPack's DLDevice. */
typedef struct AdakvDevice {
  int32_t device_type; /* 1 CPU, 2 CUDA */
  int32_t device_id;   /* of the CPU: 0 */
} AdakvDevice;

/** What a tensor is made of, DLPack's DLDataType. */
typedef struct AdakvDataType {
  uint8_t code;   /* 0 integer, 1 unsigned, 2 floating point, 4 bfloat, 10 float8_e4m3fn */
  uint8_t bits;   /* of an element */
  uint16_t lanes; /* 1 */
} AdakvDataType;

/** A tensor, DLPack's DLTensor. */
typedef struct AdakvTensor {
  void* data;           /* on `device` */
  AdakvDevice device;   /* where `data` lies */
  int32_t ndim;         /* at most 4 */
  AdakvDataType dtype;  /* float32, float16, bfloat16, int32; of pages also uint8, float8_e4m3fn */
  int64_t* shape;       /* [ndim] */
  int64_t* strides;     /* [ndim] in elements, the last of them 1; NULL: contiguous */
  uint64_t byte_offset; /* of the first element, from `data` */
} AdakvTensor;
#endif

/* ---- The cache (kv_cache.h) ------------------------------------------------------------------ */

/** The memory of a compressed cache: KVCache of kv_cache.h. */
typedef struct AdakvCache AdakvCache;

/** How pages hold keys and values: PageFormat of kv_cache.h. */
typedef enum AdakvPageFormat {
  ADAKV_PLAIN_PAGES, /* as they are */
  ADAKV_INT8_PAGES,  /* 8 bits, with scale and zero of 64 dimensions */
  ADAKV_FP8_PAGES,   /* float8_e4m3fn, with the scale of 64 dimensions */
  ADAKV_INT4_PAGES,  /* 4 bits, pages of 32 entries; the last page of a row in 16 bits */
  ADAKV_INT2_PAGES   /* 2 bits, the same otherwise */
} AdakvPageFormat;

/** Sizes of a cache. adakv_cache_reserve() raises num_pages and max_row_pages. */
typedef struct AdakvCacheConfig {
  int32_t num_layers;     /* of the model */
  int32_t num_sequences;  /* most sequences at a time */
  int32_t num_kv_heads;   /* of a layer */
  int32_t head_dim;       /* of queries and keys: a multiple of 8, at most 256 */
  int32_t page_size;      /* entries of a page: a power of two, 8 to 256; 16 is good */
  int32_t num_pages;      /* pages of the pool, over all layers */
  int32_t max_row_pages;  /* most pages of one row */
  AdakvDataType dtype;    /* float16 or bfloat16; in plain pages also float32 */
  AdakvDevice device;     /* of all tensors */
  AdakvPageFormat format; /* 0: plain pages */
  int32_t has_biases;     /* 0; whether entries have a bias each, in plain pages */
  int32_t value_dim;      /* of values, as head_dim, not with tails; 0: the same */
  int32_t key_dims[2];    /* 0; of int4: how many of a key have 16 bits, and 2 (KeyDims) */
} AdakvCacheConfig;

/** Memory of your own for a cache to live in. Called from the functions below, in their thread, and
 * must outlive the cache. Copies and fills are in stream order and return 0 on success; `free` waits
 * for work in a stream that may still use the memory, as cudaFree() does. */
typedef struct AdakvMemory {
  void* context; /* passed to every call */
  /** Uninitialised memory, aligned to 256 bytes; NULL if there is none. */
  void* (*allocate)(void* context, size_t bytes);
  /** Takes back what `allocate` gave. */
  void (*free)(void* context, void* data);
  /** Copies `rows` rows of `row_bytes`, packed on the host, `pitch_bytes` apart on the device.
   * `host` may be reused as soon as it returns. */
  int (*copy_rows_from_host)(void* context,
                             void* data,
                             size_t pitch_bytes,
                             const void* host,
                             size_t row_bytes,
                             size_t rows,
                             void* stream);
  /** Copies such rows from one place of the device to another; the places don't overlap. */
  int (*copy_rows)(void* context,
                   void* to,
                   size_t to_pitch_bytes,
                   const void* from,
                   size_t from_pitch_bytes,
                   size_t row_bytes,
                   size_t rows,
                   void* stream);
  /** Sets every byte of such rows to `value`. */
  int (*fill_rows)(void* context,
                   void* data,
                   size_t pitch_bytes,
                   int value,
                   size_t row_bytes,
                   size_t rows,
                   void* stream);
} AdakvMemory;

/** The tensors of one layer, the cache's own; adakv_cache_reserve() changes where they point to. */
typedef struct AdakvLayer {
  const AdakvTensor* pages; /* [N, 2, P, D], or codes: uint8, float8; int4 D / 2, int2 D / 4 */
  const AdakvTensor* page_positions; /* [N, P] int32 */
  const AdakvTensor* block_table;    /* [B, Hkv, M] int32 */
  const AdakvTensor* lengths;        /* [B, Hkv] int32 */
  const AdakvTensor* seen;           /* [B] int32 */
  const AdakvTensor* fresh_pages;    /* [B, Hkv, F] int32 */
  const AdakvTensor*
      key_scales; /* [N, P, 2 Z] int8, [N, P, Z] fp8, [N, 2, D] with tails, or NULL */
  const AdakvTensor* value_scales; /* the same for values, with tails as int8 */
  const AdakvTensor* tails;        /* [B, Hkv, 2 P, D] int4, int2 (all layers: L * B), else NULL */
  const AdakvTensor* page_biases;  /* [N, P] float16, if the cache has biases, else NULL */
  const AdakvTensor* value_pages;  /* [N, 1, P, Dv] beside pages [N, 1, P, D], or NULL: Dv is D */
} AdakvLayer;

/** Pages of several sequences in host memory, ids[indptr[i]] up to ids[indptr[i + 1]] of sequence i.
 * The cache's; valid until the next adakv_cache_begin() or adakv_cache_begin_again(). */
typedef struct AdakvPageList {
  const int32_t* ids;    /* [num_ids] */
  const int32_t* indptr; /* [num_sequences + 1] */
  int64_t num_ids;       /* pages of all sequences together */
} AdakvPageList;

/** Takes all memory at once, from `memory` (copied) or, if NULL, from adakv's own, and empties it in
 * `stream`, which later calls have to come after. */
AdakvStatus adakv_cache_create(const AdakvCacheConfig* config,
                               const AdakvMemory* memory,
                               void* stream,
                               AdakvCache** cache);

/** Gives all memory back. NULL is allowed. */
void adakv_cache_destroy(AdakvCache* cache);

/** The tensors of layer `layer`, all sequences. */
AdakvStatus adakv_cache_layer(const AdakvCache* cache, int32_t layer, AdakvLayer* tensors);

/** The same with all layers in front, as adakv_plan() takes them: lengths [L, B, Hkv], ... */
AdakvStatus adakv_cache_all_layers(const AdakvCache* cache, AdakvLayer* tensors);

/** Makes room for at least num_pages pages in the pool and max_row_pages in a row, and keeps what the
 * cache holds. What has to grow is copied to new memory in `stream`; the pool takes twice its memory
 * for a moment. AdakvLayers from before are good for the new memory, too; addresses copied out of
 * them are stale. */
AdakvStatus adakv_cache_reserve(AdakvCache* cache,
                                int32_t num_pages,
                                int32_t max_row_pages,
                                void* stream);

/** Takes the pages for what the sequences first_sequence + i keep of their prompts in a layer:
 * num_kept [num_sequences] entries over all rows, at most longest_row [num_sequences] in one. */
AdakvStatus adakv_cache_begin(AdakvCache* cache,
                              int32_t layer,
                              int32_t first_sequence,
                              int32_t num_sequences,
                              const int64_t* num_kept,
                              const int64_t* longest_row,
                              AdakvPageList* pages);

/** The pages for what the sequences first_sequence + i keep of all that they hold: of layer l
 * num_kept[l * num_sequences + i] entries over all rows, at most longest_row[i] in one. `pages` has
 * an element for each layer: as far as possible the sequences' own. The others are free at once, and
 * hold their entries until the next call that takes pages: adakv_compact() every layer before. Each
 * layer must have been compacted into its own pages. */
AdakvStatus adakv_cache_begin_again(AdakvCache* cache,
                                    int32_t first_sequence,
                                    int32_t num_sequences,
                                    const int64_t* num_kept,
                                    const int64_t* longest_row,
                                    AdakvPageList* pages);

/** Makes room for num_new [num_sequences] tokens; `columns` from the left may be appended now. */
AdakvStatus adakv_cache_grow(
    AdakvCache* cache, const int32_t* num_new, int32_t num_columns, void* stream, int32_t* columns);

/** Pages that have to be free for that. */
AdakvStatus adakv_cache_pages_to_grow(const AdakvCache* cache,
                                      const int32_t* num_new,
                                      int64_t* pages);

/** Columns of the block table that the longest row may need after that: the least max_row_pages. */
AdakvStatus adakv_cache_row_pages_to_grow(const AdakvCache* cache,
                                          const int32_t* num_new,
                                          int64_t* pages);

/** Gives the pages of a sequence back and empties its rows. */
AdakvStatus adakv_cache_remove(AdakvCache* cache, int32_t sequence, void* stream);

/** Pages that a sequence owns in a layer. */
AdakvStatus adakv_cache_num_pages(const AdakvCache* cache,
                                  int32_t layer,
                                  int32_t sequence,
                                  int32_t* pages);

/** Pages of the pool that are free; -1 for NULL. */
int32_t adakv_cache_num_free(const AdakvCache* cache);

/** Bytes of one page; 0 for NULL. */
size_t adakv_cache_page_bytes(const AdakvCache* cache);

/** Bytes that a sequence takes beside its pages: its tails, if it has any; 0 for NULL. */
size_t adakv_cache_tail_bytes(const AdakvCache* cache);

/** Bytes of what sequences own, pages and tails; 0 for NULL. */
size_t adakv_cache_bytes_used(const AdakvCache* cache);

/** Pages that one sequence takes in one layer for num_kept entries of its prompt, however they are
 * spread over the rows, and for num_new tokens after it; -1, and adakv_last_error(), for numbers that
 * make no sense. */
int64_t adakv_pages_for(int64_t num_kept, int64_t num_new, int32_t num_kv_heads, int32_t page_size);

/* ---- The verbs (ops.h) ----------------------------------------------------------------------- */

/** How several numbers become one. */
typedef enum AdakvReduce { ADAKV_MEAN, ADAKV_MAX, ADAKV_SUM } AdakvReduce;
/** How a score takes part in its neighbours'. */
typedef enum AdakvPool { ADAKV_POOL_MAX, ADAKV_POOL_AVG, ADAKV_POOL_NONE } AdakvPool;
/** Whether the q heads of a group are reduced before pooling or after it. */
typedef enum AdakvOrder { ADAKV_GROUP_FIRST, ADAKV_POOL_FIRST } AdakvOrder;
/** What a head gets however low its scores are. */
typedef enum AdakvSafeguard {
  ADAKV_BLEND,
  ADAKV_HARD_FLOOR,
  ADAKV_OFFICIAL_ROUND,
  ADAKV_NO_SAFEGUARD
} AdakvSafeguard;
/** The size of an entry's part in the layer's output. */
typedef enum AdakvNorm { ADAKV_L1, ADAKV_L2_GRAM } AdakvNorm;
/** How what an entry is given in one step joins what it was given before. */
typedef enum AdakvAccumulate { ADAKV_KEEP_SUM, ADAKV_KEEP_MAX, ADAKV_KEEP_LAST } AdakvAccumulate;

/** What adakv_score() takes: ScoreArgs of ops.h. */
typedef struct AdakvScoreArgs {
  const AdakvTensor* queries;     /* [B, Hq, W, D] */
  const AdakvTensor* keys;        /* [B, Hkv, T, D]; NULL: those of the layer */
  AdakvLayer layer;               /* instead of keys; all NULL if these are given */
  const AdakvTensor* seq_lens;    /* [B] int32, optional; NULL with a layer */
  const AdakvTensor* sink_logits; /* [Hq] float32, optional */
  const AdakvTensor* lse;         /* [B, Hq, W] float32, optional */
  float scale;                    /* 0: 1 / sqrt(D) */
  float softcap;                  /* 0: none */
  AdakvReduce window_reduce;      /* over the queries of the window */
  AdakvReduce group_reduce;       /* over the q heads of a group */
  AdakvOrder order;               /* of reducing the group and pooling */
  AdakvPool pool;                 /* over neighbouring entries */
  int32_t pool_width;             /* 7; odd */
  int32_t window;                 /* -1: W; positions at the end that don't compete */
  int32_t stride;                 /* 1; positions from one query to the next */
  int32_t distance;               /* 0; a query looks at entries so far before it */
  const AdakvTensor* scores;      /* [B, Hkv, T] float32, out */
  void* workspace;                /* scratch memory on the tensors' device */
  size_t workspace_bytes;         /* adakv_score_workspace() */
  void* stream;                   /* a cudaStream_t; NULL on the CPU */
} AdakvScoreArgs;

/** What adakv_value_norm() takes: ValueNormArgs of ops.h. */
typedef struct AdakvValueNormArgs {
  const AdakvTensor* values;   /* [B, Hkv, T, Dv] */
  const AdakvTensor* w_o;      /* [E, Hq * Dv] */
  const AdakvTensor* seq_lens; /* [B] int32, optional */
  AdakvNorm norm;              /* exact, or by a Gram matrix */
  const AdakvTensor* norms;    /* [B, Hkv, T] float32, out */
  void* workspace;             /* scratch memory on the tensors' device */
  size_t workspace_bytes;      /* adakv_value_norm_workspace() */
  void* stream;                /* a cudaStream_t; NULL on the CPU */
} AdakvValueNormArgs;

/** What adakv_allocate() takes: AllocateArgs of ops.h. */
typedef struct AdakvAllocateArgs {
  const AdakvTensor* scores;   /* [B, Hkv, T] float32 */
  const AdakvTensor* seq_lens; /* [B] int32, optional */
  int32_t budget;              /* entries per kv head, window included */
  int32_t window;              /* last entries of a prompt, always kept */
  double floor;                /* 0.2; 0 to 1 */
  AdakvSafeguard safeguard;    /* how the floor is kept */
  const AdakvTensor* budgets;  /* [B, Hkv] int32, out */
  void* workspace;             /* scratch memory on the tensors' device */
  size_t workspace_bytes;      /* adakv_allocate_workspace() */
  void* stream;                /* a cudaStream_t; NULL on the CPU */
} AdakvAllocateArgs;

/** What adakv_select() takes: SelectArgs of ops.h. */
typedef struct AdakvSelectArgs {
  const AdakvTensor* scores;    /* [B, Hkv, T] float32 */
  const AdakvTensor* budgets;   /* [B, Hkv] int32 */
  const AdakvTensor* norms;     /* [B, Hkv, T] float32, optional */
  const AdakvTensor* seq_lens;  /* [B] int32, optional */
  int32_t window;               /* last entries of a prompt, always kept */
  double first;                 /* 0.5; 0 to 1 */
  float eps;                    /* 1e-4 */
  const AdakvTensor* positions; /* [K] int32, out */
  const AdakvTensor* indptr;    /* [B * Hkv + 1] int32, out */
  void* workspace;              /* scratch memory on the tensors' device */
  size_t workspace_bytes;       /* adakv_select_workspace() */
  void* stream;                 /* a cudaStream_t; NULL on the CPU */
} AdakvSelectArgs;

/** What adakv_compact() takes: CompactArgs of ops.h. */
typedef struct AdakvCompactArgs {
  const AdakvTensor* keys;      /* [B, Hkv, T, D]; NULL: in place, positions are slots */
  const AdakvTensor* values;    /* [B, Hkv, T, Dv]; NULL with keys */
  const AdakvTensor* positions; /* [K] int32 */
  const AdakvTensor* indptr;    /* [B * Hkv + 1] int32 */
  const AdakvTensor* places;    /* [K] int32, optional: where entries lie among keys and values */
  const AdakvTensor* seq_lens;  /* [B] int32, optional */
  const AdakvTensor* page_ids; /* [Q] int32, of adakv_cache_begin() or ..._again(), on the device */
  const AdakvTensor* page_indptr; /* [B + 1] int32 */
  const AdakvTensor* biases;      /* [B, Hkv, T] float16, optional, of a layer with page_biases */
  AdakvLayer layer;               /* out; in place in and out */
  void* workspace;                /* scratch memory on the tensors' device */
  size_t workspace_bytes;         /* adakv_compact_workspace() */
  void* stream;                   /* a cudaStream_t; NULL on the CPU */
} AdakvCompactArgs;

/** What adakv_append() takes: AppendArgs of ops.h. */
typedef struct AdakvAppendArgs {
  const AdakvTensor* keys;    /* [B, Hkv, S, D] */
  const AdakvTensor* values;  /* [B, Hkv, S, Dv] */
  const AdakvTensor* num_new; /* [B] int32, optional */
  AdakvLayer layer;           /* in and out */
  void* stream;               /* a cudaStream_t; NULL on the CPU */
} AdakvAppendArgs;

/** What adakv_plan() takes: PlanArgs of ops.h. */
typedef struct AdakvPlanArgs {
  const AdakvTensor* lengths;     /* [L, B, Hkv] int32 */
  const AdakvTensor* block_table; /* [L, B, Hkv, M] int32 */
  const AdakvTensor* fresh_pages; /* [L, B, Hkv, F] int32 */
  const AdakvTensor* num_new;     /* [B] int32, optional */
  int32_t new_tokens;             /* 1; S of the step */
  int32_t page_size;              /* 16 */
  int32_t num_workers;            /* adakv_default_num_workers() */
  double share;                   /* 0: all pages; else what adakv_shortlist() will list with it */
  int32_t least;                  /* 8; of adakv_shortlist() */
  int32_t newest;                 /* 1; of adakv_shortlist() */
  const AdakvTensor* schedule;    /* [L, adakv_schedule_size(B * Hkv, num_workers)] int32, out */
  void* stream;                   /* a cudaStream_t; NULL on the CPU */
} AdakvPlanArgs;

/** Entries of the same rows that lie elsewhere: Tier of ops.h. */
typedef struct AdakvTier {
  AdakvLayer layer;            /* of the same sequences, without the call's new tokens */
  const AdakvTensor* schedule; /* [X] int32, of this layer: planned with new_tokens = 0 */
  const AdakvTensor* queries;  /* [B, Hq, S, D] with D of the tier; NULL: those of the call */
  int32_t column;              /* 0; of out, to which the first element of its values belongs */
} AdakvTier;

/** Tiers beside a layer. */
typedef struct AdakvTiers {
  const AdakvTier* tiers; /* [count] */
  int32_t count;
} AdakvTiers;

/** What adakv_attend() takes: AttendArgs of ops.h. */
typedef struct AdakvAttendArgs {
  const AdakvTensor* queries;     /* [B, Hq, S, D] */
  AdakvLayer layer;               /* in; in and out if keys are given */
  const AdakvTensor* schedule;    /* [X] int32, of this layer; counted in */
  const AdakvTensor* keys;        /* [B, Hkv, S, D], optional */
  const AdakvTensor* values;      /* [B, Hkv, S, Dv], optional */
  const AdakvTensor* num_new;     /* [B] int32, optional */
  const AdakvTensor* sink_logits; /* [Hq] float32, optional */
  AdakvTiers others;              /* none: 0; at most 7 */
  float scale;                    /* 0: 1 / sqrt(D) */
  float softcap;                  /* 0: none */
  int32_t num_workers;            /* as given to adakv_plan() */
  int32_t prefetch;               /* 0; see ops.h */
  AdakvAccumulate accumulate;     /* what accumulated keeps */
  AdakvReduce group_reduce;       /* over the q heads of a group, for accumulated */
  float decay;                    /* 1; of a sum, from token to token */
  float threshold;                /* of ADAKV_KEEP_LAST; 0: 1 / number of tokens */
  const AdakvTensor* out;         /* [B, Hq, S, O], out; O: Dv, or the columns of all tiers */
  const AdakvTensor* lse;         /* [B, Hq, S] float32, out, optional without accumulated */
  const AdakvTensor* accumulated; /* [B, Hkv, T] float32, in and out, optional; T >= M * P */
  void* workspace;                /* scratch memory on the tensors' device */
  size_t workspace_bytes;         /* adakv_attend_workspace() */
  void* stream;                   /* a cudaStream_t; NULL on the CPU */
} AdakvAttendArgs;

/** Arguments with the defaults of ops.h and no tensors. @{ */
AdakvScoreArgs adakv_score_defaults(void);
AdakvValueNormArgs adakv_value_norm_defaults(void);
AdakvAllocateArgs adakv_allocate_defaults(void);
AdakvSelectArgs adakv_select_defaults(void);
AdakvCompactArgs adakv_compact_defaults(void);
AdakvAppendArgs adakv_append_defaults(void);
AdakvPlanArgs adakv_plan_defaults(void);
AdakvAttendArgs adakv_attend_defaults(void);
/** @} */

/** A verb, as the function of the same name in ops.h. @{ */
AdakvStatus adakv_score(const AdakvScoreArgs* args);
AdakvStatus adakv_value_norm(const AdakvValueNormArgs* args);
AdakvStatus adakv_allocate(const AdakvAllocateArgs* args);
AdakvStatus adakv_select(const AdakvSelectArgs* args);
AdakvStatus adakv_compact(const AdakvCompactArgs* args);
AdakvStatus adakv_append(const AdakvAppendArgs* args);
AdakvStatus adakv_plan(const AdakvPlanArgs* args);
AdakvStatus adakv_attend(const AdakvAttendArgs* args);
/** @} */

/** Bytes of scratch memory that a call needs. Checks the arguments, but for the workspace itself.
 * @{ */
AdakvStatus adakv_score_workspace(const AdakvScoreArgs* args, size_t* bytes);
AdakvStatus adakv_value_norm_workspace(const AdakvValueNormArgs* args, size_t* bytes);
AdakvStatus adakv_allocate_workspace(const AdakvAllocateArgs* args, size_t* bytes);
AdakvStatus adakv_select_workspace(const AdakvSelectArgs* args, size_t* bytes);
AdakvStatus adakv_compact_workspace(const AdakvCompactArgs* args, size_t* bytes);
AdakvStatus adakv_attend_workspace(const AdakvAttendArgs* args, size_t* bytes);
/** @} */

/** int32 elements of one layer's schedule. */
int64_t adakv_schedule_size(int64_t num_rows, int32_t num_workers);

/** Workers that a device keeps busy. */
AdakvStatus adakv_default_num_workers(AdakvDevice device, int32_t* num_workers);

/** Threads that the CPU backend may use, the calling one included. Results do not depend on it. */
AdakvStatus adakv_set_num_threads(int32_t num_threads);

/** ADAKV_OK if the CUDA backend is built in and finds a device; else the last error says why not. */
AdakvStatus adakv_cuda_available(void);
#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
#include "adakv/c_file.h"
#include "adakv/c_fork.h"
#include "adakv/c_shortlist.h"
