// Writing a cache's file: the head, whose sizes follow from the lengths alone, then tensor by tensor.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "adakv/cache_file.h"
#include "adakv/error.h"
#include "cache/crc32.h"
#include "cache/file_dtypes.h"
#include "cache/file_parts.h"
#include "cache/scanner.h"

namespace adakv {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;
constexpr size_t kStretchBytes = size_t{8} << 20;  // that the disk begins with at once

/// A file that has its name only when it is whole.
class NewFile {
 public:
  explicit NewFile(const std::string& path) : path_(path), part_(path + ".part") {
    file_ = open(part_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (file_ < 0) fail();
  }

  ~NewFile() {
    if (file_ >= 0) close(file_);
    if (!part_.empty()) unlink(part_.c_str());
  }
  NewFile(const NewFile&) = delete;

  void write(size_t place, const void* data, size_t bytes) {
    for (const auto* from = static_cast<const char*>(data); bytes > 0;) {
      const ssize_t done = pwrite(file_, from, bytes, static_cast<off_t>(place));
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) fail();
      from += done, place += done, bytes -= done;
    }
    begin_to_store(place);
  }

  void finish() {
    const int closed = close(std::exchange(file_, -1));
    if (closed != 0 || std::rename(part_.c_str(), path_.c_str()) != 0) fail();
    part_.clear();
  }

 private:
  /// Has the disk take what was written up to `end` while more is being made, not after all of it.
  void begin_to_store(size_t end) {
#if defined(__linux__)
    if (end < begun_ + kStretchBytes) return;
    // If it can't, the file is as good.
    (void)sync_file_range(file_, static_cast<off_t>(begun_), static_cast<off_t>(end - begun_),
                          SYNC_FILE_RANGE_WRITE);
    begun_ = end;
#else
    (void)end;
#endif
  }

  [[noreturn]] void fail() const {
    throw Error(path_ + " can't be written: " + std::strerror(errno));
  }

