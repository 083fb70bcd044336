// Runs a fuzz target without libFuzzer: files given on the command line, or random inputs from a
// fixed seed. Where the compiler is not Clang, and in the ordinary tests.
//
//   fuzz_history -runs=300           so many random inputs
//   fuzz_history -max_total_time=60  as many as fit in so many seconds
//   fuzz_history crash-1f3a...       these files
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

/// Bytes of which long stretches are small numbers: those choose the usual.
std::vector<uint8_t> random_input(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint8_t> bytes(random() % 1024);
  const uint64_t most = random() % 2 ? 256 : 1 + random() % 40;
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random() % most);
  return bytes;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t runs = 300;
  double seconds = 0;
  int num_files = 0;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "-runs=", 6) == 0) {
      runs = std::strtoull(argv[i] + 6, nullptr, 10);
    } else if (std::strncmp(argv[i], "-max_total_time=", 16) == 0) {
      seconds = std::strtod(argv[i] + 16, nullptr);
    } else if (argv[i][0] != '-') {
      std::ifstream file(argv[i], std::ios::binary);
      const std::vector<uint8_t> bytes(std::istreambuf_iterator<char>(file), {});
      LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
      ++num_files;
    }
  }
  if (num_files > 0) return 0;
  const auto start = std::chrono::steady_clock::now();
  uint64_t done = 0;
  for (; seconds > 0 ? seconds_since(start) < seconds : done < runs; ++done) {
    const std::vector<uint8_t> bytes = random_input(done);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%llu inputs in %.0f s: nothing found\n", static_cast<unsigned long long>(done),
              seconds_since(start));
  return 0;
}
