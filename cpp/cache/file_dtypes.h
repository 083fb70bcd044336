// What safetensors files call the element types.
#pragma once

#include <string_view>
#include <utility>

#include "adakv/types.h"

namespace adakv {

constexpr std::pair<std::string_view, DType> kFileDTypes[] = {{"F32", DType::kFloat32},
                                                              {"F16", DType::kFloat16},
                                                              {"BF16", DType::kBFloat16},
                                                              {"I32", DType::kInt32},
                                                              {"U8", DType::kUInt8}};

/// False for a name that isn't known here.
inline bool dtype_of_file(std::string_view name, DType* dtype) {
  for (const auto& [known, type] : kFileDTypes) {
    if (known == name) {
      *dtype = type;
      return true;
    }
  }
  return false;
}

/// The name; of kFloat8 that of its bits.
inline std::string_view file_dtype(DType dtype) {
  for (const auto& [known, type] : kFileDTypes) {
    if (type == dtype) return known;
  }
  return "U8";
}

}  // namespace adakv
