// The instruction sets that inner loops are compiled for, and which of them this machine runs. Plain
// enough for cmake/native_isa.cc, which asks while a build is configured.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace adakv {

/// Each has the instructions of those before it.
enum class Isa { baseline, x86_64_v3, x86_64_v4, x86_64_amx };

#if defined(__x86_64__)
// Two features that __builtin_cpu_supports of Clang doesn't know.
inline bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

inline bool has_amx() {
  constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22, kVectorsOfBFloat16 = 1u << 5;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kBFloat16) &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kVectorsOfBFloat16);
}

/// Whether the machine has AMX, for bfloat16, and the system lets this process use it.
inline bool may_use_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return has_amx() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

/// The fastest that this machine can run.
inline Isa isa_of_this_machine() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return may_use_amx() ? Isa::x86_64_amx : Isa::x86_64_v4;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    return Isa::x86_64_v3;
  }
#endif
  return Isa::baseline;
}

}  // namespace adakv
