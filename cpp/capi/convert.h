// What both halves of the C face use: pointers become views, exceptions a status and a text.
#pragma once

#include <exception>

#include "adakv/adakv.h"
#include "adakv/c.h"

namespace adakv::capi {

/// Device types and type codes of DLPack (dmlc/dlpack, version 1).
enum DeviceCode : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4 };

/// Keeps the text for adakv_last_error() and gives `status` back.
AdakvStatus failed(AdakvStatus status, const char* message) noexcept;

/// Runs `body`, whose exceptions become a status: none may reach C.
template <typename Body>
AdakvStatus guarded(const Body& body) noexcept {
  try {
    body();
    return ADAKV_OK;
  } catch (const InvalidArgument& error) {
    return failed(ADAKV_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return failed(ADAKV_ERROR, error.what());
  } catch (...) {
    return failed(ADAKV_ERROR, "unknown error");
  }
}

/// What a pointer points to. Throws InvalidArgument for NULL.
template <typename T>
T& given(const char* name, T* pointer) {
  ADAKV_CHECK(pointer != nullptr, name, " must not be NULL");
  return *pointer;
}

/// Devices, dtypes and tensors as the rest of the library has them. Throw InvalidArgument for what
/// it doesn't have. NULL is the view of a tensor that was not given.
Device device_of(const char* name, AdakvDevice device);
DType dtype_of(const char* name, AdakvDataType dtype);
TensorView view_of(const char* name, const AdakvTensor* tensor);

/// A view as C sees it; `shape` and `strides` [4] receive its sizes.
AdakvTensor tensor_of(const TensorView& view, int64_t* shape, int64_t* strides);

}  // namespace adakv::capi
