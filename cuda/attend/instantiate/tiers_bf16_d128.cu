#include "attend/tiers.cuh"

namespace adakv {
template void launch_attend_tiers<__nv_bfloat16, 128>(const AttendTiersParams&,
                                                      const int64_t*,
                                                      cudaStream_t);
}  // namespace adakv
