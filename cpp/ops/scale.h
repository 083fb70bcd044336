// What products of queries and keys are multiplied by, of calls that have queries [..., D].
#pragma once

#include <cmath>

namespace adakv {

template <typename Args>
float scale_of(const Args& args) {
  return args.scale != 0 ? args.scale : 1 / std::sqrt(static_cast<float>(args.queries.shape[3]));
}

}  // namespace adakv
