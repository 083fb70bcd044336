// The parts of DLPack that we speak, declared from its public specification (dmlc/dlpack,
// version 1.2): tensors as plain structs, and the exchange API by which a framework converts its
// own tensor objects without Python calls.
#pragma once

#include <cstdint>

namespace adakv::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kFloat8 = 10 };  // e4m3fn

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ManagedTensor {
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  struct Header {
    Version version;
    Header* previous;
  } header;
  int (*allocate)(Tensor* prototype,
                  ManagedTensor** out,
                  void* error_ctx,
                  void (*set_error)(void* error_ctx, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*managed_to_object)(ManagedTensor* tensor, void** out_object);
  int (*tensor_from_object)(void* object, Tensor* out);  // optional: may be null
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

}  // namespace adakv::dlpack
