#include "cpu/cpu_backend.h"
#include "adakv/error.h"
namespace adakv {
void CpuBackend::attend(const AttendArgs&) { throw Error("attend: to come"); }
size_t CpuBackend::workspace_bytes(const AttendArgs&) const { return 0; }
}  // namespace adakv
