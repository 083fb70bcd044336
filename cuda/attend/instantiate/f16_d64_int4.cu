#include "attend/attend.cuh"

namespace adakv {
template void launch_attend<__half, Int4, 64>(const AttendParams&, int64_t, cudaStream_t);
}  // namespace adakv
