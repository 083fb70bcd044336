// Work lists shared by a few threads, without linking to a threading runtime.
#pragma once

#include <cstdint>
#include <functional>

namespace adakv {

/// Calls body(i) for i in 0 .. count-1, each once, on up to set_num_threads() threads; returns when
/// all are done. Items are taken in order, so put large ones first. The first exception thrown by a
/// body is rethrown here. May not be nested.
void parallel_for(int64_t count, const std::function<void(int64_t)>& body);

}  // namespace adakv
