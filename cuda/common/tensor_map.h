// Tensor maps: what the bulk copy engine of sm_90 and later knows of a tensor.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.cuh"

namespace adakv {

/// A tensor of 16-bit elements in kRank dimensions, the first of them contiguous, and the box of it
/// that is copied at a time. Strides are in bytes and may overlap.
template <int kRank>
struct TensorMapShape {
  uint64_t size[kRank], stride[kRank - 1];
  uint32_t box[kRank];
};

/// The swizzle follows from the box: its first dimension is 32, 64 or 128 bytes. L2 fetches 128 bytes
/// at a time: 256 took attend up to 8 % longer on an H200 (bench_attend, 32 x 4096).
template <int kRank>
CUtensorMap encode_tensor_map(const char* verb,
                              const void* data,
                              const TensorMapShape<kRank>& shape) {
  // Found at run time: nothing of ours links libcuda.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [&] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    ADAKV_CUDA_CHECK(verb, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                            12000, cudaEnableDefault, &result));
    return reinterpret_cast<Encode>(function);
  }();
  const CUtensorMapSwizzle swizzle = shape.box[0] == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : shape.box[0] == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                          : CU_TENSOR_MAP_SWIZZLE_32B;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kRank, const_cast<void*>(data),
             reinterpret_cast<const cuuint64_t*>(shape.size),
             reinterpret_cast<const cuuint64_t*>(shape.stride), shape.box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw Error(
        detail::concat(verb, ": no tensor map for this memory, error ", static_cast<int>(status)));
  }
  return map;
}

}  // namespace adakv
