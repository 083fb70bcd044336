// The sum is what remains of the bytes, read as a polynomial over two elements, after division by
// another one. Bits are reflected: the first of a byte, its lowest, has the highest power.
//
// Many bytes at once by carry-less products, where the processor has them: a block of 128 bits that
// stands n bits before another is added to it as its product with x^n, of which only what remains
// after the division matters (V. Gopal et al., Fast CRC Computation for Generic Polynomials Using
// PCLMULQDQ Instruction, Intel 2009).
#include "cache/crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace adakv {
namespace {

constexpr uint32_t kDivisor = 0xEDB88320u;  // without its highest power

constexpr uint32_t times_x(uint32_t rest) {
  return (rest >> 1) ^ (rest & 1 ? kDivisor : 0);
}

// tables[s][b]: what byte b leaves behind when s bytes follow it.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t rest = b;
    for (int i = 0; i < 8; ++i) rest = times_x(rest);
    tables[0][b] = rest;
  }
  for (size_t s = 1; s < tables.size(); ++s) {
    for (uint32_t b = 0; b < 256; ++b) {
      const uint32_t shorter = tables[s - 1][b];
      tables[s][b] = (shorter >> 8) ^ tables[0][shorter & 255];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t by_tables(const unsigned char* data, size_t bytes, uint32_t rest) {
  for (; bytes >= 8; bytes -= 8, data += 8) {
    uint32_t next = 0;
    for (uint32_t i = 0; i < 8; ++i) {
      const uint32_t joined = i < 4 ? data[i] ^ ((rest >> (8 * i)) & 255) : data[i];
      next ^= kTables[7 - i][joined];
    }
    rest = next;
  }
  for (; bytes > 0; --bytes) rest = (rest >> 8) ^ kTables[0][(rest ^ *data++) & 255];
  return rest;
}

#if defined(__x86_64__)
#define ADAKV_CARRYLESS __attribute__((target("pclmul,sse4.1")))

// What remains of x^n, as a factor: the product of two reflected numbers is one bit short.
constexpr int64_t power(int n) {
  uint32_t rest = 0x80000000u;  // x^0
  for (; n > 0; --n) rest = times_x(rest);
  return int64_t{rest} << 1;
}

ADAKV_CARRYLESS inline __m128i at(const unsigned char* data, int i) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i);
}

// `block` moved behind by the powers of its halves, and added to what stands there.
ADAKV_CARRYLESS inline __m128i moved(__m128i block, __m128i powers, __m128i there) {
  const __m128i first = _mm_clmulepi64_si128(block, powers, 0x00);
  const __m128i second = _mm_clmulepi64_si128(block, powers, 0x11);
  return _mm_xor_si128(_mm_xor_si128(first, second), there);
}

// Whole groups of four blocks; the others are left to the tables.
ADAKV_CARRYLESS uint32_t by_products(const unsigned char*& data, size_t& bytes, uint32_t rest) {
  const __m128i by_four = _mm_set_epi64x(power(4 * 128 - 32), power(4 * 128 + 32));
  const __m128i by_one = _mm_set_epi64x(power(128 - 32), power(128 + 32));
  const __m128i before = _mm_cvtsi32_si128(static_cast<int>(rest));
  __m128i blocks[4] = {_mm_xor_si128(at(data, 0), before), at(data, 1), at(data, 2), at(data, 3)};
  for (data += 64, bytes -= 64; bytes >= 64; data += 64, bytes -= 64) {
    for (int i = 0; i < 4; ++i) blocks[i] = moved(blocks[i], by_four, at(data, i));
  }
  for (int i = 1; i < 4; ++i) blocks[i] = moved(blocks[i - 1], by_one, blocks[i]);
  unsigned char last[16];
  std::memcpy(last, &blocks[3], sizeof(last));
  return by_tables(last, sizeof(last), 0);
}
#endif

}  // namespace

uint32_t crc32(const void* data, size_t bytes, uint32_t before) {
  const auto* at = static_cast<const unsigned char*>(data);
  uint32_t rest = ~before;
#if defined(__x86_64__)
  static const bool has_products =
      __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (has_products && bytes >= 64) rest = by_products(at, bytes, rest);
#endif
  return ~by_tables(at, bytes, rest);
}

}  // namespace adakv
