#include "score/any.cuh"

namespace adakv {
template void launch_any_score<__half>(const ScoreArgs&, const ScoreParams&);
}
