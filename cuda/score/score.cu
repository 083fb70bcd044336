// Attention of the last W queries of a prompt to its entries; see ops.h for the formula and
// score.cuh for how it is made. This file plans and launches. Nothing of size [heads, window, T] is
// ever stored.
#include "score/score.cuh"

#include <algorithm>

#include "common/device_guard.h"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "cuda_backend.h"
#include "ops/scale.h"

namespace adakv {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t num_sms(const ScoreArgs& args) {
  return device_attribute("score", args.keys.device.index, cudaDevAttrMultiProcessorCount);
}

// Kv heads of all sequences, each with `chunks` chunks.
int64_t num_row_chunks(const ScoreArgs& args, int64_t chunks) {
  return std::max<int64_t>(1, args.scores.shape[0] * args.scores.shape[1]) * chunks;
}

// Tiles of each CTA along `count` entries: as many as make one wave of equal CTAs; or, if that
// would leave many idle, several waves of small ones. CTAs overlap by `side` entries on both sides.
int64_t wave_tiles(
    const ScoreArgs& args, const ScoreSizes& sizes, int64_t chunks, int64_t count, int64_t side) {
  const int64_t ctas = num_sms(args) * sizes.ctas_per_sm, rows = num_row_chunks(args, chunks);
  const int64_t most = ctas >= 4 * rows ? ctas / rows : 4 * ctas / rows + 1;
  return ceil_div(ceil_div(count, most) + 2 * side, sizes.entries);
}

// CTAs of step 1 along the entries. Where a wave has few tiles for each, fewer CTAs with at least
// sizes.lse_tiles read the queries less often and leave room for those of step 2, which fetch their
// first keys meanwhile; but never fewer than a quarter of the multiprocessors.
int num_lse_splits(const ScoreArgs& args, const ScoreSizes& sizes, int64_t chunks, int64_t length) {
  const int64_t all = ceil_div(length, sizes.entries);
  const int64_t of_quarter = 4 * all * num_row_chunks(args, chunks) / num_sms(args);
  const int64_t fewest = std::clamp<int64_t>(of_quarter, 1, sizes.lse_tiles);
  return static_cast<int>(
      ceil_div(all, std::max(wave_tiles(args, sizes, chunks, length, 0), fewest)));
}

// CTAs of step 2.
int num_spans(
    const ScoreArgs& args, const ScoreSizes& sizes, int64_t chunks, int64_t count, int64_t side) {
  const int64_t tiles = wave_tiles(args, sizes, chunks, count, side);
  return static_cast<int>(ceil_div(count, tiles * sizes.entries - 2 * side));
}

// How rows are dealt to chunks, and entries to CTAs.
void plan_score(const ScoreArgs& args, const ScoreSizes& sizes, ScoreParams& params) {
  params.window = static_cast<int32_t>(args.queries.shape[2]);
  params.kv_heads = static_cast<int32_t>(args.keys.shape[1]);
  params.group = static_cast<int32_t>(args.queries.shape[1]) / params.kv_heads;
  params.length = static_cast<int32_t>(args.keys.shape[2]);
  const int units = sizes.rows / sizes.unit;    // of a chunk
  const int rows = std::max(params.window, 1);  // an empty window may be passed
  int head_units = (rows + sizes.unit - 1) / sizes.unit;
  while (head_units < units && units % head_units != 0) ++head_units;
  head_units = head_units > units ? (head_units + units - 1) / units * units : head_units;
  const bool has_heads = keeps_heads(args), splits_heads = has_heads && !sizes.joins_heads;
  params.head_rows = has_heads ? head_units * sizes.unit : rows;
  params.num_chunks = (params.group * params.head_rows + sizes.rows - 1) / sizes.rows;
  params.parts_per_chunk = splits_heads ? std::max(1, units / head_units) : 1;
  params.parts_per_head = splits_heads ? std::max(1, head_units / units) : 0;
  params.num_parts = splits_heads ? params.group * params.parts_per_head : params.num_chunks;
  const bool pools = params.num_parts == 1 && args.pool != Pool::kNone;
  params.pool = pools ? args.pool : Pool::kNone;
  params.side = pools ? args.pool_width / 2 : 0;
  params.lse_splits = num_lse_splits(args, sizes, params.num_chunks, std::max(params.length, 1));
  params.num_spans = num_spans(args, sizes, params.num_chunks,
                               std::max(params.length - params.window, 1), params.side);
}

// Scratch memory: partials, then parts if there are several.
int64_t partial_floats(const ScoreArgs& args, const ScoreSizes& sizes, const ScoreParams& params) {
  const int64_t chunks = args.scores.shape[0] * args.scores.shape[1] * params.num_chunks;
  return 2 * chunks * params.lse_splits * sizes.rows;
}

int64_t workspace_floats(const ScoreArgs& args, const ScoreSizes& sizes) {
  ScoreParams params = {};
  plan_score(args, sizes, params);
  const int64_t parts = params.num_parts > 1 ? args.scores.size() * params.num_parts : 0;
  return partial_floats(args, sizes, params) + parts;
}

ScoreParams make_params(const ScoreArgs& args, const ScoreSizes& sizes) {
  ScoreParams params = score_inputs(args);
  plan_score(args, sizes, params);
  params.partials = args.workspace.ptr<float2>();
  params.parts = args.workspace.ptr<float>() + partial_floats(args, sizes, params);
  params.weight = params.num_parts == 1 ? score_weight(args) : 1.f;
  return params;
}

}  // namespace

