// Where adakv's verbs run. The model computes in host memory. On the CPU the verbs work on its own
// arrays; on a GPU what they read is copied there and what the model reads is copied back, in the
// order of one stream. Nothing else in this runtime knows of devices.
#pragma once

#include <adakv/adakv.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace embed {

class Place {
 public:
  /// "cpu", or "cuda" for the first GPU. Throws std::runtime_error for what can't be used.
  explicit Place(const std::string& name);
  ~Place();
  Place(const Place&) = delete;

  adakv::Device device() const { return device_; }
  adakv::Memory& memory() const { return adakv::device_memory(device_); }
  adakv::Stream stream() const { return stream_; }
  bool is_host() const { return device_.type == adakv::DeviceType::kCpu; }

  /// Copies to the host, after everything that was put into the stream; waits for it.
  void read(void* host, const void* data, size_t bytes) const;

  /// The elements of a contiguous int32 tensor.
  std::vector<int32_t> read(const adakv::TensorView& tensor) const;

 private:
  adakv::Device device_;
  adakv::Stream stream_ = nullptr;
};

/// An array that verbs can reach. `place` must outlive it.
template <typename T>
class Array {
 public:
  explicit Array(const Place& place) : place_(place) {}
  ~Array() { place_.memory().free(data_); }
  Array(const Array&) = delete;

  /// Room for `size` elements. Zeros where it has to grow; what it held is lost then.
  T* room(size_t size) {
    if (size > size_) {
      place_.memory().free(data_);
      data_ = nullptr, size_ = 0;
      const size_t bytes = size * sizeof(T);
      data_ = static_cast<T*>(place_.memory().allocate(bytes));
      size_ = size;
      place_.memory().fill_rows(data_, bytes, 0, bytes, 1, place_.stream());
    }
    return data_;
  }

  /// For a verb to read: `host` itself where it can, else a copy. Verbs don't write what they read,
  /// but a TensorView has no const.
  T* input(const T* host, size_t size) {
    if (place_.is_host()) return const_cast<T*>(host);
    T* data = room(size);
    place_.memory().copy_from_host(data, host, size * sizeof(T), place_.stream());
    return data;
  }

  /// For a verb to write: `host` itself where it can, else room for what finish() copies there.
  T* output(T* host, size_t size) { return place_.is_host() ? host : room(size); }
  void finish(T* host, size_t size) const {
    if (!place_.is_host()) place_.read(host, data_, size * sizeof(T));
  }

 private:
  const Place& place_;
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace embed
