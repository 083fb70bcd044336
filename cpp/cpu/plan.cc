#include "cpu/cpu_backend.h"
#include "adakv/error.h"
namespace adakv {
void CpuBackend::plan(const PlanArgs&) { throw Error("plan: to come"); }
}  // namespace adakv
