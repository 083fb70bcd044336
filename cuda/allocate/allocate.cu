// Budgets from one top-k over the heads of a layer: the launcher; see allocate.cuh.
#include "allocate/allocate.cuh"

#include <algorithm>

#include "common/device_guard.h"
#include "cuda_backend.h"

namespace adakv {
namespace {

AllocateParams make_params(const AllocateArgs& args) {
  const TensorView& scores = args.scores;
  AllocateParams params = {};
  params.scores = scores.ptr<float>();
  params.seq_lens = args.seq_lens.ptr<int32_t>();
  params.budgets = args.budgets.ptr<int32_t>();
  std::copy_n(scores.stride, 2, params.score_stride);
  params.budget_stride = args.budgets.stride[0];
  params.floor = args.floor;
  params.safeguard = args.safeguard;
  params.heads = static_cast<int32_t>(scores.shape[1]);
  params.length = static_cast<int32_t>(scores.shape[2]);
  params.window = args.window;
  params.mean = args.budget - args.window;
  while (params.position_bits < 31 && params.length > 1 << params.position_bits) {
    ++params.position_bits;
  }
  return params;
}

}  // namespace

void CudaBackend::allocate(const AllocateArgs& args) {
  const DeviceGuard guard(args.scores.device);
  if (args.scores.shape[0] == 0 || args.scores.shape[1] == 0) return;
  const AllocateParams params = make_params(args);
  if (cluster_allocate_fits(args)) return cluster_allocate(args, params);
  any_allocate(args, params);
}

size_t CudaBackend::workspace_bytes(const AllocateArgs& args) const {
  return cluster_allocate_fits(args) ? 0 : any_allocate_workspace_bytes(args);
}

}  // namespace adakv
