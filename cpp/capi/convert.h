// What both halves of the C face use: pointers become views, exceptions a status and a text.
#pragma once

#include <cstring>
#include <exception>

#include "adakv/adakv.h"
#include "adakv/c.h"
#include "ops/members.h"

namespace adakv::capi {

/// Device types and type codes of DLPack (dmlc/dlpack, version 1).
enum DeviceCode : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kFloat8 = 10 };

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

/// The enumerator of C++ for one of C, whose enumerations have the same values in the same order. C may
/// pass any integer, which C++ must not read as an enumerator before it is checked.
template <typename Enum, typename Given>
Enum enumerator(const char* name, const Given& given) {
  constexpr int kLast = static_cast<int>(kWords<Enum>.size()) - 1;
  int value;
  static_assert(sizeof(value) == sizeof(given));
  std::memcpy(&value, &given, sizeof(value));
  ADAKV_CHECK(value >= 0 && value <= kLast, name, " must be 0 to ", kLast, ", got ", value);
  return static_cast<Enum>(value);
}

/// Devices, dtypes and tensors as the rest of the library has them. Throw InvalidArgument for what
/// it doesn't have. NULL is the view of a tensor that was not given.
Device device_of(const char* name, AdakvDevice device);
DType dtype_of(const char* name, AdakvDataType dtype);
TensorView view_of(const char* name, const AdakvTensor* tensor);

/// The cache behind a pointer of C.
KVCache& cache_of(const AdakvCache* cache);

/// A view as C sees it; `shape` and `strides` [4] receive its sizes.
AdakvTensor tensor_of(const TensorView& view, int64_t* shape, int64_t* strides);

}  // namespace adakv::capi
