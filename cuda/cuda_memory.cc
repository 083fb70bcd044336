// Device memory for caches: taken once by cudaMalloc; copies and fills in stream order.
#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <mutex>

#include "common/check.cuh"
#include "common/device_guard.h"
#include "cuda_backend.h"

namespace adakv {
namespace {

class CudaMemory final : public Memory {
 public:
  explicit CudaMemory(Device device) : device_(device) {}

  Device device() const override { return device_; }

  void* allocate(size_t bytes) override {
    const DeviceGuard guard(device_);
    void* data = nullptr;
    if (cudaMalloc(&data, bytes) != cudaSuccess) {
      cudaGetLastError();
      size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      throw Error(detail::concat("not enough device memory: ", bytes, " bytes needed, ", free,
                                 " free of ", total));
    }
    return data;
  }

  void free(void* data) override {
    const DeviceGuard guard(device_);
    cudaFree(data);  // waits for kernels that still use it
  }

  void copy_from_host(void* data, const void* host, size_t bytes, Stream stream) override {
    copy_rows_from_host(data, bytes, host, bytes, 1, stream);
  }

  // From pageable memory, so the runtime has staged the bytes when the call returns.
  void copy_rows_from_host(void* data,
                           size_t pitch_bytes,
                           const void* host,
                           size_t row_bytes,
                           size_t rows,
                           Stream stream) override {
    const DeviceGuard guard(device_);
    ADAKV_CUDA_CHECK("memory",
                     cudaMemcpy2DAsync(data, pitch_bytes, host, row_bytes, row_bytes, rows,
                                       cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
  }

  void copy_rows_to_host(void* host,
                         const void* data,
                         size_t pitch_bytes,
                         size_t row_bytes,
                         size_t rows,
                         Stream stream) override {
    const DeviceGuard guard(device_);
    const auto s = static_cast<cudaStream_t>(stream);
    ADAKV_CUDA_CHECK("memory", cudaMemcpy2DAsync(host, row_bytes, data, pitch_bytes, row_bytes,
                                                 rows, cudaMemcpyDeviceToHost, s));
    ADAKV_CUDA_CHECK("memory", cudaStreamSynchronize(s));
  }

  // Packed rows as one: a pitch has its limits (2^31 bytes), and a pool is larger.
  void copy_rows(void* to,
                 size_t to_pitch,
                 const void* from,
                 size_t from_pitch,
                 size_t row_bytes,
                 size_t rows,
                 Stream stream) override {
    const DeviceGuard guard(device_);
    const auto s = static_cast<cudaStream_t>(stream);
    const bool is_packed = to_pitch == row_bytes && from_pitch == row_bytes;
    ADAKV_CUDA_CHECK("memory",
                     is_packed
                         ? cudaMemcpyAsync(to, from, row_bytes * rows, cudaMemcpyDeviceToDevice, s)
                         : cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, row_bytes, rows,
                                             cudaMemcpyDeviceToDevice, s));
  }

  void fill_rows(void* data,
                 size_t pitch_bytes,
                 int value,
                 size_t row_bytes,
                 size_t rows,
                 Stream stream) override {
    const DeviceGuard guard(device_);
    ADAKV_CUDA_CHECK("memory", cudaMemset2DAsync(data, pitch_bytes, value, row_bytes, rows,
                                                 static_cast<cudaStream_t>(stream)));
  }

 private:
  Device device_;
};

}  // namespace

Memory& CudaBackend::memory(Device device) {
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<CudaMemory>> memories;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<CudaMemory>& memory = memories[device.index];
  if (!memory) memory = std::make_unique<CudaMemory>(device);
  return *memory;
}

}  // namespace adakv
