// The last step of score, where several parts make up a score: parts are reduced over the window
// and the group and pooled, in the order that was asked for.
#include "common/launch.cuh"
#include "score.cuh"

namespace adakv {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kPoolEntries = 512;  // of one CTA
constexpr int kMaxSide = 31;       // entries on one side that a pool reaches

struct PoolParams {
  ScoreParams score;
  Reduce window_reduce, group_reduce;
  int32_t num_outer;       // pooled one by one, then reduced over the group: q heads, or 1
  int32_t parts_per_head;  // of a q head; 0: parts are sums over all rows
};

__device__ float reduced(Reduce reduce, float a, float b) {
  return reduce == Reduce::kMax ? fmaxf(a, b) : a + b;
}

// The value that is pooled: of q head `outer`, or of all of them.
__device__ float unpooled(const PoolParams& params, const float* parts, int outer, int32_t t) {
  const ScoreParams& score = params.score;
  if (params.parts_per_head == 0) {
    float sum = 0.f;
    for (int i = 0; i < score.num_parts; ++i) sum += __ldcg(parts + int64_t{i} * score.length + t);
    return sum;
  }
  const int first = params.num_outer > 1 ? outer : 0;
  const int last = params.num_outer > 1 ? outer + 1 : score.group;
  float value = 0.f;
  for (int g = first; g < last; ++g) {
    float head = 0.f;
    for (int i = 0; i < params.parts_per_head; ++i) {
      const int64_t part = g * params.parts_per_head + i;
      head = reduced(params.window_reduce, head, __ldcg(parts + part * score.length + t));
    }
    value = reduced(params.group_reduce, value, head);
  }
  return value;
}

// grid: [ceil(T / kPoolEntries), B * Hkv]; one CTA: the scores of a span of entries.
__global__ void __launch_bounds__(kPoolThreads)
    score_pool_kernel(const __grid_constant__ PoolParams params) {
  __shared__ float values[kPoolEntries + 2 * kMaxSide];  // of entries first - side, ...
  const ScoreParams& score = params.score;
  const ScoreRow row(score, blockIdx.y);
  wait_for_previous_kernel();
  const int32_t first = blockIdx.x * kPoolEntries;
  const bool is_max = score.pool == Pool::kMax;
  const float outside = is_max ? -INFINITY : 0.f;
  const int side = score.side;
  const float* parts = score.parts + int64_t{blockIdx.y} * score.num_parts * score.length;
  float results[kPoolEntries / kPoolThreads] = {};
  for (int outer = 0; outer < params.num_outer; ++outer) {
    for (int i = threadIdx.x; i < kPoolEntries + 2 * side; i += kPoolThreads) {
      const int32_t t = first - side + i;
      const bool is_inside = t >= 0 && t < row.candidates;
      values[i] = is_inside ? unpooled(params, parts, outer, t) : outside;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPoolEntries / kPoolThreads; ++j) {
      const float* window = values + threadIdx.x + j * kPoolThreads;
      float pooled = window[0];
      for (int i = 1; i <= 2 * side; ++i) {
        pooled = is_max ? fmaxf(pooled, window[i]) : pooled + window[i];
      }
      results[j] = reduced(params.group_reduce, results[j], pooled);
    }
    __syncthreads();
  }
  float* scores = score.scores + row.b * score.score_stride[0] + row.h * score.score_stride[1];
#pragma unroll
  for (int j = 0; j < kPoolEntries / kPoolThreads; ++j) {
    const int32_t t = first + threadIdx.x + j * kPoolThreads;
    if (t < score.length) {
      scores[t] = t < row.candidates ? results[j] * score.weight : -INFINITY;
    }
  }
}

}  // namespace

void pool_parts(const ScoreArgs& args, const ScoreParams& score) {
  PoolParams params = {};
  params.score = score;
  params.window_reduce = args.window_reduce;
  params.group_reduce = args.group_reduce;
  params.num_outer = keeps_heads(args) && args.order == Order::kPoolFirst ? score.group : 1;
  params.parts_per_head = keeps_heads(args) ? score.num_parts / score.group : 0;
  const dim3 grid((score.length + kPoolEntries - 1) / kPoolEntries,
                  static_cast<unsigned>(args.scores.shape[0] * args.scores.shape[1]));
  launch("score", score_pool_kernel,
         {grid, kPoolThreads, 0, has_sm90("score", args.keys.device.index)}, args.stream, params);
}

}  // namespace adakv
