#include "cpu/kernels.h"

#if defined(ADAKV_X86_64)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

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
namespace x86_64_amx {
extern const Kernels kKernels;
}
#endif

namespace {

#if defined(ADAKV_X86_64)
// Two features that __builtin_cpu_supports of Clang doesn't know.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool has_amx() {
  constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kBFloat16);
}

/// Whether the machine has AMX and the system lets this process use it.
bool may_use_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return has_amx() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Kernels& choose_kernels() {
#if defined(ADAKV_X86_64)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return may_use_amx() ? x86_64_amx::kKernels : x86_64_v4::kKernels;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
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

const char* cpu_instruction_set() {
  return kernels().isa;
}

}  // namespace adakv
