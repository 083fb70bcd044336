// Attention of the last W queries of a prompt to its entries; see ops.h for the formula and
// score.cuh for how it is made. This file plans and launches. Nothing of size [heads, window, T] is
// ever stored.
#include "score.cuh"

#include <algorithm>
#include <cmath>

#include "common/device_guard.h"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "cuda_backend.h"

namespace adakv {
namespace {

// Rows of a chunk, and of a warp, whose rows are of one q head where that matters.
struct ScoreSizes {
  int rows, unit, ctas_per_sm;
};

ScoreSizes general_sizes(const ScoreArgs& args) {
  if (args.keys.dtype != DType::kFloat32) return {128, 32, 2};
  return {args.keys.shape[3] > 128 ? 32 : 64, 16, 2};
}

int num_splits(const ScoreArgs& args, int64_t num_chunks, int ctas_per_sm) {
  const int sms = device_attribute("score", args.keys.device.index, cudaDevAttrMultiProcessorCount);
  const int64_t rows = std::max<int64_t>(1, args.scores.shape[0] * args.scores.shape[1]);
  const int64_t wave = int64_t{sms} * ctas_per_sm / (rows * num_chunks);
  // One wave of equal CTAs; or, if that would leave many idle, several waves of small ones.
  const int64_t splits = wave >= 4 ? wave : 4 * sms * ctas_per_sm / (rows * num_chunks) + 1;
  return static_cast<int>(std::min<int64_t>(splits, (args.keys.shape[2] + 127) / 128 + 1));
}

// How rows are dealt to chunks and chunks to CTAs.
void plan_score(const ScoreArgs& args, const ScoreSizes& sizes, ScoreParams& params) {
  params.window = static_cast<int32_t>(args.queries.shape[2]);
  params.kv_heads = static_cast<int32_t>(args.keys.shape[1]);
  params.group = static_cast<int32_t>(args.queries.shape[1]) / params.kv_heads;
  const int units = sizes.rows / sizes.unit;    // of a chunk
  const int rows = std::max(params.window, 1);  // an empty window may be passed
  int head_units = (rows + sizes.unit - 1) / sizes.unit;
  while (head_units < units && units % head_units != 0) ++head_units;
  head_units = head_units > units ? (head_units + units - 1) / units * units : head_units;
  params.head_rows = keeps_heads(args) ? head_units * sizes.unit : rows;
  params.num_chunks = (params.group * params.head_rows + sizes.rows - 1) / sizes.rows;
  params.parts_per_chunk = keeps_heads(args) ? std::max(1, units / head_units) : 1;
  params.num_parts =
      keeps_heads(args) ? params.group * std::max(1, head_units / units) : params.num_chunks;
  params.num_splits = num_splits(args, params.num_chunks, sizes.ctas_per_sm);
}

// Scratch memory: partials, then arrivals, then parts.
int64_t num_arrivals(const ScoreArgs& args, const ScoreParams& params) {
  return args.scores.shape[0] * args.scores.shape[1] * params.num_splits;
}

int64_t partial_floats(const ScoreArgs& args, const ScoreSizes& sizes, const ScoreParams& params) {
  return 2 * num_arrivals(args, params) * params.num_chunks * sizes.rows;
}

int64_t workspace_floats(const ScoreArgs& args, const ScoreSizes& sizes) {
  ScoreParams params = {};
  plan_score(args, sizes, params);
  return partial_floats(args, sizes, params) + num_arrivals(args, params) +
         args.scores.size() * params.num_parts;
}

constexpr ScoreSizes kSm90Sizes = {kSm90ScoreRows, 32, 1};

ScoreParams make_params(const ScoreArgs& args, const ScoreSizes& sizes) {
  ScoreParams params = {};
  params.queries = args.queries.data;
  params.keys = args.keys.data;
  params.seq_lens = args.seq_lens.ptr<int32_t>();
  params.sink_logits = args.sink_logits.ptr<float>();
  params.lse = args.lse.ptr<float>();
  params.scores = args.scores.ptr<float>();
  std::copy_n(args.queries.stride, 3, params.query_stride);
  std::copy_n(args.keys.stride, 3, params.key_stride);
  std::copy_n(args.lse.stride, 2, params.lse_stride);
  std::copy_n(args.scores.stride, 2, params.score_stride);
  params.length = static_cast<int32_t>(args.keys.shape[2]);
  params.head_dim = static_cast<int32_t>(args.keys.shape[3]);
  plan_score(args, sizes, params);
  params.partials = args.workspace.ptr<float2>();
  params.arrivals = args.workspace.ptr<int32_t>() + partial_floats(args, sizes, params);
  params.parts = reinterpret_cast<float*>(params.arrivals + num_arrivals(args, params));
  params.pool = args.pool;
  params.side = args.pool == Pool::kNone ? 0 : args.pool_width / 2;
  params.weight = 1.f;
  if (args.window_reduce == Reduce::kMean) params.weight /= static_cast<float>(params.window);
  if (args.group_reduce == Reduce::kMean) params.weight /= static_cast<float>(params.group);
  if (args.pool == Pool::kAvg) params.weight /= static_cast<float>(args.pool_width);
  params.is_aligned = rows_are_aligned(args.queries, 16) && rows_are_aligned(args.keys, 16);
  const float scale =
      args.scale != 0.f ? args.scale : 1.f / std::sqrt(static_cast<float>(params.head_dim));
  params.softcap = args.softcap;
  params.cap_scale = args.softcap > 0 ? scale / args.softcap : 0.f;
  params.multiplier = args.softcap > 0 ? kLog2e : scale * kLog2e;
  return params;
}

}  // namespace

bool keeps_heads(const ScoreArgs& args) {
  return args.window_reduce == Reduce::kMax || args.group_reduce == Reduce::kMax ||
         (args.order == Order::kPoolFirst && args.pool == Pool::kMax && args.pool_width > 1);
}

void CudaBackend::score(const ScoreArgs& args) {
  const DeviceGuard guard(args.keys.device);
  if (args.scores.size() == 0) return;
  const bool is_sm90 = !keeps_heads(args) && sm90_score_fits(args);
  const ScoreParams params = make_params(args, is_sm90 ? kSm90Sizes : general_sizes(args));
  if (is_sm90) {
    sm90_score(args, params);
    if (params.num_parts == 1) return;  // pooled already
  } else {
    general_score(args, params);
  }
  pool_parts(args, params);
}

size_t CudaBackend::workspace_bytes(const ScoreArgs& args) const {
  if (args.scores.size() == 0) return 0;
  const int64_t general = workspace_floats(args, general_sizes(args));
  const int64_t sm90 = keeps_heads(args) ? 0 : workspace_floats(args, kSm90Sizes);
  return std::max(general, sm90) * sizeof(float);
}

}  // namespace adakv
