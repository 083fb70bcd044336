// From run-time to compile-time values: the body is called with a tag, and finds the type or the
// number in it.
//
//   dispatch_dtype(view.dtype, [&](auto element) {
//     using Element = typename decltype(element)::type;
//     ...
//   });
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "adakv/error.h"
#include "adakv/types.h"

namespace adakv {

template <typename T>
struct TypeTag {
  using type = T;
};

template <int kValue>
using IntTag = std::integral_constant<int, kValue>;

template <typename Body>
void dispatch_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
    default:
      throw Error(detail::concat("no kernel for ", dtype_name(dtype)));
  }
}

/// Calls the body with the head dim, if it is one of those that fast kernels exist for; returns
/// whether it is.
template <typename Body>
bool dispatch_head_dim(int64_t head_dim, const Body& body) {
  switch (head_dim) {
    case 64:
      body(IntTag<64>{});
      return true;
    case 80:
      body(IntTag<80>{});
      return true;
    case 96:
      body(IntTag<96>{});
      return true;
    case 128:
      body(IntTag<128>{});
      return true;
    case 256:
      body(IntTag<256>{});
      return true;
    default:
      return false;
  }
}

}  // namespace adakv
