#define ADAKV_ISA x86_64_amx
#define ADAKV_ISA_NAME "x86-64-v4 with AMX"
#include "cpu/simd_attend_amx.h"
#include "cpu/simd_kernels.h"
