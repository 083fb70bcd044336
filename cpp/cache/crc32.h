// CRC-32 as zip, gzip, PNG and Python's zlib.crc32 have it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adakv {

/// That of `bytes` bytes behind others whose sum is `before`.
uint32_t crc32(const void* data, size_t bytes, uint32_t before = 0);

}  // namespace adakv