  std::string path_, part_;
  int file_ = -1;
  size_t begun_ = 0;  // the disk has begun with what is before this
};

struct FileTensor {
  std::string name;
  TensorView view;     // data only of those that the caller gave
  int32_t layer = -1;  // of the others
  size_t place = 0;    // behind the head
  size_t bytes() const { return view.bytes(); }
};

std::vector<int32_t> numbers_of(const KVCache& cache, const TensorView& view, Stream stream) {
  std::vector<int32_t> numbers(view.size());
  cache.memory().copy_rows_to_host(numbers.data(), view.data, numbers.size() * 4,
                                   numbers.size() * 4, 1, stream);
  return numbers;
}

template <typename Numbers>
std::string list(const Numbers& numbers) {
  std::string text;
  for (const auto number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "[" + text + "]";
}

// Strides of dimensions of size 1 say nothing.
bool is_contiguous(const TensorView& view) {
  TensorView contiguous = view;
  contiguous.make_contiguous();
  bool result = true;
  for (int i = 0; i < view.rank; ++i) {
    result &= view.shape[i] == 1 || view.stride[i] == contiguous.stride[i];
  }
  return result || view.size() == 0;
}

class Writer {
 public:
  Writer(const KVCache& cache, Stream stream)
      : cache_(cache),
        config_(cache.config()),
        stream_(stream),
        lengths_(numbers_of(cache, cache.all_layers().lengths, stream)),
        seen_(numbers_of(cache, cache.all_layers().seen, stream)),
        num_rows_(int64_t{config_.num_sequences} * config_.num_kv_heads) {
    for (int32_t l = 0; l < config_.num_layers; ++l) {
      for (int32_t b = 0; b < config_.num_sequences; ++b) {
        const int32_t seen = seen_[l * config_.num_sequences + b];
        ADAKV_CHECK(cache.num_pages(l, b) > 0 && seen > 0 && seen == seen_[b],
                    "save_cache: sequence ", b, " holds nothing in layer ", l);
      }
    }
    seen_.resize(config_.num_sequences);  // the same in every layer
  }

  void write(const std::string& path,
             std::map<std::string, std::string> texts,
             const std::map<std::string, TensorView>& others) {
    describe(texts);
    list_tensors(others);
    const std::string head = head_of(texts);
    NewFile file(path);
    file.write(0, head.data(), head.size());
    std::vector<uint32_t> sums = {crc32(head.data(), head.size())};
    size_t place_of_sums = 0;
    for (const FileTensor& tensor : tensors_) {
      const size_t place = head.size() + tensor.place;
      if (tensor.name == "checksums") {
        place_of_sums = place;
      } else if (tensor.layer >= 0) {
        sums.push_back(write_layer(file, place, tensor));
      } else {
        file.write(place, tensor.view.data, tensor.bytes());
        sums.push_back(crc32(tensor.view.data, tensor.bytes()));
      }
    }
    file.write(place_of_sums, sums.data(), sums.size() * sizeof(uint32_t));
    file.finish();
  }

 private:
  void describe(std::map<std::string, std::string>& texts) const {
    const CacheConfig& c = config_;
    std::vector<int32_t> shape = {c.num_layers, c.num_sequences, c.num_kv_heads, c.head_dim};
    ADAKV_CHECK(!c.key_dims.are_mixed(), "save_cache: a file has keys of one format, got ",
                c.key_dims.in_16, " dimensions in 16 bits and ", c.key_dims.in_2, " in 2");
    if (c.value_dim != c.head_dim) shape.push_back(c.value_dim);
    const std::pair<const char*, std::string> own[] = {{"kind", kFileKind},
                                                       {"version", kFileVersion},
                                                       {"dtype", dtype_name(c.dtype)},
                                                       {"kv_dtype", facts_of(c.format).name},
                                                       {"shape", list(shape)},
                                                       {"seen", list(seen_)}};
    for (const auto& [name, text] : texts) {
      ADAKV_CHECK(is_utf8(name) && is_utf8(text), "save_cache: texts must be UTF-8");
    }
    for (const auto& [name, text] : own) {
      ADAKV_CHECK(texts.emplace(name, text).second, "save_cache: texts must not have ", name);
    }
  }

  // Those of larger elements first, so that all are aligned.
  void list_tensors(const std::map<std::string, TensorView>& others) {
    const CacheConfig& c = config_;
    tensors_.push_back(
        {"lengths",
         {lengths_.data(), {c.num_layers, c.num_sequences, c.num_kv_heads}, DType::kInt32}});
    for (int32_t l = 0; l < c.num_layers; ++l) {
      for (FilePart& part : parts(l)) {
        if (part.file_offset == 0 && tensors_.back().name != part.name) {
          tensors_.push_back({part.name, part.tensor, l});
        }
      }
    }
    for (const auto& [name, view] : others) {
      ADAKV_CHECK(!is_files_own(name) && name != "__metadata__" && is_utf8(name),
                  "save_cache: others must not have ", json_string(name));
      ADAKV_CHECK(view.rank >= 0 && view.device == Device{} && (view.data || view.size() == 0),
                  "save_cache: ", name, " must be a tensor in host memory");
      ADAKV_CHECK(is_contiguous(view), "save_cache: ", name, " must be contiguous");
      tensors_.push_back({name, view});
    }
    tensors_.push_back({"checksums", {nullptr, {int64_t(tensors_.size()) + 1}, DType::kInt32}});
    std::stable_sort(tensors_.begin(), tensors_.end(), [](const auto& a, const auto& b) {
      return dtype_size(a.view.dtype) > dtype_size(b.view.dtype);
    });
    size_t place = 0;
    for (FileTensor& tensor : tensors_) {
      tensor.place = place;
      place += tensor.bytes();
    }
  }

  std::string head_of(const std::map<std::string, std::string>& texts) const {
    std::string json;
    for (const auto& [name, text] : texts) {
      json += (json.empty() ? "" : ",") + json_string(name) + ":" + json_string(text);
    }
    json = "{\"__metadata__\":{" + json + "}";
    for (const FileTensor& tensor : tensors_) {
      const int64_t* shape = tensor.view.shape;
      json += "," + json_string(tensor.name) + ":{\"dtype\":\"";
      json += file_dtype(tensor.view.dtype);
      json += "\",\"shape\":" + list(std::vector<int64_t>(shape, shape + tensor.view.rank));
      json += ",\"data_offsets\":" +
              list(std::initializer_list<size_t>{tensor.place, tensor.place + tensor.bytes()}) +
              "}";
    }
    json += "}";
    json.resize((json.size() + 7) / 8 * 8, ' ');
    std::string head;
    for (int i = 0; i < 8; ++i) head += static_cast<char>(json.size() >> (8 * i) & 255);
    return head + json;
  }

  std::vector<FilePart> parts(int32_t layer) const {
    return parts_of(config_, layer, lengths_.data() + layer * num_rows_, num_rows_);
  }

  // A tensor of a layer, from its pages; its sum.
  uint32_t write_layer(NewFile& file, size_t place, const FileTensor& tensor) {
    if (tensor.layer != layer_) read_tables(tensor.layer);
    uint32_t sum = 0;
    size_t filled = 0;
    const auto flush = [&] {
      file.write(place, buffer_.data(), filled);
      sum = crc32(buffer_.data(), filled, sum);
      place += filled, filled = 0;
    };
    const FileRows rows = {lengths_.data() + layer_ * num_rows_, tables_.data(), num_rows_,
                           columns_, 0};
    for (const FilePart& part : parts(layer_)) {
      if (part.name != tensor.name) continue;
      for_each_piece(part, cache_.layer(layer_), rows, config_.page_size,
                     [&](const char* from, int64_t pitch, int64_t row_bytes, int64_t count) {
                       while (count > 0) {
                         const int64_t room = (buffer_.size() - filled) / row_bytes;
                         const int64_t now = std::min(count, room);
                         if (now > 0) {
                           cache_.memory().copy_rows_to_host(&buffer_[filled], from, pitch,
                                                             row_bytes, now, stream_);
                         } else {
                           flush();
                         }
                         filled += now * row_bytes, from += now * pitch, count -= now;
                       }
                     });
    }
    flush();
    return sum;
  }

  // The pages of a layer's rows.
  void read_tables(int32_t layer) {
    layer_ = layer;
    const int32_t* lengths = lengths_.data() + layer * num_rows_;
    const int32_t longest = *std::max_element(lengths, lengths + num_rows_);
    columns_ = (longest + config_.page_size - 1) / config_.page_size;
    tables_.resize(num_rows_ * columns_);
    const TensorView& table = cache_.layer(layer).block_table;
    if (columns_ == 0) return;
    cache_.memory().copy_rows_to_host(tables_.data(), table.data, table.stride[1] * 4, columns_ * 4,
                                      num_rows_, stream_);
  }

  const KVCache& cache_;
  const CacheConfig& config_;
  Stream stream_;
  std::vector<int32_t> lengths_, seen_;  // [L, B, Hkv], [B]
  int64_t num_rows_;                     // of a layer
  std::vector<FileTensor> tensors_;      // as they lie in the file
  int32_t layer_ = -1;                   // of the tables
  int64_t columns_ = 0;
  std::vector<int32_t> tables_;  // [B * Hkv, columns]
  std::vector<char> buffer_ = std::vector<char>(kBufferBytes);
};

}  // namespace

void save_cache(const std::string& path,
                const KVCache& cache,
                const std::map<std::string, std::string>& texts,
                const std::map<std::string, TensorView>& others,
                Stream stream) {
  Writer(cache, stream).write(path, texts, others);
}

}  // namespace adakv
