#include "adakv/error.h"
#include "cuda_backend.h"
namespace adakv {
void CudaBackend::append(const AppendArgs&) { throw Error("append: to come"); }
}  // namespace adakv
