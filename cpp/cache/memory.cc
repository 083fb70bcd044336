#include "adakv/memory.h"

#include <cstring>

#include "adakv/error.h"

namespace adakv {

void Memory::copy_rows_to_host(
    void* host, const void* data, size_t pitch_bytes, size_t row_bytes, size_t rows, Stream) {
  if (device() != Device{}) {
    throw Error("memory: this one of " + device_name(device()) + " can't be copied to the host");
  }
  for (size_t i = 0; i < rows; ++i) {
    std::memcpy(static_cast<char*>(host) + i * row_bytes,
                static_cast<const char*>(data) + i * pitch_bytes, row_bytes);
  }
}

}  // namespace adakv
