/// @file
/// What adakv throws.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

#pragma GCC visibility push(default)  // what a shared adakv shows
namespace adakv {

/// Something could not be done: no memory, no device, no pages left. Nothing was changed.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller passed something wrong. The message names the argument, what was expected and what
/// came.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

#pragma GCC visibility pop

namespace detail {

template <typename Part>
void append(std::string& text, const Part& part) {
  char number[32];
  if constexpr (std::is_floating_point_v<Part>) {
    std::snprintf(number, sizeof(number), "%g", static_cast<double>(part));
    text += number;
  } else if constexpr (std::is_convertible_v<Part, const void*> &&
                       !std::is_convertible_v<Part, std::string>) {
    std::snprintf(number, sizeof(number), "%p", static_cast<const void*>(part));
    text += number;
  } else if constexpr (std::is_integral_v<Part>) {
    text += std::to_string(part);
  } else {
    text += part;
  }
}

// Without a stream: those look up locale data that other libraries of a process may have replaced
// (seen to crash beside PyTorch).
template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

}  // namespace detail
}  // namespace adakv

/// Throws InvalidArgument unless `condition` holds; the other arguments are joined into the
/// message.
#define ADAKV_CHECK(condition, ...)                                         \
  do {                                                                      \
    if (!(condition)) {                                                     \
      throw ::adakv::InvalidArgument(::adakv::detail::concat(__VA_ARGS__)); \
    }                                                                       \
  } while (0)
