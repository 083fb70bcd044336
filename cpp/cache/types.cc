#include "adakv/types.h"

#include "adakv/error.h"

namespace adakv {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kUInt8:
      return "uint8";
    case DType::kFloat8:
      return "float8_e4m3fn";
  }
  return "?";
}

std::string device_name(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

TensorView::TensorView(void* data, std::initializer_list<int64_t> shape, DType dtype, Device device)
    : data(data), rank(static_cast<int32_t>(shape.size())), dtype(dtype), device(device) {
  ADAKV_CHECK(rank <= kMaxRank, "TensorView: at most ", kMaxRank, " dimensions, got ", rank);
  int i = 0;
  for (int64_t n : shape) this->shape[i++] = n;
  make_contiguous();
}

void TensorView::make_contiguous() {
  uint64_t step = 1;  // may wrap: verbs refuse such sizes
  for (int i = rank - 1; i >= 0; --i) {
    stride[i] = static_cast<int64_t>(step);
    step *= static_cast<uint64_t>(shape[i]);
  }
}

TensorView TensorView::narrow(int dim, int64_t begin, int64_t count) const {
  ADAKV_CHECK(dim >= 0 && dim < rank && begin >= 0 && count >= 0 && begin <= shape[dim] &&
                  count <= shape[dim] - begin,
              "narrow: ", count, " from ", begin, " on do not lie in dimension ", dim, " of ",
              shape_string());
  TensorView part = *this;
  part.shape[dim] = count;
  if (data) part.data = ptr<char>() + begin * stride[dim] * static_cast<int64_t>(dtype_size(dtype));
  return part;
}

TensorView TensorView::select(int64_t index) const {
  TensorView part = narrow(0, index, 1);
  for (int i = 1; i < rank; ++i) {
    part.shape[i - 1] = shape[i];
    part.stride[i - 1] = stride[i];
  }
  --part.rank;
  return part;
}

std::string TensorView::shape_string() const {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace adakv
