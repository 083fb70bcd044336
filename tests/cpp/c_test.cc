// The C face: a life in C99 (embedder_c.c), and what it says of mistakes.
#include <adakv/c.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "embedder_c.h"

namespace {

AdakvTensor floats(float* data, int32_t ndim, int64_t* shape) {
  AdakvTensor tensor = {};
  tensor.data = data;
  tensor.device = {1, 0};
  tensor.ndim = ndim;
  tensor.dtype = {2, 32, 1};
  tensor.shape = shape;
  return tensor;
}

TEST(CFace, KeepsWhatMattersAndDecodesFromIt) {
  EmbedderDevice host;
  embedder_host(&host);
  char message[256] = "";
  const int line = life_of_a_sequence_in_c(&host, message);
  EXPECT_EQ(line, 0) << "embedder_c.c:" << line << ": " << message;
}

TEST(CFace, SaysWhatIsWrong) {
  EXPECT_EQ(adakv_score(nullptr), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(), "args must not be NULL");
  AdakvScoreArgs args = adakv_score_defaults();
  EXPECT_EQ(adakv_score(&args), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(), "score: queries is missing");

  float data[64];
  int64_t shape[5] = {1, 2, 4, 8, 1};
  AdakvTensor tensor = floats(data, 5, shape);
  args.queries = &tensor;
  EXPECT_EQ(adakv_score(&args), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(), "queries must have at most 4 dimensions, got 5");
  tensor.ndim = 4;
  tensor.dtype.bits = 64;
  EXPECT_EQ(adakv_score(&args), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(),
               "queries must be float32, float16, bfloat16 or int32, got code 2, 64 bits, 1 lanes");
  tensor.dtype.bits = 32;
  tensor.device.device_type = 10;
  EXPECT_EQ(adakv_score(&args), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(),
               "queries must be on the CPU (device_type 1) or CUDA (2), got device_type 10");
  tensor.device.device_type = 1;
  args.pool = static_cast<AdakvPool>(7);
  EXPECT_EQ(adakv_score(&args), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(), "pool must be 0 to 2, got 7");
}

TEST(CFace, ReadsStridesAndOffsets) {
  // [1, 2, 3] scores in a wider array that begins with something else.
  float data[1 + 2 * 5] = {9, 1, 2, 3, 9, 9, 6, 5, 4, 9, 9};
  int64_t shape[3] = {1, 2, 3}, strides[3] = {10, 5, 1}, two[1] = {2}, rows[2] = {1, 2},
          three[1] = {3};
  AdakvTensor scores = floats(data, 3, shape);
  scores.strides = strides;
  scores.byte_offset = sizeof(float);
  int32_t budgets[2] = {1, 1}, positions[2], indptr[3], scratch[256];
  const auto ints = [](int32_t* values, int32_t ndim, int64_t* sizes) {
    AdakvTensor tensor = floats(nullptr, ndim, sizes);
    tensor.data = values;
    tensor.dtype = {0, 32, 1};
    return tensor;
  };
  const AdakvTensor t_budgets = ints(budgets, 2, rows), t_positions = ints(positions, 1, two),
                    t_indptr = ints(indptr, 1, three);
  AdakvSelectArgs args = adakv_select_defaults();
  args.scores = &scores;
  args.budgets = &t_budgets;
  args.positions = &t_positions;
  args.indptr = &t_indptr;
  ASSERT_EQ(adakv_select_workspace(&args, &args.workspace_bytes), ADAKV_OK) << adakv_last_error();
  ASSERT_LE(args.workspace_bytes, sizeof scratch);
  args.workspace = scratch;
  ASSERT_EQ(adakv_select(&args), ADAKV_OK) << adakv_last_error();
  EXPECT_EQ(positions[0], 2);
  EXPECT_EQ(positions[1], 0);
}

TEST(CFace, KeepsErrorsApartByThread) {
  AdakvScoreArgs args = adakv_score_defaults();
  EXPECT_EQ(adakv_score(&args), ADAKV_INVALID_ARGUMENT);
  std::thread([] { EXPECT_STREQ(adakv_last_error(), ""); }).join();
  EXPECT_STREQ(adakv_last_error(), "score: queries is missing");
}

TEST(CFace, TellsWhatCannotBeDoneFromWhatIsWrong) {
  EXPECT_EQ(cache_without_memory_in_c(), ADAKV_ERROR);
  EXPECT_NE(std::string(adakv_last_error()).find("memory: allocate("), std::string::npos);
  AdakvCache* cache = nullptr;
  EXPECT_EQ(adakv_cache_create(nullptr, nullptr, nullptr, &cache), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(), "config must not be NULL");
  EXPECT_EQ(cache, nullptr);
  adakv_cache_destroy(cache);
  EXPECT_EQ(adakv_set_num_threads(0), ADAKV_INVALID_ARGUMENT);
}

TEST(CFace, CountsNothingOfWhatMakesNoSense) {
  EXPECT_EQ(adakv_cache_num_free(nullptr), -1);
  EXPECT_STREQ(adakv_last_error(), "cache must not be NULL");
  EXPECT_EQ(adakv_cache_page_bytes(nullptr), 0u);
  EXPECT_EQ(adakv_pages_for(20, 4, 2, 8), 2 + 2 + 2);
  EXPECT_EQ(adakv_pages_for(20, 4, 2, 0), -1);
  EXPECT_STREQ(adakv_last_error(),
               "pages_for: page_size must be a power of two from 8 to 256, got 0");
  EXPECT_EQ(adakv_pages_for(-1, 4, 2, 8), -1);
  EXPECT_EQ(adakv_pages_for(20, -1, 2, 8), -1);
  EXPECT_EQ(adakv_pages_for(20, INT64_MAX, 2, 8), -1);
  EXPECT_EQ(adakv_pages_for(20, 4, 0, 8), -1);
  EXPECT_GT(adakv_pages_for(INT64_MAX, 1, INT32_MAX, 8), 0);
  EXPECT_EQ(adakv_schedule_size(-1, 4), -1);
  EXPECT_EQ(adakv_schedule_size(4, 0), -1);
  EXPECT_EQ(adakv_set_num_threads(1 << 20), ADAKV_INVALID_ARGUMENT);
}

// A few small pages on the CPU.
static AdakvCacheConfig small_config(AdakvDataType dtype) {
  AdakvCacheConfig config = {};
  config.num_layers = config.num_sequences = config.num_kv_heads = 1;
  config.head_dim = 8;
  config.num_pages = 4;
  config.max_row_pages = 1;
  config.page_size = 8;
  config.dtype = dtype;
  config.device = {1, 0};
  return config;
}

// Arrays of the caller are read after what says how long they are: here they are too short.
TEST(CFace, BeginCountsBeforeItReads) {
  AdakvCacheConfig config = small_config({2, 32, 1});
  AdakvCache* cache = nullptr;
  ASSERT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_OK) << adakv_last_error();
  const std::unique_ptr<int64_t[]> one(new int64_t[1]{1});
  AdakvPageList pages = {};
  EXPECT_EQ(adakv_cache_begin(cache, 0, 0, INT32_MAX, one.get(), one.get(), &pages),
            ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(),
               "num_sequences must be 1 .. 1 from first_sequence = 0 on, got 2147483647");
  EXPECT_EQ(adakv_cache_begin(cache, 0, INT32_MAX, 1, one.get(), one.get(), &pages),
            ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(), "first_sequence must be 0 .. 0, got 2147483647");
  adakv_cache_destroy(cache);
}

