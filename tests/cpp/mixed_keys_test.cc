#include <gtest/gtest.h>

#include "adakv/error.h"
#include "adakv/kv_cache.h"

namespace adakv {
namespace {

CacheConfig config_of(PageFormat format) {
  CacheConfig config;
  config.num_layers = 2;
  config.num_sequences = config.num_kv_heads = 1;
  config.num_pages = 400;
  config.max_row_pages = 40;
  config.format = format;
  config.dtype = DType::kFloat16;
  config.head_dim = 80;
  config.page_size = 32;
  return config;
}

TEST(MixedKeys, HaveAWidthOfTheirOwn) {
  CacheConfig config = config_of(PageFormat::kInt4);
  config.key_dims = {4, 64};
  const KVCache cache(config, device_memory({}));
  const LayerView layer = cache.layer(1);
  EXPECT_EQ(layer.format(), PageFormat::kInt4);
  EXPECT_EQ(layer.pages.shape_string(), "[400, 1, 32, 30]");  // 8, 12 / 2 and 64 / 4 bytes
  EXPECT_EQ(layer.value_pages.shape_string(), "[400, 1, 32, 40]");
  EXPECT_EQ(layer.key_scales.shape_string(), "[400, 2, 76]");
  EXPECT_EQ(layer.key_dims().in_16, 4);
  EXPECT_EQ(layer.key_dims().in_2, 64);
  EXPECT_EQ(cache.page_bytes(), 32u * (30 + 40) + 4u * 76 + 32u * 4 * 2 + 32u * 4);
  for (const KeyDims wrong : {KeyDims{2, 64}, KeyDims{4, 60}, KeyDims{80, 0}, KeyDims{4, 80},
                              KeyDims{-4, 0}, KeyDims{0, -8}}) {
    config.key_dims = wrong;
    EXPECT_THROW(KVCache(config, device_memory({})), InvalidArgument);
  }
  config.key_dims = {4, 64};
  config.format = PageFormat::kInt8;
  EXPECT_THROW(KVCache(config, device_memory({})), InvalidArgument);
}

TEST(Int2Pages, HaveAQuarterOfAByteForEachNumber) {
  CacheConfig config = config_of(PageFormat::kInt2);
  const KVCache cache(config, device_memory({}));
  const LayerView layer = cache.layer(1);
  EXPECT_EQ(layer.format(), PageFormat::kInt2);
  EXPECT_EQ(layer.key_dims().in_2, 80);
  EXPECT_EQ(layer.pages.shape_string(), "[400, 2, 32, 20]");
  EXPECT_FALSE(layer.value_pages);
  EXPECT_EQ(layer.key_scales.shape_string(), "[400, 2, 80]");
  EXPECT_EQ(layer.value_scales.shape_string(), "[400, 32, 6]");  // of 3 groups of 32 dimensions
  EXPECT_EQ(cache.page_bytes(), 32u * 40 + 4u * 80 + 32u * 6 * 2 + 32u * 4);
  EXPECT_EQ(cache.tail_bytes(), 2u * 64 * 80 * 2);
  config.key_dims = {0, 8};
  EXPECT_THROW(KVCache(config, device_memory({})), InvalidArgument);
  config = config_of(PageFormat::kInt2);
  config.page_size = 16;
  EXPECT_THROW(KVCache(config, device_memory({})), InvalidArgument);
}

}  // namespace
}  // namespace adakv
