// Launching kernels with what sm_90 adds: clusters, and kernels that start while the one before
// them still runs (programmatic dependent launch). On older devices the same kernels run without.
#pragma once

#include <cuda_runtime.h>

#include "common/check.cuh"

namespace adakv {

inline int device_attribute(const char* verb, int device, cudaDeviceAttr attribute) {
  int value = 0;
  ADAKV_CUDA_CHECK(verb, cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

/// Whether the device runs code that was compiled for sm_90 or later; ADAKV_LEAST_SM90 is the least
/// such architecture of this build, 0 if there is none.
inline bool has_sm90(const char* verb, int device) {
  const int major = device_attribute(verb, device, cudaDevAttrComputeCapabilityMajor);
  const int minor = device_attribute(verb, device, cudaDevAttrComputeCapabilityMinor);
  return ADAKV_LEAST_SM90 > 0 && 10 * major + minor >= ADAKV_LEAST_SM90;
}

/// Whether the device runs what is compiled for sm_90a, which no later one does.
inline bool has_wgmma(const char* verb, int device) {
  return has_sm90(verb, device) &&
         device_attribute(verb, device, cudaDevAttrComputeCapabilityMajor) == 9;
}

struct LaunchShape {
  dim3 grid;
  int threads;
  size_t shared_bytes = 0;
  bool early = false;  // may start early: all threads call wait_for_previous_kernel(); sm_90 only
  int cluster = 1;     // CTAs of a cluster along x; more than 1: sm_90 only
};

template <typename... Params, typename... Args>
void launch(const char* verb,
            void (*kernel)(Params...),
            const LaunchShape& shape,
            void* stream,
            const Args&... args) {
  if (shape.shared_bytes > 0) {  // with what the kernel declares it may be more than 48 KB
    ADAKV_CUDA_CHECK(verb, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                static_cast<int>(shape.shared_bytes)));
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.early) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 8) {
    ADAKV_CUDA_CHECK(
        verb, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  ADAKV_CUDA_CHECK(verb, cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

}  // namespace adakv
