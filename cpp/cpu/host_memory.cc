#include <cstdlib>
#include <cstring>

#include "adakv/error.h"
#include "cpu/cpu_backend.h"

namespace adakv {
namespace {

class HostMemory final : public Memory {
 public:
  Device device() const override { return {}; }
  void* allocate(size_t bytes) override {
    void* data = nullptr;
    if (posix_memalign(&data, 4096, bytes ? bytes : 1) != 0) throw Error("no memory");
    return data;
  }
  void free(void* data) override { std::free(data); }
  void copy_from_host(void* data, const void* host, size_t bytes, Stream) override { std::memcpy(data, host, bytes); }
  void copy_rows_from_host(void* data, size_t pitch_bytes, const void* host, size_t row_bytes, size_t rows,
                           Stream) override {
    for (size_t i = 0; i < rows; ++i) {
      std::memcpy(static_cast<char*>(data) + i * pitch_bytes, static_cast<const char*>(host) + i * row_bytes, row_bytes);
    }
  }
  void fill_rows(void* data, size_t pitch_bytes, int value, size_t row_bytes, size_t rows, Stream) override {
    for (size_t i = 0; i < rows; ++i) std::memset(static_cast<char*>(data) + i * pitch_bytes, value, row_bytes);
  }
};

}  // namespace

Memory& CpuBackend::memory(Device) {
  static HostMemory memory;
  return memory;
}

}  // namespace adakv
