#include "cpu/cpu_backend.h"

namespace adakv {

// Enough to keep a large CPU busy; fixed, so that results do not depend on the machine.
int CpuBackend::default_num_workers(Device) {
  return 64;
}

Backend& cpu_backend() {
  static CpuBackend backend;
  return backend;
}

}  // namespace adakv
