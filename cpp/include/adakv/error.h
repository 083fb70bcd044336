// What adakv throws.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

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

namespace detail {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
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
