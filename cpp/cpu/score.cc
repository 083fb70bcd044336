#include "cpu/cpu_backend.h"
#include "adakv/error.h"
namespace adakv {
void CpuBackend::score(const ScoreArgs&) { throw Error("score: to come"); }
size_t CpuBackend::workspace_bytes(const ScoreArgs&) const { return 0; }
}  // namespace adakv
