#include "attend/attend.cuh"

namespace adakv {
template void launch_attend<__nv_bfloat16, Int4, 128>(const AttendParams&, int64_t, cudaStream_t);
}  // namespace adakv