TEST(CFace, BeginsAgainInAllLayers) {
  AdakvCacheConfig config = small_config({2, 32, 1});
  config.num_layers = 2;
  config.num_pages = 40;
  config.max_row_pages = 4;
  AdakvCache* cache = nullptr;
  ASSERT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_OK) << adakv_last_error();
  const int64_t held[2] = {30, 17}, longest = 20;
  AdakvPageList pages[2] = {};
  EXPECT_EQ(adakv_cache_begin_again(cache, 0, 1, held, &longest, pages), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(), "sequence 0 holds nothing in layer 0: begin() it first");
  for (int32_t layer : {0, 1}) {
    ASSERT_EQ(adakv_cache_begin(cache, layer, 0, 1, held, &longest, pages), ADAKV_OK);
  }
  const int64_t kept[2] = {16, 8};
  EXPECT_EQ(adakv_cache_begin_again(cache, 0, 2, kept, &longest, pages), ADAKV_INVALID_ARGUMENT);
  ASSERT_EQ(adakv_cache_begin_again(cache, 0, 1, kept, &longest, pages), ADAKV_OK);
  EXPECT_EQ(pages[0].num_ids, 2 + 2 * config.num_kv_heads);
  EXPECT_EQ(pages[1].num_ids, 1 + 2 * config.num_kv_heads);
  EXPECT_EQ(pages[1].indptr[1], pages[1].num_ids);
  adakv_cache_destroy(cache);
}

