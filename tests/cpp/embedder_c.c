/* The life of one sequence through adakv/c.h, as a C99 program would write it, on any device;
 * c_test.cc calls it. */
#define _POSIX_C_SOURCE 200112L /* posix_memalign */
#include "embedder_c.h"

#include <adakv/c.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { kArena = 1 << 20 }; /* bytes of all arrays */
enum { kHq = 4, kHkv = 2, kDim = 16, kPrompt = 50, kWindow = 4, kBudget = 12, kPage = 8 };

/* Both leave the function with the line that failed. */
#define TRY(call)                                \
  do {                                           \
    if ((call) != ADAKV_OK) {                    \
      strncpy(message, adakv_last_error(), 255); \
      return __LINE__;                           \
    }                                            \
  } while (0)

#define EXPECT(condition)                \
  do {                                   \
    if (!(condition)) {                  \
      strncpy(message, #condition, 255); \
      return __LINE__;                   \
    }                                    \
  } while (0)

typedef struct Shape {
  int64_t n[4];
} Shape;

static EmbedderDevice* at; /* where the sequence lives */
static char* arena;        /* all of its arrays there */
static size_t used;        /* bytes of the arena */

/* Device memory for an array, NULL if there is none; `host`, if given, is what it holds. */
static void* put(const void* host, size_t bytes) {
  void* data = arena + used;
  used += (bytes + 255) / 256 * 256;
  if (used > kArena) return NULL;
  if (host &&
      at->memory.copy_rows_from_host(at->memory.context, data, bytes, host, bytes, 1, at->stream))
    return NULL;
  return data;
}

static AdakvTensor tensor(void* data, int32_t ndim, Shape* shape, int is_int) {
  AdakvTensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.device = at->device;
  t.ndim = ndim;
  t.dtype.code = is_int ? 0 : 2;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = shape->n;
  return t;
}

static float noise(uint32_t* state) { /* about normal */
  float sum = -6;
  for (int i = 0; i < 12; ++i) {
    *state = *state * 1664525u + 1013904223u;
    sum += (float)(*state >> 8) / (1 << 24);
  }
  return sum;
}

static void fill(float* data, int size, uint32_t* state) {
  for (int i = 0; i < size; ++i) data[i] = noise(state);
}

/* ---- the host as a device: memory, copies and no stream ---- */

static void* host_allocate(void* context, size_t bytes) {
  EmbedderDevice* device = context;
  void* data = NULL;
  if (posix_memalign(&data, 256, bytes) != 0) return NULL;
  ++device->live;
  device->bytes += bytes;
  return data;
}

static void* no_memory(void* context, size_t bytes) {
  (void)context, (void)bytes;
  return NULL;
}

static void host_free(void* context, void* data) {
  --((EmbedderDevice*)context)->live;
  free(data);
}

static int copy_rows(void* context,
                     void* data,
                     size_t pitch,
                     const void* host,
                     size_t row_bytes,
                     size_t rows,
                     void* stream) {
  (void)context, (void)stream;
  for (size_t i = 0; i < rows; ++i)
    memcpy((char*)data + i * pitch, (const char*)host + i * row_bytes, row_bytes);
  return 0;
}

static int move_rows(void* context,
                     void* to,
                     size_t to_pitch,
                     const void* from,
                     size_t from_pitch,
                     size_t row_bytes,
                     size_t rows,
                     void* stream) {
  (void)context, (void)stream;
  for (size_t i = 0; i < rows; ++i)
    memcpy((char*)to + i * to_pitch, (const char*)from + i * from_pitch, row_bytes);
  return 0;
}

static int fill_rows(void* context,
                     void* data,
                     size_t pitch,
                     int value,
                     size_t row_bytes,
                     size_t rows,
                     void* stream) {
  (void)context, (void)stream;
  for (size_t i = 0; i < rows; ++i) memset((char*)data + i * pitch, value, row_bytes);
  return 0;
}

static int copy_to_host(void* host, const void* data, size_t bytes, void* stream) {
  (void)stream;
  memcpy(host, data, bytes);
  return 0;
}

void embedder_host(EmbedderDevice* device) {
  const AdakvMemory memory = {device, host_allocate, host_free, copy_rows, move_rows, fill_rows};
  memset(device, 0, sizeof *device);
  device->device.device_type = 1;
  device->memory = memory;
  device->copy_to_host = copy_to_host;
}

static AdakvCacheConfig small_config(AdakvDevice device) {
  AdakvCacheConfig config;
  memset(&config, 0, sizeof config);
  config.num_layers = 1;
  config.num_sequences = 1;
  config.num_kv_heads = kHkv;
  config.head_dim = kDim;
  config.page_size = kPage;
  config.num_pages = 40;
  config.max_row_pages = 16;
  config.dtype.code = 2;
  config.dtype.bits = 32;
  config.dtype.lanes = 1;
  config.device = device;
  return config;
}

/* ---- attention as it is defined, in double ---- */

static void attention(
    const float* query, const float** keys, const float** values, int count, double* out) {
  double sum = 0;
  memset(out, 0, kDim * sizeof *out);
  for (int i = 0; i < count; ++i) {
    double dot = 0;
    for (int d = 0; d < kDim; ++d) dot += (double)query[d] * keys[i][d];
    const double weight = exp(dot / sqrt(kDim));
    for (int d = 0; d < kDim; ++d) out[d] += weight * values[i][d];
    sum += weight;
  }
  for (int d = 0; d < kDim; ++d) out[d] /= sum;
}

/* ---- the life of a sequence ---- */

enum { kSteps = 20, kScratch = 1 << 18 };

/* What the program computed itself, and what it wants to see of the results; host memory. */
static float queries[kHq * kWindow * kDim], keys[kHkv * kPrompt * kDim], w_o[kDim * kHq * kDim];
static float values[kHkv * kPrompt * kDim];
static float new_keys[kSteps][kHkv * kDim], new_values[kSteps][kHkv * kDim];
static int32_t positions[kHkv * kBudget], indptr[kHkv + 1];

/* On the device. The scratch memory is one for all calls, which follow each other in the stream. */
static float *d_keys, *d_values;
static int32_t *d_positions, *d_indptr, *d_schedule;
static void* scratch;

#define RUN(verb, args)                                              \
  do {                                                               \
    TRY(adakv_##verb##_workspace(&(args), &(args).workspace_bytes)); \
    EXPECT((args).workspace_bytes <= kScratch);                      \
    (args).workspace = scratch, (args).stream = at->stream;          \
    TRY(adakv_##verb(&(args)));                                      \
  } while (0)

#define GET(host, data) EXPECT(at->copy_to_host(host, data, sizeof(host), at->stream) == 0)

/* score, value_norm -> allocate -> select, into positions and indptr. */
static int choose(char* message) {
  int32_t budgets[kHkv];
  Shape s_queries = {{1, kHq, kWindow, kDim}}, s_prompt = {{1, kHkv, kPrompt, kDim}};
  Shape s_scores = {{1, kHkv, kPrompt}}, s_w_o = {{kDim, kHq * kDim}}, s_budgets = {{1, kHkv}};
  Shape s_positions = {{kHkv * kBudget}}, s_indptr = {{kHkv + 1}};
  const size_t scores_bytes = kHkv * kPrompt * sizeof(float);
  AdakvTensor t_queries = tensor(put(queries, sizeof queries), 4, &s_queries, 0);
  AdakvTensor t_keys = tensor(d_keys, 4, &s_prompt, 0),
              t_values = tensor(d_values, 4, &s_prompt, 0);
  AdakvTensor t_w_o = tensor(put(w_o, sizeof w_o), 2, &s_w_o, 0);
  AdakvTensor t_scores = tensor(put(NULL, scores_bytes), 3, &s_scores, 0);
  AdakvTensor t_norms = tensor(put(NULL, scores_bytes), 3, &s_scores, 0);
  AdakvTensor t_budgets = tensor(put(NULL, sizeof budgets), 2, &s_budgets, 1);
  AdakvTensor t_positions = tensor(d_positions, 1, &s_positions, 1);
  AdakvTensor t_indptr = tensor(d_indptr, 1, &s_indptr, 1);

  AdakvScoreArgs score = adakv_score_defaults();
  score.queries = &t_queries, score.keys = &t_keys, score.scores = &t_scores;
  RUN(score, score);
  AdakvValueNormArgs value_norm = adakv_value_norm_defaults();
  value_norm.values = &t_values, value_norm.w_o = &t_w_o, value_norm.norms = &t_norms;
  RUN(value_norm, value_norm);
  AdakvAllocateArgs allocate = adakv_allocate_defaults();
  allocate.scores = &t_scores, allocate.budgets = &t_budgets;
  allocate.budget = kBudget, allocate.window = kWindow;
  RUN(allocate, allocate);
  GET(budgets, t_budgets.data);
  EXPECT(budgets[0] + budgets[1] == kHkv * kBudget);
  AdakvSelectArgs select = adakv_select_defaults();
  select.scores = &t_scores, select.budgets = &t_budgets, select.norms = &t_norms;
  select.window = kWindow, select.positions = &t_positions, select.indptr = &t_indptr;
  RUN(select, select);
  GET(positions, d_positions);
  GET(indptr, d_indptr);
  EXPECT(indptr[kHkv] == kHkv * kBudget);
  return 0;
}

/* begin and compact: what was chosen goes into pages. */
static int fill_pages(AdakvCache* cache, char* message) {
  const int64_t num_kept = kHkv * kBudget, longest = kPrompt;
  AdakvPageList list;
  TRY(adakv_cache_begin(cache, 0, 0, 1, &num_kept, &longest, &list));
  EXPECT(list.num_ids == adakv_pages_for(num_kept, 0, kHkv, kPage));
  EXPECT(adakv_cache_num_free(cache) == 40 - list.num_ids);
  Shape s_prompt = {{1, kHkv, kPrompt, kDim}}, s_positions = {{num_kept}};
  Shape s_indptr = {{kHkv + 1}}, s_ids = {{list.num_ids}}, s_page_indptr = {{2}};
  AdakvTensor t_keys = tensor(d_keys, 4, &s_prompt, 0),
              t_values = tensor(d_values, 4, &s_prompt, 0);
  AdakvTensor t_positions = tensor(d_positions, 1, &s_positions, 1);
  AdakvTensor t_indptr = tensor(d_indptr, 1, &s_indptr, 1);
  AdakvTensor t_ids = tensor(put(list.ids, list.num_ids * sizeof(int32_t)), 1, &s_ids, 1);
  AdakvTensor t_page_indptr = tensor(put(list.indptr, 2 * sizeof(int32_t)), 1, &s_page_indptr, 1);
  AdakvCompactArgs compact = adakv_compact_defaults();
  compact.keys = &t_keys, compact.values = &t_values, compact.positions = &t_positions;
  compact.indptr = &t_indptr, compact.page_ids = &t_ids, compact.page_indptr = &t_page_indptr;
  TRY(adakv_cache_layer(cache, 0, &compact.layer));
  RUN(compact, compact);
  return 0;
}

/* What q head q sees after `step`: what its row kept and the new tokens. */
static int compare(int q, int step, const float* query, const float* out, char* message) {
  const float *k[kPrompt + kSteps], *v[kPrompt + kSteps];
  const int h = q / (kHq / kHkv);
  int count = 0;
  for (int i = indptr[h]; i < indptr[h + 1]; ++i, ++count) {
    k[count] = keys + (h * kPrompt + positions[i]) * kDim;
    v[count] = values + (h * kPrompt + positions[i]) * kDim;
  }
  for (int s = 0; s <= step; ++s, ++count) {
    k[count] = new_keys[s] + h * kDim;
    v[count] = new_values[s] + h * kDim;
  }
  double expected[kDim];
  attention(query, k, v, count, expected);
  for (int d = 0; d < kDim; ++d) EXPECT(fabs(out[d] - expected[d]) < 1e-5);
  return 0;
}

/* grow, plan, append, attend; every other step appends and attends in one call. The others attend to
 * the same entries in a second tier, too: each counts twice, and the output is the same. */
static int decode(AdakvCache* cache, int step, uint32_t* state, char* message) {
  const int32_t one = 1;
  int32_t columns = 0;
  int64_t needed = -1;
  TRY(adakv_cache_pages_to_grow(cache, &one, &needed));
  const int32_t free_before = adakv_cache_num_free(cache);
  TRY(adakv_cache_grow(cache, &one, 1, at->stream, &columns));
  EXPECT(columns == 1 && free_before - adakv_cache_num_free(cache) == needed);

  float query[kHq * kDim], out[kHq * kDim];
  fill(query, kHq * kDim, state);
  Shape s_new = {{1, kHkv, 1, kDim}}, s_query = {{1, kHq, 1, kDim}};
  AdakvTensor t_query = tensor(put(query, sizeof query), 4, &s_query, 0);
  AdakvTensor t_out = tensor(put(NULL, sizeof out), 4, &s_query, 0);
  AdakvTensor t_keys = tensor(put(new_keys[step], sizeof new_keys[step]), 4, &s_new, 0);
  AdakvTensor t_values = tensor(put(new_values[step], sizeof new_values[step]), 4, &s_new, 0);
  AdakvAttendArgs attend = adakv_attend_defaults();
  AdakvPlanArgs plan = adakv_plan_defaults();
  TRY(adakv_cache_layer(cache, 0, &attend.layer));
  if (step % 2) {
    attend.keys = &t_keys, attend.values = &t_values;
  } else {
    AdakvAppendArgs append = adakv_append_defaults();
    append.keys = &t_keys, append.values = &t_values, append.layer = attend.layer;
    append.stream = at->stream;
    TRY(adakv_append(&append));
    plan.new_tokens = 0;
  }

  TRY(adakv_default_num_workers(t_query.device, &plan.num_workers));
  const int64_t size = adakv_schedule_size(kHkv, plan.num_workers);
  EXPECT(size * sizeof(int32_t) <= kScratch);
  Shape s_schedules = {{1, size}}, s_schedule = {{size}};
  AdakvTensor t_schedules = tensor(d_schedule, 2, &s_schedules, 1);
  AdakvTensor t_schedule = tensor(d_schedule, 1, &s_schedule, 1);
  AdakvLayer all;
  TRY(adakv_cache_all_layers(cache, &all));
  plan.lengths = all.lengths, plan.block_table = all.block_table;
  plan.fresh_pages = all.fresh_pages, plan.schedule = &t_schedules, plan.page_size = kPage;
  plan.stream = at->stream;
  TRY(adakv_plan(&plan));
  attend.queries = &t_query, attend.schedule = &t_schedule, attend.out = &t_out;
  attend.num_workers = plan.num_workers;
  const AdakvTier again = {attend.layer, &t_schedule, NULL, 0};
  attend.others.tiers = &again, attend.others.count = step % 2 ? 0 : 1;
  RUN(attend, attend);
  GET(out, t_out.data);
  for (int q = 0; q < kHq; ++q) {
    const int line = compare(q, step, query + q * kDim, out + q * kDim, message);
    if (line) return line;
  }
  return 0;
}

static int live(char* message) {
  uint32_t state = 1;
  fill(queries, kHq * kWindow * kDim, &state);
  fill(keys, kHkv * kPrompt * kDim, &state);
  fill(values, kHkv * kPrompt * kDim, &state);
  fill(w_o, kDim * kHq * kDim, &state);
  fill(new_keys[0], kSteps * kHkv * kDim, &state);
  fill(new_values[0], kSteps * kHkv * kDim, &state);
  d_keys = put(keys, sizeof keys), d_values = put(values, sizeof values);
  d_positions = put(NULL, sizeof positions), d_indptr = put(NULL, sizeof indptr);
  d_schedule = put(NULL, kScratch), scratch = put(NULL, kScratch);

  const AdakvCacheConfig config = small_config(at->device);
  const int others = at->live;
  const size_t bytes_of_others = at->bytes;
  AdakvCache* cache = NULL;
  TRY(adakv_cache_create(&config, &at->memory, at->stream, &cache));
  const int of_cache = at->live - others;
  EXPECT(of_cache >= 1);
  EXPECT(at->bytes - bytes_of_others >= 40 * adakv_cache_page_bytes(cache));
  int line = choose(message);
  if (!line) line = fill_pages(cache, message);
  const size_t used_by_all = used;
  for (int step = 0; step < kSteps && !line; ++step) {
    if (step == kSteps / 2) { /* a larger pool, longer rows, the same entries */
      TRY(adakv_cache_reserve(cache, 60, 2 * config.max_row_pages, at->stream));
      EXPECT(at->live == others + of_cache);
    }
    line = decode(cache, step, &state, message);
    used = used_by_all;
  }
  if (line) return line;

  int32_t pages = 0;
  TRY(adakv_cache_num_pages(cache, 0, 0, &pages));
  EXPECT(pages == 60 - adakv_cache_num_free(cache));
  TRY(adakv_cache_remove(cache, 0, at->stream));
  EXPECT(adakv_cache_num_free(cache) == 60);
  adakv_cache_destroy(cache);
  EXPECT(at->live == others);
  return 0;
}

int life_of_a_sequence_in_c(EmbedderDevice* device, char message[256]) {
  message[255] = 0;
  at = device;
  arena = at->memory.allocate(at->memory.context, kArena);
  used = 0;
  EXPECT(arena != NULL);
  const int line = live(message);
  at->memory.free(at->memory.context, arena);
  return line;
}

AdakvStatus cache_without_memory_in_c(void) {
  EmbedderDevice device;
  embedder_host(&device);
  device.memory.allocate = no_memory;
  const AdakvCacheConfig config = small_config(device.device);
  AdakvCache* cache = NULL;
  return adakv_cache_create(&config, &device.memory, NULL, &cache);
}
