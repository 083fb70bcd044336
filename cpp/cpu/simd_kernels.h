// The table of one instruction set. Included once by each simd_<isa>.cc, behind its definition of ADAKV_ISA.
#pragma once

#include "cpu/simd_attend.h"

namespace adakv::ADAKV_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    ADAKV_ISA_NAME,
    {attend_span<float>, attend_span<Float16>, attend_span<BFloat16>},
};

}  // namespace adakv::ADAKV_ISA
