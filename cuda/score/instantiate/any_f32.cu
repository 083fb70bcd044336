#include "score/any.cuh"

namespace adakv {
template void launch_any_score<float>(const ScoreArgs&, const ScoreParams&);
}
