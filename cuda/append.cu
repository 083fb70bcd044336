// Writes new entries behind the last one of every row. A row that fills its page goes on in its
// next fresh one.
//
// A decode step's few tokens are one launch, with a block for each sequence. More tokens are shared
// out to several blocks; lengths may then change only when all have read them: a second launch.
#include "append.cuh"

#include <algorithm>

#include "common/check.cuh"
#include "common/device_guard.h"
#include "common/dispatch.cuh"
#include "common/divisor.cuh"
#include "cuda_backend.h"

namespace adakv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRows = 2;                // that a warp has under way
constexpr int64_t kEntriesPerWarp = 4;  // with more, further blocks pay

/// How the warps of a sequence share out its rows and tokens.
struct Steps {
  Divisor heads;
  int32_t tokens;
};

// grid: [blocks of a sequence, B]; one warp: some rows of the sequence, some of its tokens.
template <typename Batch>
__global__ void __launch_bounds__(kThreads, 2)
    append_kernel(const __grid_constant__ AppendParams p, Steps steps) {
  const int32_t b = blockIdx.y;
  const int32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  const int32_t first_token = steps.heads.quotient(warp);
  if (first_token < steps.tokens) {
    append_entries<Batch>(
        p, b, {steps.heads.remainder(warp), steps.heads.value, first_token, steps.tokens});
  }
  if (gridDim.x > 1) return;
  __syncthreads();
  count_appended(p, b, threadIdx.x, kThreads);
}

// grid: [B]
__global__ void __launch_bounds__(kThreads)
    append_count_kernel(const __grid_constant__ AppendParams p) {
  count_appended(p, blockIdx.x, threadIdx.x, kThreads);
}

}  // namespace

// ------------------------------------------------------------------------------------------------

void CudaBackend::append(const AppendArgs& args) {
  const DeviceGuard guard(args.keys.device);
  const AppendParams p = append_params(args.layer, args.keys, args.values, args.num_new);
  if (p.batch == 0 || p.num_tokens == 0) return;
  const cudaStream_t stream = static_cast<cudaStream_t>(args.stream);
  const int64_t entries = int64_t{p.layer.num_heads} * p.num_tokens;
  const int64_t wanted = p.num_tokens == 1 ? 1 : entries / (kWarps * kEntriesPerWarp);
  const dim3 grid(static_cast<uint32_t>(std::clamp<int64_t>(wanted, 1, 256)),
                  static_cast<uint32_t>(p.batch));
  const bool is_aligned = rows_are_aligned(args.keys, 16) && rows_are_aligned(args.values, 16) &&
                          rows_are_aligned(args.layer.pages, 16);
  const int32_t num_warps = static_cast<int32_t>(grid.x) * kWarps;
  Steps steps = {Divisor::of(std::clamp(p.layer.num_heads, 1, num_warps)), 0};
  steps.tokens = num_warps / steps.heads.value;
  const auto run = [&](auto batch) {
    append_kernel<typename decltype(batch)::type><<<grid, kThreads, 0, stream>>>(p, steps);
  };
  if (args.layer.key_scales) {
    dispatch_codes(args.keys.dtype, args.layer.pages.dtype, [&](auto element, auto format) {
      using Batch =
          CodeBatch<typename decltype(element)::type, typename decltype(format)::type, kRows>;
      run(TypeTag<Batch>{});
    });
  } else {
    dispatch_chunk(is_aligned, args.keys.dtype, [&](auto chunk) {
      run(TypeTag<EntryBatch<typename decltype(chunk)::type, kRows>>{});
    });
  }
  ADAKV_CUDA_CHECK("append", cudaGetLastError());
  if (grid.x > 1) {
    append_count_kernel<<<p.batch, kThreads, 0, stream>>>(p);
    ADAKV_CUDA_CHECK("append", cudaGetLastError());
  }
}

}  // namespace adakv
