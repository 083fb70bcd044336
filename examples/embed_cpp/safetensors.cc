// The format: 8 bytes little-endian, the length of a JSON head; the head, which says of each tensor
// its dtype, shape and [begin, end) behind the head; then the data.
#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>

#include "json.h"

namespace embed {
namespace {

std::string shape_string(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

}  // namespace

SafeTensors::SafeTensors(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY);
  struct stat info;
  if (file < 0 || fstat(file, &info) != 0) throw std::runtime_error(path + " can't be read");
  map_bytes_ = info.st_size;
  map_ = mmap(nullptr, map_bytes_, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (map_ == MAP_FAILED) throw std::runtime_error(path + " can't be mapped");
  const char* begin = static_cast<const char*>(map_);
  uint64_t head_bytes = 0;
  if (map_bytes_ >= 8) std::memcpy(&head_bytes, begin, 8);
  if (map_bytes_ < 8 || head_bytes > map_bytes_ - 8) {
    throw std::runtime_error(path + " is no safetensors file");
  }
  const char* data = begin + 8 + head_bytes;
  const size_t data_bytes = map_bytes_ - 8 - head_bytes;
  for (const auto& [name, entry] : Json::parse({begin + 8, head_bytes}).object) {
    if (name == "__metadata__") continue;
    const Json& offsets = entry["data_offsets"];
    if (entry["dtype"].string != "F32" || offsets.array.size() != 2) {
      throw std::runtime_error(path + ": " + name + " must be F32, got " + entry["dtype"].string);
    }
    Weight weight;
    size_t size = sizeof(float);
    for (const Json& n : entry["shape"].array) {
      weight.shape.push_back(static_cast<int64_t>(n.as_number(name)));
      size *= weight.shape.back();
    }
    const size_t from = static_cast<size_t>(offsets.array[0].as_number(name));
    if (from > data_bytes || size > data_bytes - from ||
        reinterpret_cast<size_t>(data + from) % 4) {
      throw std::runtime_error(path + ": " + name + " lies outside of the file");
    }
    weight.data = reinterpret_cast<const float*>(data + from);
    weights_[name] = weight;
    bytes_ += size;
  }
}

SafeTensors::~SafeTensors() {
  munmap(map_, map_bytes_);
}

const float* SafeTensors::get(const std::string& name, const std::vector<int64_t>& shape) const {
  const auto found = weights_.find(name);
  if (found == weights_.end()) throw std::runtime_error("no tensor " + name);
  if (found->second.shape != shape) {
    throw std::runtime_error(name + " must be " + shape_string(shape) + ", got " +
                             shape_string(found->second.shape));
  }
  return found->second.data;
}

}  // namespace embed
