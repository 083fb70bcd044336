#include "cpu/cpu_backend.h"
#include "adakv/error.h"
namespace adakv {
void CpuBackend::compact(const CompactArgs&) { throw Error("compact: to come"); }
size_t CpuBackend::workspace_bytes(const CompactArgs&) const { return 0; }
}  // namespace adakv
