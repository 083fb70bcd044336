#include "capi/convert.h"

#include <algorithm>
#include <cstdint>
#include <string>

namespace adakv::capi {
namespace {

thread_local std::string g_last_error;

}  // namespace

AdakvStatus failed(AdakvStatus status, const char* message) noexcept {
  try {
    g_last_error = message;
  } catch (...) {
    g_last_error.clear();  // no memory for the text
  }
  return status;
}

Device device_of(const char* name, AdakvDevice device) {
  ADAKV_CHECK(device.device_type == kCpu || device.device_type == kCuda, name,
              " must be on the CPU (device_type 1) or CUDA (2), got device_type ",
              static_cast<int>(device.device_type));
  if (device.device_type == kCpu) return {};
  return {DeviceType::kCuda, device.device_id};
}

DType dtype_of(const char* name, AdakvDataType dtype) {
  const auto is = [&](int code, int bits) {
    return dtype.lanes == 1 && dtype.code == code && dtype.bits == bits;
  };
  if (is(kFloat, 32)) return DType::kFloat32;
  if (is(kFloat, 16)) return DType::kFloat16;
  if (is(kBFloat, 16)) return DType::kBFloat16;
  if (is(kUInt, 8)) return DType::kUInt8;
  if (is(kFloat8, 8)) return DType::kFloat8;
  ADAKV_CHECK(is(kInt, 32), name, " must be float32, float16, bfloat16 or int32, got code ",
              int{dtype.code}, ", ", int{dtype.bits}, " bits, ", int{dtype.lanes}, " lanes");
  return DType::kInt32;
}

TensorView view_of(const char* name, const AdakvTensor* tensor) {
  TensorView view;
  if (tensor == nullptr) return view;
  ADAKV_CHECK(tensor->ndim >= 0 && tensor->ndim <= TensorView::kMaxRank, name,
              " must have at most ", TensorView::kMaxRank, " dimensions, got ",
              static_cast<int>(tensor->ndim));
  ADAKV_CHECK(tensor->ndim == 0 || tensor->shape != nullptr, name, ": shape must not be NULL");
  view.device = device_of(name, tensor->device);
  view.dtype = dtype_of(name, tensor->dtype);
  view.rank = tensor->ndim;
  std::copy_n(tensor->shape, view.rank, view.shape);
  if (tensor->strides != nullptr) {
    std::copy_n(tensor->strides, view.rank, view.stride);
  } else {
    view.make_contiguous();
  }
  if (tensor->data != nullptr) {
    const auto address = reinterpret_cast<uintptr_t>(tensor->data) + tensor->byte_offset;
    view.data = reinterpret_cast<void*>(address);
  }
  return view;
}

static TypeCode code_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kFloat16:
      return kFloat;
    case DType::kBFloat16:
      return kBFloat;
    case DType::kInt32:
      return kInt;
    case DType::kUInt8:
      return kUInt;
    case DType::kFloat8:
      return kFloat8;
  }
  return kInt;
}

AdakvTensor tensor_of(const TensorView& view, int64_t* shape, int64_t* strides) {
  for (int i = 0; i < view.rank; ++i) {
    shape[i] = view.shape[i];
    strides[i] = view.stride[i];
  }
  AdakvTensor tensor = {};
  tensor.data = view.data;
  tensor.device = {view.device.type == DeviceType::kCpu ? kCpu : kCuda, view.device.index};
  tensor.ndim = view.rank;
  tensor.dtype.code = code_of(view.dtype);
  tensor.dtype.bits = static_cast<uint8_t>(8 * dtype_size(view.dtype));
  tensor.dtype.lanes = 1;
  tensor.shape = shape;
  tensor.strides = strides;
  return tensor;
}

}  // namespace adakv::capi

const char* adakv_last_error(void) {
  return adakv::capi::g_last_error.c_str();
}

const char* adakv_version(void) {
  return ADAKV_VERSION;
}