// Runs a verb with scratch memory of its own.
#define RUN(verb, args)                                                              \
  do {                                                                               \
    ASSERT_EQ(adakv_##verb##_workspace(&(args), &(args).workspace_bytes), ADAKV_OK); \
    std::vector<int32_t> scratch((args).workspace_bytes / sizeof(int32_t) + 1);      \
    (args).workspace = scratch.data();                                               \
    ASSERT_EQ(adakv_##verb(&(args)), ADAKV_OK) << adakv_last_error();                \
  } while (0)

// What a row holds is scored where it lies, and moves in place: every third of 20 entries leaves.
TEST(CFace, ChoosesFromWhatRowsHold) {
  constexpr int kHeld = 20, kDim = 8, kPage = 8, kWindow = 2;
  AdakvCacheConfig config = small_config({2, 32, 1});
  config.num_pages = 8;
  config.max_row_pages = 4;
  AdakvCache* cache = nullptr;
  ASSERT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_OK) << adakv_last_error();
  const auto ints = [](const void* values, int32_t ndim, int64_t* sizes) {
    AdakvTensor tensor = floats(nullptr, ndim, sizes);
    tensor.data = const_cast<void*>(values);
    tensor.dtype = {0, 32, 1};
    return tensor;
  };
  float keys[kHeld * kDim], values[kHeld * kDim];
  for (int i = 0; i < kHeld * kDim; ++i) keys[i] = float(i * 7 % 11) / 8, values[i] = float(i);
  int64_t prompt[4] = {1, 1, kHeld, kDim}, all[1] = {kHeld}, two[1] = {2}, num_ids[1];
  std::vector<int32_t> slots, indptr = {0, kHeld};
  for (int i = 0; i < kHeld; ++i) slots.push_back(i);
  const AdakvTensor t_keys = floats(keys, 4, prompt), t_values = floats(values, 4, prompt),
                    t_indptr = ints(indptr.data(), 1, two);

  // 1. The prompt comes into pages.
  const int64_t longest = kHeld;
  AdakvPageList list = {};
  AdakvCompactArgs compact = adakv_compact_defaults();
  ASSERT_EQ(adakv_cache_layer(cache, 0, &compact.layer), ADAKV_OK);
  ASSERT_EQ(adakv_cache_begin(cache, 0, 0, 1, all, &longest, &list), ADAKV_OK);
  AdakvTensor t_slots = ints(slots.data(), 1, all), t_ids = ints(list.ids, 1, num_ids),
              t_page_indptr = ints(list.indptr, 1, two);
  num_ids[0] = list.num_ids;
  compact.keys = &t_keys, compact.values = &t_values, compact.positions = &t_slots;
  compact.indptr = &t_indptr, compact.page_ids = &t_ids, compact.page_indptr = &t_page_indptr;
  RUN(compact, compact);

  // 2. Its scores are the same from there.
  float queries[kWindow * kDim], expected[kHeld], scores[kHeld];
  for (int i = 0; i < kWindow * kDim; ++i) queries[i] = float(i % 5) / 4;
  int64_t of_queries[4] = {1, 1, kWindow, kDim}, of_scores[3] = {1, 1, kHeld};
  const AdakvTensor t_queries = floats(queries, 4, of_queries);
  AdakvTensor t_scores = floats(expected, 3, of_scores);
  AdakvScoreArgs score = adakv_score_defaults();
  score.queries = &t_queries, score.keys = &t_keys, score.scores = &t_scores;
  RUN(score, score);
  score.keys = nullptr;
  EXPECT_EQ(adakv_score(&score), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(), "score: keys or a layer must be given");
  score.layer = compact.layer;
  t_scores.data = scores;
  RUN(score, score);
  for (int i = 0; i < kHeld; ++i) EXPECT_EQ(scores[i], expected[i]) << i;

  // 3. What stays goes to lower slots of the same pages, and a page is free again.
  slots.clear();
  for (int i = 0; i < kHeld; ++i) {
    if (i % 3) slots.push_back(i);
  }
  const int64_t num_kept = indptr[1] = static_cast<int32_t>(slots.size());
  const int32_t num_free = adakv_cache_num_free(cache);
  ASSERT_EQ(adakv_cache_begin_again(cache, 0, 1, &num_kept, &longest, &list), ADAKV_OK);
  EXPECT_EQ(adakv_cache_num_free(cache), num_free + 1);
  all[0] = num_kept, num_ids[0] = list.num_ids;
  t_slots.data = slots.data(), t_ids.data = const_cast<int32_t*>(list.ids);
  t_page_indptr.data = const_cast<int32_t*>(list.indptr);
  compact.keys = nullptr;
  EXPECT_EQ(adakv_compact(&compact), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(), "compact: keys and values must be given together");
  compact.values = nullptr;
  RUN(compact, compact);
  const AdakvLayer& layer = compact.layer;
  const auto* table = static_cast<const int32_t*>(layer.block_table->data);
  EXPECT_EQ(*static_cast<const int32_t*>(layer.lengths->data), num_kept);
  for (int i = 0; i < num_kept; ++i) {
    const int64_t slot = int64_t{table[i / kPage]} * kPage + i % kPage;
    EXPECT_EQ(static_cast<const int32_t*>(layer.page_positions->data)[slot], slots[i]);
    const auto* page =
        static_cast<const float*>(layer.pages->data) + int64_t{table[i / kPage]} * 2 * kPage * kDim;
    for (int d = 0; d < kDim; ++d) {
      EXPECT_EQ(page[i % kPage * kDim + d], keys[slots[i] * kDim + d]);
      EXPECT_EQ(page[(kPage + i % kPage) * kDim + d], values[slots[i] * kDim + d]);
    }
  }
  EXPECT_EQ(table[2], -1);
  adakv_cache_destroy(cache);
}

#undef RUN

TEST(CFace, QuantisedPagesHaveScales) {
  AdakvCacheConfig config = small_config({4, 16, 1});
  AdakvCache* cache = nullptr;
  AdakvLayer layer = {};
  ASSERT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_OK) << adakv_last_error();
  ASSERT_EQ(adakv_cache_layer(cache, 0, &layer), ADAKV_OK);
  EXPECT_EQ(layer.key_scales, nullptr);
  EXPECT_EQ(layer.value_scales, nullptr);
  EXPECT_EQ(layer.page_biases, nullptr);
  EXPECT_EQ(layer.value_pages, nullptr);
  const size_t page_bytes = adakv_cache_page_bytes(cache);
  adakv_cache_destroy(cache);
  config.has_biases = 1;
  ASSERT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_OK);
  ASSERT_EQ(adakv_cache_layer(cache, 0, &layer), ADAKV_OK);
  EXPECT_EQ(layer.page_biases->dtype.code, 2);
  EXPECT_EQ(layer.page_biases->dtype.bits, 16);
  EXPECT_EQ(layer.page_biases->shape[1], config.page_size);
  EXPECT_EQ(adakv_cache_page_bytes(cache), page_bytes + 2 * config.page_size);
  adakv_cache_destroy(cache);
  config.has_biases = 0;
  config.value_dim = config.head_dim + 8;
  ASSERT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_OK);
  ASSERT_EQ(adakv_cache_layer(cache, 0, &layer), ADAKV_OK);
  EXPECT_EQ(layer.pages->shape[1], 1);
  EXPECT_EQ(layer.value_pages->shape[3], config.value_dim);
  adakv_cache_destroy(cache);
  config.value_dim = 0;
  for (const AdakvPageFormat format : {ADAKV_INT8_PAGES, ADAKV_FP8_PAGES}) {
    config.format = format;
    ASSERT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_OK);
    ASSERT_EQ(adakv_cache_all_layers(cache, &layer), ADAKV_OK);
    EXPECT_EQ(layer.pages->dtype.code, format == ADAKV_INT8_PAGES ? 1 : 10);
    EXPECT_EQ(layer.pages->dtype.bits, 8);
    EXPECT_EQ(layer.key_scales->dtype.code, 4);
    EXPECT_EQ(layer.value_scales->shape[2], format == ADAKV_INT8_PAGES ? 2 : 1);
    adakv_cache_destroy(cache);
  }
  for (const AdakvPageFormat format : {ADAKV_INT4_PAGES, ADAKV_INT2_PAGES}) {
    config.format = format;
    config.page_size = 32;
    ASSERT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_OK);
    ASSERT_EQ(adakv_cache_layer(cache, 0, &layer), ADAKV_OK);
    EXPECT_EQ(layer.pages->shape[3] * (format == ADAKV_INT4_PAGES ? 2 : 4), config.head_dim);
    EXPECT_EQ(layer.key_scales->shape[2], config.head_dim);
    ASSERT_NE(layer.tails, nullptr);
    EXPECT_EQ(layer.tails->shape[2], 64);
    EXPECT_EQ(adakv_cache_tail_bytes(cache),
              2u * 64 * config.head_dim * config.num_kv_heads * config.num_layers);
    EXPECT_EQ(adakv_cache_bytes_used(cache), 0u);
    adakv_cache_destroy(cache);
  }
  const int wild = 7;
  std::memcpy(&config.format, &wild, sizeof wild);
  EXPECT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_INVALID_ARGUMENT);
  EXPECT_STREQ(adakv_last_error(), "config.format must be 0 to 4, got 7");
}

TEST(CFace, HasTheDefaultsOfCxx) {
  EXPECT_EQ(adakv_score_defaults().pool_width, 7);
  EXPECT_EQ(adakv_allocate_defaults().floor, 0.2);
  EXPECT_EQ(adakv_select_defaults().first, 0.5);
  EXPECT_EQ(adakv_select_defaults().eps, 1e-4f);
  EXPECT_EQ(adakv_plan_defaults().new_tokens, 1);
  EXPECT_EQ(adakv_plan_defaults().page_size, 16);
}

}  // namespace
