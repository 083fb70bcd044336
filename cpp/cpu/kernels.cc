#include "cpu/kernels.h"

namespace adakv {

// One per simd_<isa>.cc.
namespace baseline {
extern const Kernels kKernels;
}
#if defined(ADAKV_X86_64)
namespace x86_64_v3 {
extern const Kernels kKernels;
}
namespace x86_64_v4 {
extern const Kernels kKernels;
}
#endif

namespace {

const Kernels& choose_kernels() {
#if defined(ADAKV_X86_64)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return x86_64_v4::kKernels;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return x86_64_v3::kKernels;
  }
#endif
  return baseline::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace adakv
