// Checks of a verb's tensors. Messages read "<verb>: <argument> must be [B, Hkv, T, D], got [2, 8,
// 512, 96]".
#pragma once

#include <string>

#include "adakv/error.h"
#include "adakv/types.h"

namespace adakv {

/// Checks the tensors of one call. Sizes are named when they are first met and must agree after
/// that.
class Checker {
 public:
  explicit Checker(const char* verb) : verb_(verb) {}

  /// A tensor that must be there, of the given names of dimensions ("B Hkv T D") and dtype. A name
  /// that was not met before is bound to the size; a number is that number.
  void tensor(const char* name, const TensorView& view, const char* dims, DType dtype);

  /// The same with one floating-point dtype for all tensors that are checked this way.
  void floats(const char* name, const TensorView& view, const char* dims);

  /// The same for tensors that may be left out.
  void optional(const char* name, const TensorView& view, const char* dims, DType dtype) {
    if (view) tensor(name, view, dims, dtype);
  }

  /// Scratch memory of at least `bytes`.
  void workspace(const TensorView& view, size_t bytes);

  /// Size that a name was bound to.
  int64_t size(const char* dim) const;

  /// Throws "<verb>: ..." unless the condition holds.
  template <typename... Parts>
  void require(bool condition, const Parts&... parts) const {
    if (!condition) throw InvalidArgument(detail::concat(verb_, ": ", parts...));
  }

 private:
  struct Dim {
    std::string name;
    int64_t size;
  };

  Dim* find(const std::string& name);
  void shape(const char* name, const TensorView& view, const char* dims);
  void device(const char* name, const TensorView& view);

  const char* verb_;
  Dim dims_[16];
  int num_dims_ = 0;
  std::string first_float_, first_tensor_;
  DType float_dtype_ = DType::kFloat32;
  Device device_;
};

}  // namespace adakv
