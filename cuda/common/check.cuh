// Checks of CUDA calls.
#pragma once

#include <cuda_runtime.h>

#include "adakv/error.h"

/// Throws adakv::Error, naming the verb, if a runtime call failed. After a launch:
/// ADAKV_CUDA_CHECK("score", cudaGetLastError()).
#define ADAKV_CUDA_CHECK(verb, call)                                                               \
  do {                                                                                             \
    const cudaError_t adakv_status = (call);                                                       \
    if (adakv_status != cudaSuccess) {                                                             \
      throw ::adakv::Error(::adakv::detail::concat(verb, ": ", cudaGetErrorString(adakv_status))); \
    }                                                                                              \
  } while (0)

/// Checked in debug builds only.
#ifdef NDEBUG
#define ADAKV_DEVICE_ASSERT(condition) ((void)0)
#else
#include <cassert>
#define ADAKV_DEVICE_ASSERT(condition) assert(condition)
#endif
