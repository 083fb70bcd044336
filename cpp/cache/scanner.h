// Strict reading of JSON from left to right: for texts whose shape is known, and whose writer may
// mean ill. It never looks deeper than it is asked to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace adakv {

class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}

  /// A string, of which all escapes are resolved, in UTF-8.
  std::string string();

  /// A whole number, 0 .. 2^53.
  int64_t count();

  /// An object: calls body(name) for each member, which reads the value.
  template <typename Body>
  void members(const Body& body) {
    expect('{');
    if (skip('}')) return;
    do {
      const std::string name = string();
      expect(':');
      body(name);
    } while (skip(','));
    expect('}');
  }

  /// A list: calls body() for each element, which reads it.
  template <typename Body>
  void elements(const Body& body) {
    expect('[');
    if (skip(']')) return;
    do body();
    while (skip(','));
    expect(']');
  }

  /// Throws Error unless there is only white space left.
  void end();

  /// Throws Error with the place.
  [[noreturn]] void fail(const std::string& expected) const;

 private:
  void skip_blanks();
  bool skip(char c);
  void expect(char c);
  void escape(std::string& result);
  uint32_t four_digits();

  std::string_view text_;
  size_t at_ = 0;
};

/// Whether bytes are UTF-8: no longer forms than needed, no halves of pairs, up to U+10FFFF.
bool is_utf8(std::string_view text);

/// A string as JSON, with its quotes; the text must be UTF-8.
std::string json_string(std::string_view text);

}  // namespace adakv
