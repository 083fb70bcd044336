// The CPU's Memory: anonymous mappings, which the system backs with memory page by page as they are
// first written. So a pool may be made as large as it could ever need to be; what is never used
// costs nothing.
//
// Large mappings ask for pages of 2 MiB. The pages of a row lie anywhere in a pool, and with 4 KiB
// nearly each of them begins with a search for its address, which cost attend a sixth of its rate on
// an Intel Xeon. A pool hands its pages out in order, so that at most one of 2 MiB is backed and not
// used.
#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "adakv/error.h"
#include "cpu/cpu_backend.h"

namespace adakv {
namespace {

constexpr size_t kLarge = size_t{4} << 20;

class HostMemory final : public Memory {
 public:
  Device device() const override { return {}; }

  void* allocate(size_t bytes) override {
    const size_t mapped = bytes > 0 ? bytes : 1;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void* data = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (data == MAP_FAILED) {
      throw Error(detail::concat("out of memory: ", bytes, " bytes of host memory can't be had (",
                                 std::strerror(errno), ")"));
    }
#ifdef MADV_HUGEPAGE
    if (mapped >= kLarge) madvise(data, mapped, MADV_HUGEPAGE);  // a wish: it may fail
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    mapped_bytes_[data] = mapped;
    return data;
  }

  void free(void* data) override {
    if (data == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = mapped_bytes_.find(data);
    ADAKV_CHECK(found != mapped_bytes_.end(), "free: this memory was not allocated here");
    munmap(data, found->second);
    mapped_bytes_.erase(found);
  }

  void copy_from_host(void* data, const void* host, size_t bytes, Stream) override {
    if (bytes > 0) std::memcpy(data, host, bytes);
  }

  void copy_rows_from_host(void* data,
                           size_t pitch_bytes,
                           const void* host,
                           size_t row_bytes,
                           size_t rows,
                           Stream) override {
    for (size_t i = 0; i < rows; ++i) {
      std::memcpy(static_cast<char*>(data) + i * pitch_bytes,
                  static_cast<const char*>(host) + i * row_bytes, row_bytes);
    }
  }

  void copy_rows(void* to,
                 size_t to_pitch,
                 const void* from,
                 size_t from_pitch,
                 size_t row_bytes,
                 size_t rows,
                 Stream) override {
    for (size_t i = 0; i < rows; ++i) {
      std::memcpy(static_cast<char*>(to) + i * to_pitch,
                  static_cast<const char*>(from) + i * from_pitch, row_bytes);
    }
  }

  void fill_rows(
      void* data, size_t pitch_bytes, int value, size_t row_bytes, size_t rows, Stream) override {
    for (size_t i = 0; i < rows; ++i)
      std::memset(static_cast<char*>(data) + i * pitch_bytes, value, row_bytes);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<void*, size_t> mapped_bytes_;
};

}  // namespace

Memory& CpuBackend::memory(Device) {
  static HostMemory* memory = new HostMemory;  // never destroyed: caches may outlive static objects
  return *memory;
}

}  // namespace adakv
