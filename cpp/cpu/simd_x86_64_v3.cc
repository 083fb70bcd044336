#define ADAKV_ISA x86_64_v3
#define ADAKV_ISA_NAME "x86-64-v3"
#include "cpu/simd_kernels.h"
