// Checks of a verb's tensors. Messages read "<verb>: <argument> must be [B, Hkv, T, D], got [2, 8,
// 512, 96]".
#pragma once

#include <string_view>

#include "adakv/error.h"
#include "adakv/types.h"

namespace adakv {

/// Checks the tensors of one call. Sizes are named when they are first met and must agree after
/// that.
class Checker {
 public:
  explicit Checker(const char* verb) : verb_(verb) {}

  /// A tensor that must be there, of the given names of dimensions ("B Hkv T D") and dtype. A name
  /// that was not met before is bound to the size, a lone digit is that number. Names are kept: pass
  /// string literals.
  void tensor(const char* name, const TensorView& view, std::string_view dims, DType dtype);

  /// The same with one floating-point dtype for all tensors that are checked this way.
  void floats(const char* name, const TensorView& view, std::string_view dims);

  /// The same for tensors that may be left out.
  void optional(const char* name, const TensorView& view, std::string_view dims, DType dtype) {
    if (view) tensor(name, view, dims, dtype);
  }

  /// The dtype that floats() bound.
  DType float_dtype() const { return float_dtype_; }

  /// Scratch memory of at least `bytes`.
  void workspace(const TensorView& view, size_t bytes);

  /// Memory that is read in pieces of 16 bytes, as scratch memory and schedules are.
  void aligned(const char* name, const TensorView& view) const;

  /// Size that a name was bound to.
  int64_t size(std::string_view dim) const;

  /// Throws "<verb>: ..." unless the condition holds.
  template <typename... Parts>
  void require(bool condition, const Parts&... parts) const {
    if (!condition) throw InvalidArgument(detail::concat(verb_, ": ", parts...));
  }

 private:
  struct Dim {
    std::string_view name;
    int64_t size;
  };

  static constexpr int kAlignment = 16;

  const Dim* find(std::string_view name) const;
  void memory(const char* name, const TensorView& view) const;
  void shape(const char* name, const TensorView& view, std::string_view dims);
  [[noreturn]] void throw_shape(const char* name,
                                const TensorView& view,
                                std::string_view dims) const;
  void device(const char* name, const TensorView& view);

  const char* verb_;
  Dim dims_[24];  // more than the names of any verb
  int num_dims_ = 0;
  const char* first_float_ = nullptr;
  const char* first_tensor_ = nullptr;
  DType float_dtype_ = DType::kFloat32;
  Device device_;
};

}  // namespace adakv
