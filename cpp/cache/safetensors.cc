// The format: 8 bytes little-endian, the length of a JSON head; the head, which says of each tensor
// its dtype, shape and [begin, end) behind the head; then the data.
#include "adakv/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <set>
#include <vector>

#include "adakv/error.h"
#include "cache/file_dtypes.h"
#include "cache/scanner.h"

namespace adakv {
namespace {

constexpr uint64_t kMostHeadBytes = 100'000'000;  // what other readers of the format allow
constexpr int64_t kMostSize = (int64_t{1} << 31) - 1;

// What the head says of a tensor.
struct Entry {
  TensorView view;
  size_t begin = 0, end = 0;
};

std::vector<int64_t> counts(Scanner& scanner, size_t most) {
  std::vector<int64_t> numbers;
  scanner.elements([&] {
    if (numbers.size() == most) scanner.fail(detail::concat("at most ", most, " numbers"));
    numbers.push_back(scanner.count());
  });
  return numbers;
}

Entry entry(Scanner& scanner) {
  Entry entry;
  std::set<std::string> found;
  scanner.members([&](const std::string& member) {
    if (!found.insert(member).second) scanner.fail(member + " once");
    if (member == "dtype") {
      if (!dtype_of_file(scanner.string(), &entry.view.dtype)) scanner.fail("a dtype known here");
    } else if (member == "shape") {
      entry.view.rank = 0;
      for (int64_t n : counts(scanner, TensorView::kMaxRank)) {
        if (n > kMostSize) scanner.fail("sizes below 2^31");
        entry.view.shape[entry.view.rank++] = n;
      }
    } else if (member == "data_offsets") {
      const std::vector<int64_t> offsets = counts(scanner, 2);
      if (offsets.size() != 2) scanner.fail("two offsets");
      entry.begin = static_cast<size_t>(offsets[0]);
      entry.end = static_cast<size_t>(offsets[1]);
    } else {
      scanner.fail("dtype, shape or data_offsets");
    }
  });
  if (found.size() != 3) scanner.fail("dtype, shape and data_offsets");
  entry.view.make_contiguous();
  return entry;
}

// Bytes of a tensor, or more than any file has.
uint64_t bytes_of(const TensorView& view) {
  constexpr uint64_t kTooMany = uint64_t{1} << 62;
  uint64_t bytes = dtype_size(view.dtype);
  for (int i = 0; i < view.rank; ++i) {
    const auto n = static_cast<uint64_t>(view.shape[i]);
    if (n == 0) return 0;
    bytes = bytes > kTooMany / n ? kTooMany : bytes * n;
  }
  return bytes;
}

}  // namespace

SafeTensors::SafeTensors(const std::string& path) : name_(path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info = {};
  const bool is_file = file >= 0 && fstat(file, &info) == 0 && S_ISREG(info.st_mode);
  const auto bytes = static_cast<size_t>(info.st_size);
  void* map = MAP_FAILED;
  if (is_file && bytes > 0) map = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);
  const int error = errno;
  if (file >= 0) close(file);
  if (is_file && bytes > 0 && map != MAP_FAILED) {
    map_ = {map, [bytes](const void* data) { munmap(const_cast<void*>(data), bytes); }};
    file_ = {static_cast<const char*>(map), bytes};
  } else if (!is_file || bytes > 0) {
    throw Error(detail::concat(
        path, " can't be read: ", is_file || file < 0 ? std::strerror(error) : "it is no file"));
  }
  read();
}

SafeTensors::SafeTensors(const void* data, size_t bytes)
    : name_("the file in memory"), file_(static_cast<const char*>(data), bytes) {
  read();
}

TensorView SafeTensors::tensor(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? TensorView() : found->second;
}

void SafeTensors::read() {
  const auto check = [&](bool condition, const auto&... why) {
    if (!condition) throw Error(detail::concat(name_, " is no safetensors file, or cut: ", why...));
  };
  uint64_t head_bytes = 0;
  check(file_.size() >= 8, "it has no head");
  for (int i = 7; i >= 0; --i) head_bytes = head_bytes << 8 | static_cast<uint8_t>(file_[i]);
  check(head_bytes <= kMostHeadBytes && head_bytes <= file_.size() - 8, "its head is not whole");
  head_ = file_.substr(0, 8 + head_bytes);
  const std::string_view data = file_.substr(head_.size());

  std::map<size_t, const TensorView*> by_place;  // empty ones excepted
  size_t sum = 0;
  try {
    Scanner scanner(head_.substr(8));
    scanner.members([&](const std::string& name) {
      if (name == "__metadata__") {
        if (!texts_.empty()) scanner.fail("__metadata__ once");
        scanner.members([&](const std::string& text) {
          if (!texts_.emplace(text, scanner.string()).second) scanner.fail(text + " once");
        });
        return;
      }
      Entry given = entry(scanner);
      const bool is_inside = given.begin <= given.end && given.end <= data.size();
      if (!is_inside || bytes_of(given.view) != given.end - given.begin) {
        scanner.fail(name + " to lie in the file, and its bytes to be those of its shape");
      }
      const char* place = data.data() + given.begin;
      if (reinterpret_cast<uintptr_t>(place) % dtype_size(given.view.dtype) != 0) {
        scanner.fail(name + " to be aligned");
      }
      given.view.data = const_cast<char*>(place);
      const auto [made, is_new] = tensors_.emplace(name, given.view);
      if (!is_new) scanner.fail(name + " once");
      if (given.begin < given.end && !by_place.emplace(given.begin, &made->second).second) {
        scanner.fail(name + " to have a place of its own");
      }
      sum += given.end - given.begin;
    });
    scanner.end();
  } catch (const Error& error) {
    check(false, error.what());
  }
  size_t end = 0;
  for (const auto& [begin, view] : by_place) {
    check(begin == end, "its tensors overlap, or leave holes");
    end += bytes_of(*view);
  }
  check(end == data.size() && sum == end, "its tensors don't fill it");
}

}  // namespace adakv
