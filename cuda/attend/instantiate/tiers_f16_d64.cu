#include "attend/tiers.cuh"

namespace adakv {
template void launch_attend_tiers<__half, 64>(const AttendTiersParams&,
                                              const int64_t*,
                                              cudaStream_t);
}  // namespace adakv
