// Tensors that own their memory, exactly as much as they need (so that a sanitizer sees every step
// beyond), and numbers in every dtype.
#pragma once

#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

namespace adakv {

/// A float as the 16 bits of a float16 or bfloat16, rounded to the nearest. Normal numbers only.
inline uint16_t to_half(float x, DType dtype) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (dtype == DType::kBFloat16)
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude < 0x38800000) return static_cast<uint16_t>(sign);  // below 2^-14: 0
  const uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

/// The same way back.
inline float from_half(uint16_t half, DType dtype) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  if (dtype == DType::kFloat16) {
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    bits = (half & 0x8000u) << 16 | (magnitude ? magnitude + 0x38000000 : 0);
  }
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

/// A contiguous tensor with memory of its own.
class Tensor {
 public:
  Tensor(std::initializer_list<int64_t> shape, DType dtype) : view(nullptr, shape, dtype) {
    bytes_.reset(new char[view.size() * dtype_size(dtype)]());
    view.data = bytes_.get();
  }

  /// int32 numbers.
  Tensor(std::initializer_list<int64_t> shape, const std::vector<int32_t>& numbers)
      : Tensor(shape, DType::kInt32) {
    std::copy(numbers.begin(), numbers.end(), view.ptr<int32_t>());
  }

  /// float32 numbers.
  Tensor(std::initializer_list<int64_t> shape, const std::vector<float>& numbers)
      : Tensor(shape, DType::kFloat32) {
    std::copy(numbers.begin(), numbers.end(), view.ptr<float>());
  }

  /// Normal random numbers, rounded to the dtype.
  Tensor(std::initializer_list<int64_t> shape, DType dtype, std::mt19937& random)
      : Tensor(shape, dtype) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < view.size(); ++i) set(i, normal(random));
  }

  /// The number at a flat index.
  float get(int64_t i) const {
    if (view.dtype == DType::kFloat32) return view.ptr<float>()[i];
    return from_half(view.ptr<uint16_t>()[i], view.dtype);
  }

  void set(int64_t i, float x) {
    if (view.dtype == DType::kFloat32) {
      view.ptr<float>()[i] = x;
    } else {
      view.ptr<uint16_t>()[i] = to_half(x, view.dtype);
    }
  }

  std::vector<int32_t> ints() const {
    return {view.ptr<int32_t>(), view.ptr<int32_t>() + view.size()};
  }

  TensorView view;

 private:
  std::unique_ptr<char[]> bytes_;
};

/// Calls a verb with scratch memory of the size it asks for.
template <typename Args>
void run(void (*verb)(const Args&), Args args) {
  const auto ints = static_cast<int64_t>((workspace_bytes(args) + 3) / 4);
  const Tensor workspace({ints}, DType::kInt32);
  args.workspace = workspace.view;
  verb(args);
}

/// What a verb complains about; empty if it doesn't.
template <typename Call>
std::string complaint(const Call& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

/// Compares floats with a definition in double: wrong by at most some units in the last place of
/// the largest number (sums are in float32, one rounding to a 16-bit format at the end).
inline void expect_close(const Tensor& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.view.size(), static_cast<int64_t>(expected.size()));
  const double epsilon = actual.view.dtype == DType::kFloat32   ? 0x1p-18
                         : actual.view.dtype == DType::kFloat16 ? 0x1p-10
                                                                : 0x1p-7;
  double largest = 0;
  for (const double x : expected) {
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const double x = actual.get(static_cast<int64_t>(i));
    if (std::isfinite(expected[i])) {
      ASSERT_NEAR(x, expected[i], epsilon * largest) << "at " << i;
    } else {
      ASSERT_EQ(x, expected[i]) << "at " << i;
    }
  }
}

/// Every dtype of keys and values, with head dims that fill vectors, half fill them, or don't.
struct Format {
  DType dtype;
  int head_dim;
};

inline std::vector<Format> formats() {
  std::vector<Format> all;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const int head_dim : {8, 40, 64, 128, 256}) all.push_back({dtype, head_dim});
  }
  return all;
}

inline void PrintTo(const Format& format, std::ostream* out) {
  *out << dtype_name(format.dtype) << "_D" << format.head_dim;
}

}  // namespace adakv
