/* A GPU for embedder_c.c, by the CUDA runtime: what a C99 program needs to run adakv on one. */
#include <cuda_runtime_api.h>
#include <string.h>

#include "embedder_c.h"

static void* allocate(void* context, size_t bytes) {
  EmbedderDevice* device = context;
  void* data = NULL;
  if (cudaMalloc(&data, bytes) != cudaSuccess) return NULL;
  ++device->live;
  device->bytes += bytes;
  return data;
}

static void release(void* context, void* data) {
  --((EmbedderDevice*)context)->live;
  cudaFree(data);
}

static int copy_rows(void* context,
                     void* data,
                     size_t pitch,
                     const void* host,
                     size_t row_bytes,
                     size_t rows,
                     void* stream) {
  (void)context; /* from pageable memory: the bytes are staged when the call returns */
  return (int)cudaMemcpy2DAsync(data, pitch, host, row_bytes, row_bytes, rows,
                                cudaMemcpyHostToDevice, stream);
}

static int move_rows(void* context,
                     void* to,
                     size_t to_pitch,
                     const void* from,
                     size_t from_pitch,
                     size_t row_bytes,
                     size_t rows,
                     void* stream) {
  (void)context;
  return (int)cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, row_bytes, rows,
                                cudaMemcpyDeviceToDevice, stream);
}

static int fill_rows(void* context,
                     void* data,
                     size_t pitch,
                     int value,
                     size_t row_bytes,
                     size_t rows,
                     void* stream) {
  (void)context;
  return (int)cudaMemset2DAsync(data, pitch, value, row_bytes, rows, stream);
}

static int copy_to_host(void* host, const void* data, size_t bytes, void* stream) {
  const cudaError_t status = cudaMemcpyAsync(host, data, bytes, cudaMemcpyDeviceToHost, stream);
  return (int)(status != cudaSuccess ? status : cudaStreamSynchronize(stream));
}

int embedder_cuda(EmbedderDevice* device) {
  const AdakvMemory memory = {device, allocate, release, copy_rows, move_rows, fill_rows};
  cudaStream_t stream = NULL;
  memset(device, 0, sizeof *device);
  device->device.device_type = 2;
  device->memory = memory;
  device->copy_to_host = copy_to_host;
  const cudaError_t status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  device->stream = stream;
  return (int)status;
}
