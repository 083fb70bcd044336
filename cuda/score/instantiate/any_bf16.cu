#include "score/any.cuh"

namespace adakv {
template void launch_any_score<__nv_bfloat16>(const ScoreArgs&, const ScoreParams&);
}
