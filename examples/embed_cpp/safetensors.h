// A model.safetensors file, mapped: weights stay in the file's pages and are never copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace embed {

/// A float32 tensor in the file; rows one behind the other.
struct Weight {
  const float* data = nullptr;
  std::vector<int64_t> shape;
};

class SafeTensors {
 public:
  /// Throws std::runtime_error if the file can't be read or isn't what it should be.
  explicit SafeTensors(const std::string& path);
  ~SafeTensors();
  SafeTensors(const SafeTensors&) = delete;
  SafeTensors& operator=(const SafeTensors&) = delete;

  /// A tensor of that name and shape. Throws std::runtime_error if there is none.
  const float* get(const std::string& name, const std::vector<int64_t>& shape) const;

  bool has(const std::string& name) const { return weights_.count(name) > 0; }

  /// Bytes of all tensors.
  size_t bytes() const { return bytes_; }

 private:
  void* map_ = nullptr;
  size_t map_bytes_ = 0, bytes_ = 0;
  std::map<std::string, Weight> weights_;
};

}  // namespace embed
