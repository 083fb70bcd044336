#include "cpu/parallel.h"

#include "adakv/ops.h"

namespace adakv {

void set_num_threads(int) {}

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace adakv
