// Makes a device current for one scope. Launches and copies go to the current device, which need
// not be the one that the tensors live on.
#pragma once

#include <cuda_runtime.h>

#include "adakv/types.h"
#include "common/check.cuh"

namespace adakv {

class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) {
    ADAKV_CUDA_CHECK("device", cudaGetDevice(&previous_));
    is_other_ = device.index != previous_;
    if (is_other_) ADAKV_CUDA_CHECK("device", cudaSetDevice(device.index));
  }
  ~DeviceGuard() {
    if (is_other_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool is_other_ = false;
};

}  // namespace adakv
