// Caches in files: what is loaded is what was saved, in pages of any size, and what isn't right is
// refused; in C++ and in C. Random damage is in tests/fuzz/cache_file.cc.
#include <adakv/adakv.h>
#include <adakv/c.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

#include "cache/crc32.h"
#include "cache/scanner.h"
#include "layer.h"
#include "saved_cache.h"
#include "tensors.h"

namespace adakv {
namespace {

std::string bytes_of_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// A file of this process alone, as CTest runs tests side by side; it goes with this.
struct TempFile {
  const std::string path;

  explicit TempFile(const char* name)
      : path(testing::TempDir() + "adakv_" + std::to_string(getpid()) + "_" + name + ".kv") {}
  TempFile(const TempFile&) = delete;
  ~TempFile() { std::remove(path.c_str()); }
};

// What it says when something is refused.
template <typename Body>
std::string refusal(const Body& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing was refused";
}

uint32_t crc32_bit_by_bit(const std::string& text) {
  uint32_t rest = ~0u;
  for (const char c : text) {
    rest ^= static_cast<unsigned char>(c);
    for (int i = 0; i < 8; ++i) rest = (rest >> 1) ^ (rest & 1 ? 0xEDB88320u : 0);
  }
  return ~rest;
}

TEST(Crc32, IsThatOfEveryBit) {
  EXPECT_EQ(crc32("123456789", 9), 0xCBF43926u);
  std::mt19937 random(0);
  std::string text;
  for (int i = 0; i < 300; ++i, text += static_cast<char>(random())) {
    ASSERT_EQ(crc32(text.data(), text.size()), crc32_bit_by_bit(text)) << i;
    const size_t half = random() % (text.size() + 1);
    const uint32_t before = crc32(text.data(), half);
    ASSERT_EQ(crc32(text.data() + half, text.size() - half, before), crc32_bit_by_bit(text));
  }
}

TEST(Scanner, ReadsWhatItWritesAndAllEscapes) {
  const std::string text = "a \"quoted\" \\ text,\n\x01 é 漢 \xF0\x9F\x98\x80";
  EXPECT_EQ(Scanner(json_string(text)).string(), text);
  EXPECT_EQ(Scanner("\"\\u00e9\\u6F22\\uD83D\\uDE00\\/\\b\\f\\n\\r\\t\"").string(),
            "é漢\xF0\x9F\x98\x80/\b\f\n\r\t");
  EXPECT_EQ(Scanner(" 9007199254740992").count(), int64_t{1} << 53);
}

TEST(Scanner, RefusesWhatIsNoJson) {
  for (const char* text :
       {"", "\"", "\"\\", "\"\\x\"", "\"\\u12\"", "\"\\uD83D\"", "\"\\uDE00\\uD83D\"", "\"a\nb\"",
        "\"\xFF\"", "\"\xC0\x80\"", "\"\xED\xA0\x80\"", "\"\xF5\x80\x80\x80\"", "\"\xE6\x9C\""}) {
    EXPECT_THROW(Scanner(text).string(), Error) << text;
  }
  for (const char* text : {"", "-1", "01", "1e99", "99999999999999999999", "x"}) {
    EXPECT_THROW(
        {
          Scanner scanner(text);
          scanner.count();
          scanner.end();
        },
        Error)
        << text;
  }
}

/// A format, and the width of values beside keys of Saved::kDim.
struct Kind {
  PageFormat format;
  int32_t value_dim = Saved::kDim;
};

class CacheFileOf : public testing::TestWithParam<Kind> {};

TEST_P(CacheFileOf, HoldsWhatTheCacheDid) {
  const TempFile temp("whole"), temp_again("again");
  const std::string &path = temp.path, &again = temp_again.path;
  const auto [format, value_dim] = GetParam();
  const Saved saved(format, value_dim);
  save_cache(path, saved.cache, {{"model", "a\"b\\é"}}, {{"scores.0", saved.beside.view}});
  const CacheFile file(path);
  EXPECT_EQ(file.texts().at("model"), "a\"b\\é");
  EXPECT_EQ(file.seen(), (std::vector<int32_t>{90, 70}));
  ASSERT_EQ(file.others(), std::vector<std::string>{"scores.0"});
  EXPECT_EQ(std::memcmp(file.other("scores.0").data, saved.beside.view.data, 12), 0);
  for (const int page_size : {0, 8, 64}) {
    if (facts_of(format).has_tails && page_size != 0) continue;
    CacheConfig config = file.config(5, page_size);
    EXPECT_EQ(config.value_dim, value_dim);
    config.num_sequences = 4, config.num_pages += 200;
    KVCache cache(config, device_memory({}));
    file.load(cache, 1);
    EXPECT_EQ(cache.layer(1).seen.ptr<int32_t>()[2], 70);
    EXPECT_THROW(save_cache(again, cache, {}), InvalidArgument);  // sequence 0 holds nothing
    const Fork loaded = cache.fork({1, 2}, {}, true);
    fill_fork(cache, loaded);
    save_cache(again, *loaded.cache, {{"model", "a\"b\\é"}}, {{"scores.0", saved.beside.view}});
    EXPECT_EQ(bytes_of_file(again), bytes_of_file(path)) << page_size;
    EXPECT_EQ(cache.grow({0, 1, 1, 0}, 1), 1);
    if (format != PageFormat::kPlain || value_dim != Saved::kDim) continue;
    for (int h = 0; h < 2; ++h) {
      const auto got = entries_of(cache.layer(1), 2, h),
                 had = entries_of(saved.cache.layer(1), 1, h);
      ASSERT_EQ(got.size(), had.size());
      for (size_t i = 0; i < had.size(); ++i) {
        EXPECT_EQ(got[i].position, had[i].position);
        EXPECT_EQ(got[i].key, had[i].key);
        EXPECT_EQ(got[i].value, had[i].value);
      }
    }
  }
}

TEST_P(CacheFileOf, RefusesEveryBitThatWasChanged) {
  const TempFile temp("changed");
  const std::string& path = temp.path;
  const Saved saved(GetParam().format, GetParam().value_dim);
  save_cache(path, saved.cache, {{"model", "m"}});
  const std::string whole = bytes_of_file(path);
  const auto load = [&](const std::string& bytes) {
    const CacheFile file(bytes.data(), bytes.size());
    KVCache cache(file.config(0), device_memory({}));
    const int32_t free = cache.pool().num_free();
    try {
      file.load(cache);
    } catch (...) {
      EXPECT_EQ(cache.pool().num_free(), free);
      EXPECT_EQ(cache.layer(0).lengths.ptr<int32_t>()[0], 0);
      throw;
    }
  };
  load(whole);
  std::mt19937 random(0);
  for (int i = 0; i < 300; ++i) {
    std::string changed = whole;
    changed[random() % whole.size()] ^= static_cast<char>(1 << random() % 8);
    EXPECT_THROW(load(changed), Error);
    EXPECT_THROW(load(whole.substr(0, random() % whole.size())), Error);
  }
  EXPECT_THROW(load(whole + "more"), Error);
}

INSTANTIATE_TEST_SUITE_P(Formats,
                         CacheFileOf,
                         testing::Values(Kind{PageFormat::kPlain},
                                         Kind{PageFormat::kInt8},
                                         Kind{PageFormat::kFp8},
                                         Kind{PageFormat::kInt4},
                                         Kind{PageFormat::kInt2},
                                         Kind{PageFormat::kPlain, 8},
                                         Kind{PageFormat::kInt8, 72}));

TEST(CacheFile, SaysWhatIsWrong) {
  const TempFile temp("wrong");
  const std::string& path = temp.path;
  Saved saved(PageFormat::kPlain);
  EXPECT_EQ(refusal([&] { save_cache(path, saved.cache, {{"seen", "[]"}}); }),
            "save_cache: texts must not have seen");
  EXPECT_EQ(refusal([&] { save_cache(path, saved.cache, {{"a", "\xFF"}}); }),
            "save_cache: texts must be UTF-8");
  EXPECT_EQ(
      refusal([&] { save_cache(path, saved.cache, {}, {{"layers.0.x", saved.beside.view}}); }),
      "save_cache: others must not have \"layers.0.x\"");
  EXPECT_EQ(refusal([&] { save_cache("/no/such/folder", saved.cache, {}); }),
            "/no/such/folder can't be written: No such file or directory");
  EXPECT_EQ(refusal([&] { CacheFile("/no/such/file"); }),
            "/no/such/file can't be read: No such file or directory");
  EXPECT_EQ(refusal([&] { CacheFile("/"); }), "/ can't be read: it is no file");
  save_cache(path, saved.cache, {});
  const CacheFile file(path);
  EXPECT_EQ(refusal([&] { file.load(saved.cache); }), "load: sequence 0 holds entries already");
  EXPECT_EQ(refusal([&] { file.load(saved.cache, 1); }),
            "load: first_sequence must be 0 .. 0 for 2 sequences, got 1");
  EXPECT_EQ(refusal([&] { file.other("x"); }), path + " has no tensor x");
  CacheConfig config = file.config(0);
  config.dtype = DType::kFloat32;
  KVCache other(config, device_memory({}));
  EXPECT_EQ(
      refusal([&] { file.load(other); }),
      "load: the cache must have 2 layers of 2 kv heads of 16 bfloat16, auto, got 2 layers of 2 "
      "kv heads of 16 float32, auto");
  config = file.config(0);
  config.value_dim = 8;
  KVCache narrow(config, device_memory({}));
  EXPECT_EQ(refusal([&] { file.load(narrow); }),
            "load: the cache must have 2 layers of 2 kv heads of 16 bfloat16, auto, got 2 layers "
            "of 2 kv heads of 16 and 8 bfloat16, auto");
  config = file.config(0);
  config.num_pages -= 1;
  KVCache small(config, device_memory({}));
  EXPECT_THROW(file.load(small), Error);
  EXPECT_EQ(small.pool().num_used(), 0);
}

TEST(CFace, SavesAndLoads) {
  const TempFile temp("c"), temp_again("c_again");
  const std::string &path = temp.path, &again = temp_again.path;
  const Saved saved(PageFormat::kInt8);
  save_cache(path, saved.cache, {{"model", "m"}}, {{"x", saved.beside.view}});
  AdakvCacheFile* file = nullptr;
  ASSERT_EQ(adakv_cache_file_open("/no/such/file", &file), ADAKV_ERROR);
  ASSERT_EQ(adakv_cache_file_open(path.c_str(), &file), ADAKV_OK) << adakv_last_error();
  EXPECT_STREQ(adakv_cache_file_text(file, "model"), "m");
  EXPECT_EQ(adakv_cache_file_text(file, "none"), nullptr);
  EXPECT_EQ(adakv_cache_file_seen(file)[1], 70);
  AdakvCacheConfig config = {};
  ASSERT_EQ(adakv_cache_file_config(file, 10, 0, &config), ADAKV_OK);
  EXPECT_EQ(config.format, ADAKV_INT8_PAGES);
  EXPECT_EQ(config.dtype.code, 4);
  EXPECT_EQ(config.page_size, 32);
  AdakvCache* cache = nullptr;
  ASSERT_EQ(adakv_cache_create(&config, nullptr, nullptr, &cache), ADAKV_OK);
  ASSERT_EQ(adakv_cache_load(cache, file, 0, nullptr), ADAKV_OK) << adakv_last_error();
  const AdakvTensor* other = nullptr;
  ASSERT_EQ(adakv_cache_file_other(file, "x", &other), ADAKV_OK);
  EXPECT_EQ(other->shape[0], 3);
  const AdakvText text = {"model", "m"};
  const AdakvNamedTensor beside = {"x", other};
  ASSERT_EQ(adakv_cache_save(cache, again.c_str(), &text, 1, &beside, 1, nullptr), ADAKV_OK)
      << adakv_last_error();
  EXPECT_EQ(bytes_of_file(again), bytes_of_file(path));
  adakv_cache_file_close(file);
  const std::string bytes = bytes_of_file(path);
  ASSERT_EQ(adakv_cache_file_from_memory(bytes.data(), bytes.size(), &file), ADAKV_OK);
  EXPECT_EQ(adakv_cache_load(cache, file, 0, nullptr), ADAKV_INVALID_ARGUMENT);
  adakv_cache_file_close(file);
  adakv_cache_destroy(cache);
}

}  // namespace
}  // namespace adakv
