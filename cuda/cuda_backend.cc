// Which devices there are.
#include "cuda_backend.h"

#include <cuda_runtime.h>

#include "common/check.cuh"

namespace adakv {
namespace {

// Why there is no device; empty if there is one. Asked once: drivers don't come and go.
const std::string& device_problem() {
  static const std::string problem = [] {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver) {
      return std::string("no CUDA driver, or one too old for CUDA " ADAKV_CUDA_VERSION);
    }
    if (status != cudaSuccess) return std::string("CUDA: ") + cudaGetErrorString(status);
    return std::string(count > 0 ? "" : "no CUDA device");
  }();
  return problem;
}

}  // namespace

bool cuda_available(std::string* reason) {
  if (reason) *reason = device_problem();
  return device_problem().empty();
}

Backend* cuda_backend() {
  static CudaBackend backend;
  return &backend;
}

int CudaBackend::default_num_workers(Device device) {
  int count = 0;
  ADAKV_CUDA_CHECK("plan",
                   cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index));
  return count;
}

}  // namespace adakv
