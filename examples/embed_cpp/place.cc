#include "place.h"

#include <cstring>
#include <stdexcept>

#ifdef EMBED_CUDA
#include <cuda_runtime_api.h>
#endif

namespace embed {
namespace {

#ifdef EMBED_CUDA

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }
}

// Independent of the default stream: what adakv puts anywhere else would be seen as wrong results.
adakv::Stream new_stream() {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

void end_stream(adakv::Stream stream) {
  cudaStreamDestroy(static_cast<cudaStream_t>(stream));
}

void copy_to_host(void* host, const void* data, size_t bytes, adakv::Stream stream) {
  check(cudaMemcpyAsync(host, data, bytes, cudaMemcpyDeviceToHost,
                        static_cast<cudaStream_t>(stream)));
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

#else

adakv::Stream new_stream() {
  throw std::runtime_error("--device cuda: CMake found no CUDA toolkit for this program");
}

void end_stream(adakv::Stream) {}

void copy_to_host(void*, const void*, size_t, adakv::Stream) {}

#endif

}  // namespace

Place::Place(const std::string& name) {
  if (name == "cpu") return;
  if (name != "cuda") throw std::runtime_error("--device must be cpu or cuda, got " + name);
  std::string reason;
  if (!adakv::cuda_available(&reason)) throw std::runtime_error("--device cuda: " + reason);
  device_ = {adakv::DeviceType::kCuda, 0};
  stream_ = new_stream();
}

Place::~Place() {
  if (!is_host()) end_stream(stream_);
}

void Place::read(void* host, const void* data, size_t bytes) const {
  if (is_host()) {
    std::memcpy(host, data, bytes);
  } else {
    copy_to_host(host, data, bytes, stream_);
  }
}

std::vector<int32_t> Place::read(const adakv::TensorView& tensor) const {
  std::vector<int32_t> values(tensor.size());
  read(values.data(), tensor.data, values.size() * sizeof(int32_t));
  return values;
}

}  // namespace embed
