#include "ops/check.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

namespace adakv {

void Checker::device(const char* name, const TensorView& view) {
  if (!first_tensor_) {
    first_tensor_ = name;
    device_ = view.device;
  }
  require(view.device == device_, name, " must be on ", device_name(device_), " like ",
          first_tensor_, ", got ", device_name(view.device));
}

// What holds of every tensor: sizes that int32 can count, steps that int64 can, and memory behind
// them.
void Checker::memory(const char* name, const TensorView& view) const {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  require(view.rank <= TensorView::kMaxRank, name, " must have at most ", TensorView::kMaxRank,
          " dimensions, got ", view.rank);
  constexpr int64_t kMostElements = int64_t{1} << 47;  // what addresses of 48 bits reach
  int64_t elements = 1;
  bool is_empty = false;
  for (int i = 0; i < view.rank; ++i) {
    require(view.shape[i] >= 0 && view.shape[i] <= kMost, name, ": sizes must lie in 0 .. ", kMost,
            ", got ", view.shape_string());
    is_empty = is_empty || view.shape[i] == 0;
    const int64_t size = std::max<int64_t>(view.shape[i], 1), stride = view.stride[i];
    require(elements <= kMostElements / size, name, " must have at most 2^47 elements, got ",
            view.shape_string());
    elements *= size;
    const int64_t farthest = kMostElements / std::max<int64_t>(size - 1, 1);
    require(size == 1 || (stride >= -farthest && stride <= farthest), name,
            ": strides must stay within 2^47 elements, got ", stride, " in dimension ", i, " of ",
            view.shape_string());
  }
  const size_t element_bytes = dtype_size(view.dtype);
  require(is_empty || view.data != nullptr, name, " ", view.shape_string(),
          " must have memory, got a null pointer");
  require(is_empty || reinterpret_cast<uintptr_t>(view.data) % element_bytes == 0, name,
          " must be aligned to its elements of ", element_bytes, " bytes, got ", view.data);
}

// Takes the next name off a list like "B Hkv T D"; empty at its end.
static std::string_view next_dim(std::string_view& dims) {
  const size_t begin = std::min(dims.find_first_not_of(' '), dims.size());
  const size_t end = std::min(dims.find(' ', begin), dims.size());
  const std::string_view dim = dims.substr(begin, end - begin);
  dims.remove_prefix(end);
  return dim;
}

static bool is_number(std::string_view dim) {
  return dim.size() == 1 && dim[0] >= '0' && dim[0] <= '9';
}

void Checker::shape(const char* name, const TensorView& view, std::string_view dims) {
  memory(name, view);
  const int num_known = num_dims_;
  bool fits = true;
  int i = 0;
  std::string_view rest = dims;
  for (std::string_view dim = next_dim(rest); !dim.empty(); dim = next_dim(rest), ++i) {
    if (i >= view.rank) {
      fits = false;
    } else if (is_number(dim)) {
      fits = fits && view.shape[i] == dim[0] - '0';
    } else if (const Dim* known = find(dim)) {
      fits = fits && view.shape[i] == known->size;
    } else {
      dims_[num_dims_++] = {dim, view.shape[i]};
    }
  }
  if (!fits || i != view.rank) {
    num_dims_ = num_known;
    throw_shape(name, view, dims);
  }
  require(view.rank == 0 || view.shape[view.rank - 1] <= 1 || view.stride[view.rank - 1] == 1, name,
          " must be contiguous in its last dimension, got a stride of ",
          view.stride[view.rank - 1]);
}

void Checker::throw_shape(const char* name, const TensorView& view, std::string_view dims) const {
  std::string wanted;
  for (std::string_view dim = next_dim(dims); !dim.empty(); dim = next_dim(dims)) {
    wanted += (wanted.empty() ? "" : ", ") + std::string(dim);
    if (const Dim* known = find(dim)) wanted += " = " + std::to_string(known->size);
  }
  throw InvalidArgument(
      detail::concat(verb_, ": ", name, " must be [", wanted, "], got ", view.shape_string()));
}

void Checker::tensor(const char* name, const TensorView& view, std::string_view dims, DType dtype) {
  require(static_cast<bool>(view), name, " is missing");
  device(name, view);
  require(view.dtype == dtype, name, " must be ", dtype_name(dtype), ", got ",
          dtype_name(view.dtype));
  shape(name, view, dims);
}

void Checker::floats(const char* name, const TensorView& view, std::string_view dims) {
  require(static_cast<bool>(view), name, " is missing");
  require(view.dtype < DType::kInt32, name, " must be float32, float16 or bfloat16, got ",
          dtype_name(view.dtype));
  if (!first_float_) {
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
  require(view.dtype == DType::kInt32 && view.rank == 1 && view.stride[0] == 1 && view.data,
          "workspace must be a contiguous int32 tensor of one dimension");
  aligned("workspace", view);
  const int64_t ints = static_cast<int64_t>((bytes + 3) / 4);
  require(view.shape[0] >= ints, "workspace must have ", ints, " elements, got ", view.shape[0]);
}

void Checker::aligned(const char* name, const TensorView& view) const {
  require(reinterpret_cast<uintptr_t>(view.data) % kAlignment == 0, name, " must be aligned to ",
          kAlignment, " bytes, got ", view.data);
}

const Checker::Dim* Checker::find(std::string_view name) const {
  for (int i = 0; i < num_dims_; ++i) {
    if (dims_[i].name == name) return &dims_[i];
  }
  return nullptr;
}

int64_t Checker::size(std::string_view dim) const {
  const Dim* known = find(dim);
  return known ? known->size : -1;
}

}  // namespace adakv
