#include "cpu/cpu_backend.h"
#include "adakv/error.h"
namespace adakv {
void CpuBackend::select(const SelectArgs&) { throw Error("select: to come"); }
size_t CpuBackend::workspace_bytes(const SelectArgs&) const { return 0; }
}  // namespace adakv
