// What the compiler takes for granted: NEON on aarch64, SSE2 on x86-64.
#define ADAKV_ISA baseline
#define ADAKV_ISA_NAME "baseline"
#include "cpu/simd_kernels.h"
