#include "attend/attend.cuh"

namespace adakv {
template void launch_attend<__nv_bfloat16, Int8, 256>(const AttendParams&, int64_t, cudaStream_t);
template void launch_attend<__nv_bfloat16, Fp8, 256>(const AttendParams&, int64_t, cudaStream_t);
}  // namespace adakv
