#define ADAKV_ISA x86_64_v4
#define ADAKV_ISA_NAME "x86-64-v4"
#include "cpu/simd_kernels.h"
