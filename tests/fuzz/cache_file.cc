// Files that were damaged, with sums that fit and without: either they are refused, or what they hold
// is a cache like any other.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "adakv/adakv.h"
#include "cache/crc32.h"
#include "input.h"
#include "saved_cache.h"

namespace adakv::fuzz {
namespace {

/// A format, and the width of values beside keys of Saved::kDim.
constexpr std::pair<PageFormat, int32_t> kKinds[] = {{PageFormat::kPlain, Saved::kDim},
                                                     {PageFormat::kInt8, Saved::kDim},
                                                     {PageFormat::kFp8, Saved::kDim},
                                                     {PageFormat::kInt4, Saved::kDim},
                                                     {PageFormat::kInt2, Saved::kDim},
                                                     {PageFormat::kPlain, 8},
                                                     {PageFormat::kInt8, 72}};

// Files as they are written, of each kind, with something beside them.
const std::vector<std::string>& whole_files() {
  static const std::vector<std::string> files = [] {
    std::vector<std::string> files;
    for (const auto& [format, value_dim] : kKinds) {
      const Saved saved(format, value_dim);
      const std::string path = "/tmp/adakv_fuzz_" + std::to_string(getpid()) + ".kv";
      save_cache(path, saved.cache, {{"model", "a"}}, {{"scores.0", saved.beside.view}});
      std::ifstream file(path, std::ios::binary);
      files.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
      std::remove(path.c_str());
    }
    return files;
  }();
  return files;
}

// Writes the sums that fit, if it is a file of tensors that has a place for them.
void correct_sums(std::string& bytes) {
  try {
    const SafeTensors file(bytes.data(), bytes.size());
    const TensorView sums = file.tensor("checksums");
    if (!sums || sums.size() == 0 || sums.dtype != DType::kInt32) return;
    std::vector<std::pair<size_t, size_t>> parts;
    for (const auto& [name, view] : file.tensors()) {
      const auto begin = static_cast<size_t>(static_cast<const char*>(view.data) - bytes.data());
      if (name != "checksums") parts.emplace_back(begin, view.size() * dtype_size(view.dtype));
    }
    std::sort(parts.begin(), parts.end());
    std::vector<uint32_t> right = {crc32(file.head().data(), file.head().size())};
    for (const auto& [begin, size] : parts) right.push_back(crc32(&bytes[begin], size));
    right.resize(static_cast<size_t>(sums.size()));
    std::memcpy(sums.data, right.data(), right.size() * 4);
  } catch (const Error&) {
  }
}

// What may be in a file instead.
std::string piece(Input& input, const std::string& bytes) {
  constexpr const char* kPieces[] = {"0",    "2147483647", "9007199254740992",
                                     "-1",   "[]",         "{}",
                                     "\"",   "\\u0000",    "auto",
                                     "int4", "fp8",        "I32",
                                     "BF16", "float32",    "\\uD800",
                                     ",",    "}",          "layers.1.keys"};
  if (input.one_in(3)) return kPieces[input.range(0, std::size(kPieces) - 1)];
  if (input.one_in(3)) {
    const size_t from = input.word() % bytes.size();
    return bytes.substr(from, input.range(0, 40));
  }
  std::string text;
  for (int i = input.range(0, 8); i > 0; --i) text += static_cast<char>(input.byte());
  return text;
}

std::string damaged(Input& input) {
  std::string bytes = whole_files()[input.range(0, std::size(kKinds) - 1)];
  const size_t head = SafeTensors(bytes.data(), bytes.size()).head().size();
  for (int i = input.range(0, 5); i > 0; --i) {
    const size_t most = input.one_in(3) ? bytes.size() : std::min(head, bytes.size());
    const size_t at = input.word() % most;
    const std::string text = piece(input, bytes);
    bytes.replace(at, input.one_in(2) ? text.size() : size_t(input.range(0, 20)), text);
  }
  if (input.one_in(4)) {  // a head of another length has its length before it
    const size_t end = bytes.find("}}");
    if (end != bytes.npos) {
      const size_t size = std::min(bytes.size(), (end + 2 + 7) / 8 * 8) - 8;
      for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(size >> (8 * i) & 255);
    }
  }
  if (!input.one_in(3)) correct_sums(bytes);
  return bytes;
}

// Reads all that a loaded cache holds, and goes on with it.
void use(KVCache& cache, const CacheFile& file) {
  const CacheConfig& c = cache.config();
  for (int32_t l = 0; l < c.num_layers; ++l) {
    const LayerView layer = cache.layer(l);
    for (int64_t r = 0; r < int64_t{c.num_sequences} * c.num_kv_heads; ++r) {
      const int32_t length = layer.lengths.ptr<int32_t>()[r];
      ADAKV_FUZZ_ASSERT(length >= 0 && length <= file.seen()[r / c.num_kv_heads]);
      int32_t last = -1;
      for (int32_t i = 0; i < length; ++i) {
        const int32_t page =
            layer.block_table.ptr<int32_t>()[r * layer.block_table.shape[2] + i / c.page_size];
        ADAKV_FUZZ_ASSERT(page >= 0 && page < c.num_pages);
        const int32_t position =
            layer.page_positions
                .ptr<int32_t>()[page * layer.page_positions.stride[0] + i % c.page_size];
        ADAKV_FUZZ_ASSERT(position > last);
        last = position;
      }
    }
  }
  cache.grow(std::vector<int32_t>(c.num_sequences, 1), 1);
  for (int32_t b = 0; b < c.num_sequences; ++b) cache.remove(b);
  ADAKV_FUZZ_ASSERT(cache.pool().num_used() == 0);
}

void open_and_load(const std::string& bytes, int32_t page_size) {
  try {
    const CacheFile file(bytes.data(), bytes.size());
    for (const std::string& name : file.others()) {
      try {
        file.other(name);
      } catch (const Error&) {
      }
    }
    const CacheConfig config = file.config(3, file.config(0).page_size == 16 ? page_size : 0);
    KVCache cache(config, device_memory({}));
    try {
      file.load(cache);
    } catch (const Error&) {
      ADAKV_FUZZ_ASSERT(cache.pool().num_used() == 0);
      return;
    }
    use(cache, file);
  } catch (const Error&) {
  } catch (const InvalidArgument&) {
  }
}

}  // namespace
}  // namespace adakv::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  adakv::fuzz::Input input(data, size);
  if (input.one_in(16)) {
    adakv::fuzz::open_and_load({reinterpret_cast<const char*>(data), size}, 16);
  } else {
    const std::string bytes = adakv::fuzz::damaged(input);
    adakv::fuzz::open_and_load(bytes, 8 << input.range(0, 5));
  }
  return 0;
}
