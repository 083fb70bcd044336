#include "cpu/cpu_backend.h"
#include "adakv/error.h"
namespace adakv {
void CpuBackend::allocate(const AllocateArgs&) { throw Error("allocate: to come"); }
size_t CpuBackend::workspace_bytes(const AllocateArgs&) const { return 0; }
}  // namespace adakv