ScoreParams score_inputs(const ScoreArgs& args) {
  ScoreParams params = {};
  params.queries = args.queries.data;
  params.keys = args.keys.data;
  if (args.layer.pages) params.held = layer_rows(args.layer);
  params.is_fp8 = args.layer.format() == PageFormat::kFp8;
  params.seq_lens = args.seq_lens.ptr<int32_t>();
  params.sink_logits = args.sink_logits.ptr<float>();
  params.lse = args.lse.ptr<float>();
  params.scores = args.scores.ptr<float>();
  std::copy_n(args.queries.stride, 3, params.query_stride);
  std::copy_n(args.keys.stride, 3, params.key_stride);
  std::copy_n(args.lse.stride, 2, params.lse_stride);
  std::copy_n(args.scores.stride, 2, params.score_stride);
  params.kv_heads = static_cast<int32_t>(args.keys.shape[1]);
  params.group = static_cast<int32_t>(args.queries.shape[1]) / params.kv_heads;
  params.length = static_cast<int32_t>(args.keys.shape[2]);
  params.head_dim = static_cast<int32_t>(args.keys.shape[3]);
  params.is_max = args.group_reduce == Reduce::kMax;
  params.tile_step = 1;
  params.is_aligned = rows_are_aligned(args.queries, 16) && rows_are_aligned(args.keys, 16);
  const float scale = scale_of(args);
  params.softcap = args.softcap;
  params.cap_scale = args.softcap > 0 ? scale / args.softcap : 0.f;
  params.multiplier = args.softcap > 0 ? kLog2e : scale * kLog2e;
  return params;
}

bool keeps_heads(const ScoreArgs& args) {
  return args.window_reduce == Reduce::kMax || args.group_reduce == Reduce::kMax ||
         pools_heads(args);
}

// Maxima of maxima can be made in any order, and sums of averages.
bool pools_heads(const ScoreArgs& args) {
  return args.order == Order::kPoolFirst && args.pool != Pool::kNone && args.pool_width > 1 &&
         (args.pool == Pool::kMax) != (args.group_reduce == Reduce::kMax);
}

float score_weight(const ScoreArgs& args) {
  float weight = 1.f;
  const auto divide = [&](int64_t count) { weight /= static_cast<float>(count); };
  if (args.window_reduce == Reduce::kMean) divide(args.queries.shape[2]);
  if (args.group_reduce == Reduce::kMean) divide(args.queries.shape[1] / args.keys.shape[1]);
  if (args.pool == Pool::kAvg) divide(args.pool_width);
  return weight;
}

void CudaBackend::score(const ScoreArgs& args) {
  const DeviceGuard guard(args.keys.device);
  if (args.scores.size() == 0) return;
  if (score_reads_columns(args)) return score_columns(args);
  const bool is_sm90 = sm90_score_fits(args);
  const ScoreParams params = make_params(args, is_sm90 ? kSm90ScoreSizes : any_score_sizes(args));
  if (is_sm90) {
    sm90_score(args, params);
  } else {
    any_score(args, params);
  }
  if (params.num_parts > 1) pool_parts(args, params);
}

size_t CudaBackend::workspace_bytes(const ScoreArgs& args) const {
  if (args.scores.size() == 0) return 0;
  if (score_reads_columns(args)) return score_columns_workspace_bytes(args);
  const int64_t any = workspace_floats(args, any_score_sizes(args));
  return std::max(any, workspace_floats(args, kSm90ScoreSizes)) * sizeof(float);
}

}  // namespace adakv
