#include "cpu/cpu_backend.h"
#include "adakv/error.h"
namespace adakv {
void CpuBackend::append(const AppendArgs&) { throw Error("append: to come"); }
}  // namespace adakv
