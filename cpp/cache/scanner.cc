#include "cache/scanner.h"

#include "adakv/error.h"

namespace adakv {
namespace {

constexpr int64_t kMost = int64_t{1} << 53;  // what JSON's numbers hold exactly everywhere

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

void append_utf8(std::string& text, uint32_t point) {
  const int behind = point < 0x80 ? 0 : point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
  constexpr uint32_t kFirst[] = {0, 0xC0, 0xE0, 0xF0};
  text += static_cast<char>(kFirst[behind] | (point >> (6 * behind)));
  for (int i = behind - 1; i >= 0; --i) {
    text += static_cast<char>(0x80 | ((point >> (6 * i)) & 0x3F));
  }
}

}  // namespace

void Scanner::fail(const std::string& expected) const {
  throw Error(detail::concat("expected ", expected, " at byte ", at_));
}

void Scanner::skip_blanks() {
  while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != text_.npos) ++at_;
}

bool Scanner::skip(char c) {
  skip_blanks();
  if (at_ == text_.size() || text_[at_] != c) return false;
  ++at_;
  return true;
}

void Scanner::expect(char c) {
  if (!skip(c)) fail(std::string(1, c));
}

void Scanner::end() {
  skip_blanks();
  if (at_ != text_.size()) fail("the end");
}

int64_t Scanner::count() {
  skip_blanks();
  const size_t first = at_;
  int64_t number = 0;
  while (at_ < text_.size() && is_digit(text_[at_])) {
    number = 10 * number + (text_[at_++] - '0');
    if (number > kMost) fail("a number up to 2^53");
  }
  const bool is_padded = at_ > first + 1 && text_[first] == '0';
  if (at_ == first || is_padded) fail("a whole number");
  return number;
}

std::string Scanner::string() {
  expect('"');
  std::string result;
  const size_t first = at_;
  while (at_ < text_.size() && text_[at_] != '"') {
    if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("no control character");
    if (text_[at_] == '\\') {
      ++at_;
      escape(result);
    } else {
      result += text_[at_++];
    }
  }
  if (!is_utf8(text_.substr(first, at_ - first))) fail("UTF-8 before this");
  expect('"');
  return result;
}

void Scanner::escape(std::string& result) {
  constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
  if (at_ == text_.size()) fail("an escape");
  const char c = text_[at_++];
  if (const size_t i = kNames.find(c); i != kNames.npos) {
    result += kMeanings[i];
    return;
  }
  if (c != 'u') fail("a known escape");
  uint32_t point = four_digits();
  if (point >= 0xD800 && point < 0xE000) {  // half of a pair
    if (point >= 0xDC00 || text_.substr(at_, 2) != "\\u") fail("the first half of a pair");
    at_ += 2;
    const uint32_t second = four_digits();
    if (second < 0xDC00 || second >= 0xE000) fail("the second half of a pair");
    point = 0x10000 + ((point - 0xD800) << 10) + (second - 0xDC00);
  }
  append_utf8(result, point);
}

uint32_t Scanner::four_digits() {
  constexpr std::string_view kDigits = "0123456789abcdef";
  uint32_t number = 0;
  for (int i = 0; i < 4; ++i, ++at_) {
    const char c = at_ < text_.size() ? text_[at_] : '\0';
    const size_t digit = kDigits.find(c >= 'A' && c <= 'F' ? static_cast<char>(c - 'A' + 'a') : c);
    if (digit == kDigits.npos) fail("four hexadecimal digits");
    number = 16 * number + static_cast<uint32_t>(digit);
  }
  return number;
}

bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t k) -> uint32_t { return static_cast<unsigned char>(text[k]); };
    const uint32_t first = byte(i++);
    if (first < 0x80) continue;
    const size_t behind = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
    if (first < 0xC0 || first > 0xF4 || text.size() - i < behind) return false;
    uint32_t point = first & (0x3F >> behind);
    for (size_t k = 0; k < behind; ++k, ++i) {
      if ((byte(i) & 0xC0) != 0x80) return false;
      point = point << 6 | (byte(i) & 0x3F);
    }
    constexpr uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    const bool is_half = point >= 0xD800 && point < 0xE000;
    if (point < kLeast[behind] || point > 0x10FFFF || is_half) return false;
  }
  return true;
}

std::string json_string(std::string_view text) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string result = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20) {
      result += "\\u00";
      result += kDigits[byte >> 4];
      result += kDigits[byte & 15];
    } else {
      if (c == '"' || c == '\\') result += '\\';
      result += c;
    }
  }
  return result + '"';
}

}  // namespace adakv
