#include "cpu/cpu_backend.h"
#include "adakv/error.h"
namespace adakv {
void CpuBackend::value_norm(const ValueNormArgs&) { throw Error("value_norm: to come"); }
size_t CpuBackend::workspace_bytes(const ValueNormArgs&) const { return 0; }
}  // namespace adakv
