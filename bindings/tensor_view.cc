#include "tensor_view.h"

#include <cstring>
#include <string>

#include "adakv/error.h"

namespace adakv {
namespace {

// torch.Tensor's table; looked up once.
const dlpack::ExchangeApi& exchange_api() {
  static const dlpack::ExchangeApi* api = [] {
    const py::object type = py::module_::import("torch").attr("Tensor");
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    if (capsule.is_none())
      throw Error("adakv needs torch >= 2.10 (its Tensor has no DLPack exchange API)");
    void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!table) throw py::error_already_set();
    return static_cast<const dlpack::ExchangeApi*>(table);
  }();
  return *api;
}

bool is_tensor(py::handle object) {
  static PyTypeObject* const type = reinterpret_cast<PyTypeObject*>(
      py::object(py::module_::import("torch").attr("Tensor")).release().ptr());
  return PyObject_TypeCheck(object.ptr(), type);
}

bool to_dtype(const dlpack::DataType& from, DType& to) {
  if (from.lanes != 1) return false;
  if (from.code == dlpack::kFloat && from.bits == 32)
    to = DType::kFloat32;
  else if (from.code == dlpack::kFloat && from.bits == 16)
    to = DType::kFloat16;
  else if (from.code == dlpack::kBFloat && from.bits == 16)
    to = DType::kBFloat16;
  else if (from.code == dlpack::kInt && from.bits == 32)
    to = DType::kInt32;
  else if (from.code == dlpack::kUInt && from.bits == 8)
    to = DType::kUInt8;
  else if (from.code == dlpack::kFloat8 && from.bits == 8)
    to = DType::kFloat8;
  else
    return false;
  return true;
}

dlpack::DataType from_dtype(DType dtype) {
  const uint8_t bits = static_cast<uint8_t>(8 * dtype_size(dtype));
  const uint8_t code = dtype == DType::kInt32      ? dlpack::kInt
                       : dtype == DType::kUInt8    ? dlpack::kUInt
                       : dtype == DType::kFloat8   ? dlpack::kFloat8
                       : dtype == DType::kBFloat16 ? dlpack::kBFloat
                                                   : dlpack::kFloat;
  return {code, bits, 1};
}

dlpack::Device from_device(Device device) {
  return {device.type == DeviceType::kCpu ? dlpack::kCpu : dlpack::kCuda, device.index};
}

}  // namespace

std::string description(py::handle object) {
  const bool is_short = object.is_none() || PyFloat_Check(object.ptr()) ||
                        PyBool_Check(object.ptr()) || PyUnicode_Check(object.ptr());
  if (!is_short) return py::str(py::type::of(object));
  const std::string text = py::repr(object);
  return text.size() <= 40 ? text : text.substr(0, 37) + "...";
}

Device named_device(const char* type, int32_t index) {
  if (std::strcmp(type, "cpu") == 0) return {};
  ADAKV_CHECK(std::strcmp(type, "cuda") == 0, "device must be cpu or cuda, got ", type);
  return {DeviceType::kCuda, index};
}

TensorView view_of(const char* name, py::handle object) {
  TensorView view;
  if (object.is_none()) return view;
  ADAKV_CHECK(is_tensor(object), name, " must be a torch.Tensor, got ", description(object));
  dlpack::Tensor tensor;
  const bool is_packed = exchange_api().tensor_from_object(object.ptr(), &tensor) == 0;
  if (!is_packed) PyErr_Clear();
  if (!is_packed || (tensor.device.type != dlpack::kCpu && tensor.device.type != dlpack::kCuda)) {
    const auto what = [&](const char* attribute) -> std::string {
      return py::str(object.attr(attribute));
    };
    throw InvalidArgument(detail::concat(name, " must be a dense tensor on the CPU or CUDA, got ",
                                         what("layout"), ", ", what("dtype"), " on ",
                                         what("device")));
  }
  ADAKV_CHECK(to_dtype(tensor.dtype, view.dtype), name,
              " must be float32, float16, bfloat16 or int32, got ",
              std::string(py::str(object.attr("dtype"))));
  ADAKV_CHECK(tensor.ndim <= TensorView::kMaxRank, name, " must have at most ",
              TensorView::kMaxRank, " dimensions, got ", tensor.ndim);
  const bool is_cuda = tensor.device.type == dlpack::kCuda;
  view.device = {is_cuda ? DeviceType::kCuda : DeviceType::kCpu, is_cuda ? tensor.device.id : 0};
  view.rank = tensor.ndim;
  for (int i = 0; i < tensor.ndim; ++i) {
    view.shape[i] = tensor.shape[i];
    view.stride[i] = tensor.strides[i];
  }
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return view;
}

void check_signs(const char* name, py::handle tensor) {
  static PyObject* const is_neg =
      py::object(py::module_::import("torch").attr("Tensor").attr("is_neg")).release().ptr();
  const auto is_negated =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg, tensor.ptr()));
  if (!is_negated) throw py::error_already_set();
  ADAKV_CHECK(is_negated.ptr() == Py_False, name,
              " must not have torch's negative bit, give its resolve_neg()");
}

py::object tensor_of(const TensorView& view, std::shared_ptr<const void> owner) {
  if (!view) return py::none();
  struct Holder {
    dlpack::ManagedTensor managed;
    int64_t shape[TensorView::kMaxRank], strides[TensorView::kMaxRank];
    std::shared_ptr<const void> owner;
  };
  auto* holder = new Holder{};
  for (int i = 0; i < view.rank; ++i) {
    holder->shape[i] = view.shape[i];
    holder->strides[i] = view.stride[i];
  }
  holder->owner = std::move(owner);
  dlpack::ManagedTensor& managed = holder->managed;
  managed.version = {1, 2};
  managed.manager_ctx = holder;
  managed.deleter = [](dlpack::ManagedTensor* self) {
    delete static_cast<Holder*>(self->manager_ctx);
  };
  managed.tensor = {view.data,     from_device(view.device), view.rank, from_dtype(view.dtype),
                    holder->shape, holder->strides,          0};
  void* object = nullptr;
  if (exchange_api().managed_to_object(&managed, &object) != 0) {
    delete holder;
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

Stream current_stream(Device device) {
  if (device.type == DeviceType::kCpu) return nullptr;
  void* stream = nullptr;
  if (exchange_api().current_stream(dlpack::kCuda, device.index, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

Workspace::Workspace(size_t bytes, Device device) : device_(device) {
  if (bytes == 0) return;
  int64_t count = static_cast<int64_t>((bytes + 3) / 4);
  dlpack::Tensor prototype = {
      nullptr, from_device(device), 1, from_dtype(DType::kInt32), &count, nullptr, 0};
  std::string message;
  const auto set_error = [](void* text, const char*, const char* what) {
    *static_cast<std::string*>(text) = what;
  };
  if (exchange_api().allocate(&prototype, &tensor_, &message, set_error) != 0) {
    throw Error("no scratch memory: " + message);
  }
}

Workspace::~Workspace() {
  if (tensor_) tensor_->deleter(tensor_);
}

TensorView Workspace::view() const {
  if (!tensor_) return {};
  const dlpack::Tensor& tensor = tensor_->tensor;
  return TensorView(static_cast<char*>(tensor.data) + tensor.byte_offset, {tensor.shape[0]},
                    DType::kInt32, device_);
}

}  // namespace adakv
