// Just enough JSON for config.json.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace embed {

struct Json {
  enum class Type { kNull, kBool, kNumber, kString, kArray, kObject };

  Type type = Type::kNull;
  double number = 0;  // of a bool 0 or 1
  std::string string;
  std::vector<Json> array;
  std::map<std::string, Json> object;

  /// Throws std::runtime_error, with the place, for what is not JSON.
  static Json parse(std::string_view text);

  /// A member of an object, or null if there is none.
  const Json& operator[](const std::string& name) const;

  bool is_null() const { return type == Type::kNull; }

  /// A number or bool; `name` is for the message if it is none.
  double as_number(const std::string& name) const;
};

}  // namespace embed
