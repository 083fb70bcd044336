// The last step of score, where several parts make up a score: parts are reduced over the window
// and the group and pooled, in the order that was asked for.
#include "common/launch.cuh"
#include "score/score.cuh"

namespace adakv {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kPoolEntries = 512;  // of one CTA
constexpr int kPoolValues = 1024;  // a power of 2 for them and what the pool reaches
static_assert(kPoolValues >= kPoolEntries + 2 * kMaxSide, "too few");

struct PoolParams {
  ScoreParams score;
  Reduce window_reduce, group_reduce;
  int32_t num_outer;  // pooled one by one, then reduced over the group: q heads, or 1
  Pool pool;
  int32_t side;
  float weight;
};

__device__ float reduced(Reduce reduce, float a, float b) {
  return reduce == Reduce::kMax ? fmaxf(a, b) : a + b;
}

// The value that is pooled: of q head `outer`, or of all of them.
__device__ float unpooled(const PoolParams& params, const float* parts, int outer, int32_t t) {
  const ScoreParams& score = params.score;
  const int parts_per_head = max(score.parts_per_head, 1);
  const int first = params.num_outer > 1 ? outer : 0;
  const int last = params.num_outer > 1 ? outer + 1 : score.num_parts / parts_per_head;
  float value = 0.f;
  for (int g = first; g < last; ++g) {
    float head = 0.f;
    for (int i = 0; i < parts_per_head; ++i) {
      const int64_t part = int64_t{g} * parts_per_head + i;
      head = reduced(params.window_reduce, head, __ldcg(parts + part * score.length + t));
    }
    value = reduced(params.group_reduce, value, head);
  }
  return value;
}

// grid: [ceil(T / kPoolEntries), B * Hkv]; one CTA: the scores of a span of entries.
__global__ void __launch_bounds__(kPoolThreads)
    score_pool_kernel(const __grid_constant__ PoolParams params) {
  __shared__ float values[kPoolValues];  // of entries first - side, ...
  const ScoreParams& score = params.score;
  const ScoreRow row(score, blockIdx.y);
  wait_for_previous_kernel();
  const int32_t first = blockIdx.x * kPoolEntries;
  const int side = params.side;
  const float* parts = score.parts + int64_t{blockIdx.y} * score.num_parts * score.length;
  float results[kPoolEntries / kPoolThreads] = {};
  for (int outer = 0; outer < params.num_outer; ++outer) {
    for (int i = threadIdx.x; i < kPoolEntries + 2 * side; i += kPoolThreads) {
      const int32_t t = first - side + i;
      const bool is_inside = t >= 0 && t < row.candidates;
      values[i] = is_inside ? unpooled(params, parts, outer, t) : outside_of_pool(params.pool);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPoolEntries / kPoolThreads; ++j) {
      const int center = threadIdx.x + j * kPoolThreads + side;
      results[j] = reduced(params.group_reduce, results[j],
                           pooled<kPoolValues>(params.pool, side, values, center));
    }
    __syncthreads();
  }
  float* scores = score_row(score, row);
#pragma unroll
  for (int j = 0; j < kPoolEntries / kPoolThreads; ++j) {
    const int32_t t = first + threadIdx.x + j * kPoolThreads;
    if (t < score.length) {
      scores[t] = t < row.candidates ? results[j] * params.weight : -INFINITY;
    }
  }
}

}  // namespace

void pool_parts(const ScoreArgs& args, const ScoreParams& score) {
  PoolParams params = {};
  params.score = score;
  params.window_reduce = args.window_reduce;
  params.group_reduce = args.group_reduce;
  params.num_outer = pools_heads(args) ? score.group : 1;
  params.pool = args.pool;
  params.side = args.pool == Pool::kNone ? 0 : args.pool_width / 2;
  params.weight = score_weight(args);
  const dim3 grid((score.length + kPoolEntries - 1) / kPoolEntries,
                  static_cast<unsigned>(args.scores.shape[0] * args.scores.shape[1]));
  launch("score", score_pool_kernel,
         {grid, kPoolThreads, 0, has_sm90("score", args.keys.device.index)}, args.stream, params);
}

}  // namespace adakv
