// The types that every other header speaks in: element types, devices and views of tensors.
//
// A TensorView owns nothing. It is a pointer, a shape and strides (in elements), as any framework
// can give them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#pragma GCC visibility push(default)  // what a shared adakv shows
namespace adakv {

/// Element type of a tensor.
enum class DType : uint8_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt32,
  kUInt8,
  kFloat8,  // e4m3fn: no infinities, up to 448
};

/// Size of one element in bytes.
constexpr size_t dtype_size(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kInt32  ? 4
         : dtype == DType::kUInt8 || dtype == DType::kFloat8 ? 1
                                                             : 2;
}

/// "float32", "float16", "bfloat16", "int32", "uint8" or "float8_e4m3fn".
const char* dtype_name(DType dtype);

/// What a device is: each has a backend of its own.
enum class DeviceType : uint8_t { kCpu, kCuda };

/// Where memory lives. The CPU is always index 0.
struct Device {
  DeviceType type = DeviceType::kCpu;  // the kind
  int32_t index = 0;                   // which of them, as CUDA counts

  /// The same device.
  friend bool operator==(Device a, Device b) { return a.type == b.type && a.index == b.index; }
  /// Another device.
  friend bool operator!=(Device a, Device b) { return !(a == b); }
};

/// "cpu" or "cuda:0".
std::string device_name(Device device);

/// A cudaStream_t for CUDA tensors; ignored for CPU tensors. nullptr is the default stream.
using Stream = void*;

/// A tensor that somebody else owns.
struct TensorView {
  static constexpr int kMaxRank = 4;  // most dimensions

  void* data = nullptr;           // first element; aligned to its size; null only if empty
  int64_t shape[kMaxRank] = {};   // sizes, each below 2^31
  int64_t stride[kMaxRank] = {};  // in elements
  int32_t rank = -1;              // -1: no tensor was given (for optional arguments)
  DType dtype = DType::kFloat32;  // of the elements
  Device device = {};             // where the elements lie

  /// No tensor.
  TensorView() = default;

  /// A contiguous tensor.
  TensorView(void* data, std::initializer_list<int64_t> shape, DType dtype, Device device = {});

  /// True if a tensor was given at all, be it an empty one.
  explicit operator bool() const { return rank >= 0; }

  /// Number of elements; for sizes that int64 can't count, any number.
  int64_t size() const {
    uint64_t n = rank < 0 ? 0 : 1;
    for (int i = 0; i < rank; ++i) n *= static_cast<uint64_t>(shape[i]);
    return static_cast<int64_t>(n);
  }

  /// Bytes of its elements.
  size_t bytes() const { return static_cast<size_t>(size()) * dtype_size(dtype); }

  /// Sets the strides of a contiguous tensor.
  void make_contiguous();

  /// Pointer to the first element; the caller vouches for the type.
  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data);
  }

  /// The part [begin, begin + count) along dimension `dim`.
  TensorView narrow(int dim, int64_t begin, int64_t count) const;

  /// Element `index` along the first dimension: one dimension less.
  TensorView select(int64_t index) const;

  /// "[2, 8, 512, 128]", for messages.
  std::string shape_string() const;
};

}  // namespace adakv
#pragma GCC visibility pop
