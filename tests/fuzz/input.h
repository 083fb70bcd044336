// Turns the bytes of a fuzzer into choices. When they run out, every choice is 0: so each input,
// however short, is a complete program.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adakv::fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  bool is_over() const { return size_ == 0; }

  uint8_t byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }

  /// A number in first .. last, both included; at most 2^16 of them.
  int range(int first, int last) {
    int number = byte();
    if (last - first > 255) number = number << 8 | byte();
    return first + number % (last - first + 1);
  }

  /// True once in `n` times.
  bool one_in(int n) { return range(1, n) == n; }

  uint32_t word() {
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits = bits << 8 | byte();
    return bits;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

/// Ends the program, with the place, unless the condition holds: what fuzzers look for.
#define ADAKV_FUZZ_ASSERT(condition)                                                     \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (0)

}  // namespace adakv::fuzz
