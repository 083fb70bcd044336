// Where a cache gets its memory from. Implement Memory to let a KVCache live in memory that your
// runtime owns.
#pragma once

#include <cstddef>

#include "adakv/types.h"

#pragma GCC visibility push(default)  // what a shared adakv shows
namespace adakv {

/// Memory of one device. Pointers are addresses on that device, aligned to 256 bytes or more.
class Memory {
 public:
  virtual ~Memory() = default;

  /// The device that the addresses are of.
  virtual Device device() const = 0;

  /// `bytes` of uninitialised memory. Throws Error if there is none. Memory that is never touched
  /// should cost nothing where the device can do that (the CPU backend's does).
  virtual void* allocate(size_t bytes) = 0;

  /// Gives back what allocate() returned. Work in a stream may still use it: wait for that, as
  /// cudaFree() does.
  virtual void free(void* data) = 0;

  /// Copies from host memory to this device, in stream order. `host` may be reused as soon as this
  /// returns.
  virtual void copy_from_host(void* data, const void* host, size_t bytes, Stream stream) = 0;

  /// Copies `rows` rows of `row_bytes`, each `pitch_bytes` after the one before on the device,
  /// packed on the host.
  virtual void copy_rows_from_host(void* data,
                                   size_t pitch_bytes,
                                   const void* host,
                                   size_t row_bytes,
                                   size_t rows,
                                   Stream stream) = 0;

  /// Copies `rows` rows of `row_bytes` from one place of this device to another, in stream order.
  /// Each lies `to_pitch` and `from_pitch` bytes after the one before; the places don't overlap.
  virtual void copy_rows(void* to,
                         size_t to_pitch,
                         const void* from,
                         size_t from_pitch,
                         size_t row_bytes,
                         size_t rows,
                         Stream stream) = 0;

  /// Copies `rows` rows of `row_bytes`, each `pitch_bytes` after the one before on the device, packed
  /// to the host, after everything that was put into `stream`; returns when they are there. Only
  /// saving a cache needs it. Host memory is copied here; for other devices this throws Error.
  virtual void copy_rows_to_host(void* host,
                                 const void* data,
                                 size_t pitch_bytes,
                                 size_t row_bytes,
                                 size_t rows,
                                 Stream stream);

  /// Sets every byte of `rows` rows of `row_bytes`, `pitch_bytes` apart, to `value`, in stream
  /// order.
  virtual void fill_rows(
      void* data, size_t pitch_bytes, int value, size_t row_bytes, size_t rows, Stream stream) = 0;
};

/// The memory of a device, from the backend that is built in. Throws Error if that backend is
/// missing or has no device.
Memory& device_memory(Device device);

}  // namespace adakv
#pragma GCC visibility pop
