#include "attend/attend.cuh"

namespace adakv {
template void launch_attend<__half, Plain, 80>(const AttendParams&, int64_t, cudaStream_t);
}
