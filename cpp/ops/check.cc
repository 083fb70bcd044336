#include "ops/check.h"

#include <cctype>
#include <cstdlib>
#include <sstream>

namespace adakv {

void Checker::device(const char* name, const TensorView& view) {
  if (first_tensor_.empty()) {
    first_tensor_ = name;
    device_ = view.device;
  }
  require(view.device == device_, name, " must be on ", device_name(device_), " like ",
          first_tensor_, ", got ", device_name(view.device));
}

void Checker::shape(const char* name, const TensorView& view, const char* dims) {
  std::istringstream names(dims);
  std::string dim, wanted;
  bool fits = true;
  int i = 0;
  for (; names >> dim; ++i) {
    wanted += (i ? ", " : "") + dim;
    if (i >= view.rank) {
      fits = false;
      continue;
    }
    if (std::isdigit(static_cast<unsigned char>(dim[0]))) {
      fits = fits && view.shape[i] == std::atoll(dim.c_str());
    } else if (Dim* known = find(dim)) {
      fits = fits && view.shape[i] == known->size;
      wanted += " = " + std::to_string(known->size);
    } else if (fits && num_dims_ < static_cast<int>(sizeof(dims_) / sizeof(dims_[0]))) {
      dims_[num_dims_++] = {dim, view.shape[i]};
    }
  }
  require(fits && i == view.rank, name, " must be [", wanted, "], got ", view.shape_string());
  require(view.rank == 0 || view.shape[view.rank - 1] <= 1 || view.stride[view.rank - 1] == 1, name,
          " must be contiguous in its last dimension, got a stride of ",
          view.stride[view.rank - 1]);
}

void Checker::tensor(const char* name, const TensorView& view, const char* dims, DType dtype) {
  require(static_cast<bool>(view), name, " is missing");
  device(name, view);
  require(view.dtype == dtype, name, " must be ", dtype_name(dtype), ", got ",
          dtype_name(view.dtype));
  shape(name, view, dims);
}

void Checker::floats(const char* name, const TensorView& view, const char* dims) {
  require(static_cast<bool>(view), name, " is missing");
  require(view.dtype != DType::kInt32, name, " must be float32, float16 or bfloat16, got int32");
  if (first_float_.empty()) {
    first_float_ = name;
    float_dtype_ = view.dtype;
  }
  require(view.dtype == float_dtype_, name, " must be ", dtype_name(float_dtype_), " like ",
          first_float_, ", got ", dtype_name(view.dtype));
  device(name, view);
  shape(name, view, dims);
}

void Checker::workspace(const TensorView& view, size_t bytes) {
  if (bytes == 0) return;
  require(static_cast<bool>(view), "workspace is missing: ", bytes, " bytes are needed");
  device("workspace", view);
  require(view.size() * dtype_size(view.dtype) >= bytes, "workspace must have ", bytes,
          " bytes, got ", view.size() * dtype_size(view.dtype));
}

Checker::Dim* Checker::find(const std::string& name) {
  for (int i = 0; i < num_dims_; ++i) {
    if (dims_[i].name == name) return &dims_[i];
  }
  return nullptr;
}

int64_t Checker::size(const char* dim) const {
  for (int i = 0; i < num_dims_; ++i) {
    if (dims_[i].name == dim) return dims_[i].size;
  }
  return -1;
}

}  // namespace adakv
