#include "json.h"

#include <cctype>
#include <cstdlib>
#include <stdexcept>

namespace embed {
namespace {

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = any();
    if (peek() != '\0') fail("something behind the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("JSON: " + what + " at byte " + std::to_string(at_));
  }

  char peek() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  bool skip(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!skip(c)) fail(std::string("expected ") + c);
  }

  bool skip_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json any() {
    Json value;
    const char c = peek();
    if (c == '{') {
      value.type = Json::Type::kObject;
      members(value);
    } else if (c == '[') {
      value.type = Json::Type::kArray;
      elements(value);
    } else if (c == '"') {
      value.type = Json::Type::kString;
      value.string = text();
    } else if (skip_word("true") || skip_word("false")) {
      value.type = Json::Type::kBool;
      value.number = text_[at_ - 2] == 'u';
    } else if (!skip_word("null")) {
      value.type = Json::Type::kNumber;
      value.number = number();
    }
    return value;
  }

  void members(Json& value) {
    expect('{');
    if (skip('}')) return;
    do {
      peek();
      std::string name = text();
      expect(':');
      value.object[name] = any();
    } while (skip(','));
    expect('}');
  }

  void elements(Json& value) {
    expect('[');
    if (skip(']')) return;
    do {
      value.array.push_back(any());
    } while (skip(','));
    expect(']');
  }

  // Escapes other than \" \\ \/ stay as they are written: no name that is looked up has them.
  std::string text() {
    expect('"');
    std::string result;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\' && at_ + 1 < text_.size()) {
        const char escaped = text_[++at_];
        if (escaped != '"' && escaped != '\\' && escaped != '/') result += '\\';
      }
      result += text_[at_++];
    }
    expect('"');
    return result;
  }

  double number() {
    const std::string token(text_.substr(at_, text_.find_first_of(",]} \t\r\n", at_) - at_));
    char* end = nullptr;
    const double value = std::strtod(token.c_str(), &end);
    if (token.empty() || *end != '\0') fail("expected a value");
    at_ += token.size();
    return value;
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

Json Json::parse(std::string_view text) {
  return Parser(text).document();
}

const Json& Json::operator[](const std::string& name) const {
  static const Json null;
  const auto found = object.find(name);
  return found == object.end() ? null : found->second;
}

double Json::as_number(const std::string& name) const {
  if (type != Type::kNumber && type != Type::kBool) {
    throw std::runtime_error(name + " must be a number");
  }
  return number;
}

}  // namespace embed
