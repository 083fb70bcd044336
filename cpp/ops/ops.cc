// The front door: every verb checks its arguments here, once for both backends, and goes on to the
// backend of its tensors.
//
// Values on a device can't be looked at without waiting for it, so only shapes, dtypes, devices and
// options are checked; the CPU's small integer inputs (seq_lens, num_new) are checked too, as that
// costs nothing.
#include "adakv/ops.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "adakv/error.h"
#include "ops/backend.h"
#include "ops/check.h"
#include "ops/check_layer.h"
#include "ops/listing.h"
#include "ops/schedule.h"

namespace adakv {
namespace {

// G = Hq / Hkv.
void check_group(const Checker& check) {
  const int64_t hq = check.size("Hq"), hkv = check.size("Hkv");
  check.require(hkv >= 1 && hq % hkv == 0 && hq / hkv >= 1 && hq / hkv <= 16,
                "q heads must be 1 to 16 times the kv heads, got Hq = ", hq, " and Hkv = ", hkv);
}

const char* name_of(const LayerView& layer) {
  return facts_of(layer.format()).name;
}

// Of attend's out: values of two kinds side by side.
constexpr int64_t kMostColumns = 512;

// Far more than any prompt has, and small enough to count with in int32.
constexpr int64_t kMostPositions = int64_t{1} << 26;

void check_num_workers(const Checker& check, int num_workers) {
  check.require(num_workers >= 1 && num_workers <= schedule::kMostWorkers,
                "num_workers must be from 1 to ", schedule::kMostWorkers, ", got ", num_workers);
}

// An optional [B] int32 tensor whose values lie in 0 .. limit.
void check_counts(Checker& check, const char* name, const TensorView& counts, int64_t limit) {
  check.optional(name, counts, "B", DType::kInt32);
  if (!counts || counts.device.type != DeviceType::kCpu) return;
  for (int64_t b = 0; b < counts.shape[0]; ++b) {
    const int32_t count = counts.ptr<int32_t>()[b];
    check.require(count >= 0 && count <= limit, name, " must lie in 0 .. ", limit, ", got ", count,
                  " for sequence ", b);
  }
}

// The lengths [B, Hkv] of a layer's rows, if there is one.
void check_row_lengths(const Checker& check, const TensorView& lengths, int64_t limit) {
  if (!lengths || lengths.device.type != DeviceType::kCpu) return;
  for (int64_t row = 0; row < lengths.size(); ++row) {
    const int64_t b = row / lengths.shape[1], h = row % lengths.shape[1];
    const int32_t length = lengths.ptr<int32_t>()[b * lengths.stride[0] + h * lengths.stride[1]];
    check.require(length >= 0 && length <= limit, "lengths must lie in 0 .. ", limit, ", got ",
                  length, " for row (", b, ", ", h, ")");
  }
}

void check_options(const Checker& check, float scale, float softcap) {
  check.require(std::isfinite(scale), "scale must be finite, got ", scale);
  check.require(std::isfinite(softcap) && softcap >= 0, "softcap must be 0 (none) or more, got ",
                softcap);
}

// Tokens that fit one append: KVCache::grow never hands out more.
void check_new_tokens(const Checker& check) {
  const int64_t most = check.size("F") * check.size("P"), s = check.size("S");
  check.require(s <= most, "at most F * P = ", most,
                " tokens can be appended in one piece, got S = ", s);
}

// Each verb's checks; then the backend that runs it.

Backend& checked(const ScoreArgs& args) {
  Checker check("score");
  check.floats("queries", args.queries, "B Hq W D");
  if (args.keys) {
    check.require(!args.layer.pages, "layer must be left out where keys are given");
    check.floats("keys", args.keys, "B Hkv T D");
    check_head_dim(check);
    check_counts(check, "seq_lens", args.seq_lens, check.size("T"));
  } else {
    check.require(static_cast<bool>(args.layer.pages), "keys or a layer must be given");
    check.require(!args.seq_lens, "seq_lens must be left out with a layer, which has lengths");
    check.require(!args.layer.tails, "layer must not be of ", name_of(args.layer));
    check.require(!args.layer.page_biases, "layer must be without page_biases");
    check_head_dim(check);
    check_layer(check, args.layer);
  }
  check_group(check);
  check.optional("sink_logits", args.sink_logits, "Hq", DType::kFloat32);
  check.optional("lse", args.lse, "B Hq W", DType::kFloat32);
  check_options(check, args.scale, args.softcap);
  check.require(args.pool_width >= 1 && args.pool_width % 2 == 1 && args.pool_width <= 63,
                "pool_width must be odd, 1 to 63, got ", args.pool_width);
  check.require(args.window >= -1, "window must be -1 (that of the queries) or more, got ",
                args.window);
  check.require(args.stride >= 1 && args.stride * check.size("W") <= kMostPositions,
                "stride must be at least 1, and W * stride at most 2^26, got stride = ",
                args.stride, " and W = ", check.size("W"));
  check.require(args.distance >= 0 && args.distance <= kMostPositions,
                "distance must lie in 0 .. 2^26, got ", args.distance);
  check.tensor("scores", args.scores, "B Hkv T", DType::kFloat32);
  check_row_lengths(check, args.layer.lengths, check.size("T"));
  return backend(args.queries.device.type);
}

Backend& checked(const ValueNormArgs& args) {
  Checker check("value_norm");
  check.floats("values", args.values, "B Hkv T D");
  check.floats("w_o", args.w_o, "E HqD");
  check_head_dim(check);
  const int64_t d = check.size("D"), hkv = check.size("Hkv"), columns = check.size("HqD");
  check.require(
      hkv >= 1 && columns % (hkv * d) == 0 && columns / (hkv * d) >= 1 && columns / (hkv * d) <= 16,
      "w_o must be [E, Hq * D] with Hq 1 to 16 times the kv heads, got ", args.w_o.shape_string(),
      " for Hkv = ", hkv, " and D = ", d);
  check_counts(check, "seq_lens", args.seq_lens, check.size("T"));
  check.tensor("norms", args.norms, "B Hkv T", DType::kFloat32);
  return backend(args.values.device.type);
}

Backend& checked(const AllocateArgs& args) {
  Checker check("allocate");
  check.tensor("scores", args.scores, "B Hkv T", DType::kFloat32);
  check_counts(check, "seq_lens", args.seq_lens, check.size("T"));
  check.require(args.window >= 0, "window must not be negative, got ", args.window);
  check.require(args.budget >= args.window,
                "budget must be at least the window, got budget = ", args.budget,
                " and window = ", args.window);
  check.require(args.floor >= 0 && args.floor <= 1, "floor must lie in 0 .. 1, got ", args.floor);
  check.tensor("budgets", args.budgets, "B Hkv", DType::kInt32);
  return backend(args.scores.device.type);
}

Backend& checked(const SelectArgs& args) {
  Checker check("select");
  check.tensor("scores", args.scores, "B Hkv T", DType::kFloat32);
  check.tensor("budgets", args.budgets, "B Hkv", DType::kInt32);
  check.optional("norms", args.norms, "B Hkv T", DType::kFloat32);
  check_counts(check, "seq_lens", args.seq_lens, check.size("T"));
  check.require(args.window >= 0, "window must not be negative, got ", args.window);
  check.require(args.first >= 0 && args.first <= 1, "first must lie in 0 .. 1, got ", args.first);
  check.require(std::isfinite(args.eps) && args.eps >= 0, "eps must be 0 or more, got ", args.eps);
  check.tensor("positions", args.positions, "K", DType::kInt32);
  check.tensor("indptr", args.indptr, "R+1", DType::kInt32);
  const int64_t rows = check.size("B") * check.size("Hkv");
  check.require(check.size("R+1") == rows + 1, "indptr must have ", rows + 1, " elements, got ",
                check.size("R+1"));
  return backend(args.scores.device.type);
}

Backend& checked(const CompactArgs& args) {
  Checker check("compact");
  check.require(static_cast<bool>(args.keys) == static_cast<bool>(args.values),
                "keys and values must be given together");
  if (args.keys) {
    check.floats("keys", args.keys, "B Hkv T D");
    check.floats("values", args.values, value_dims(args.layer, "B Hkv T D", "B Hkv T Dv"));
    check_head_dim(check);
  } else {
    check.require(!args.seq_lens, "seq_lens must be left out where keys are");
    check.require(!args.places, "places must be left out where keys are");
    check.require(!args.biases, "biases must be left out where keys are: entries keep theirs");
    check.require(!args.layer.tails, "keys and values must be given for a layer of ",
                  name_of(args.layer));
    check_held_layer(check, args.layer);
  }
  check.tensor("positions", args.positions, "K", DType::kInt32);
  check.tensor("indptr", args.indptr, "R+1", DType::kInt32);
  const int64_t rows = check.size("B") * check.size("Hkv");
  check.require(check.size("R+1") == rows + 1, "indptr must have ", rows + 1, " elements, got ",
                check.size("R+1"));
  check.optional("places", args.places, "K", DType::kInt32);
  check.require(!args.places || static_cast<bool>(args.seq_lens),
                "seq_lens must be given with places");
  check_counts(check, "seq_lens", args.seq_lens,
               args.places ? schedule::kMostLength : check.size("T"));
  check.tensor("page_ids", args.page_ids, "Q", DType::kInt32);
  check.tensor("page_indptr", args.page_indptr, "B+1", DType::kInt32);
  check.require(check.size("B+1") == check.size("B") + 1, "page_indptr must have ",
                check.size("B") + 1, " elements, got ", check.size("B+1"));
  if (args.keys) check_layer(check, args.layer);
  check.optional("biases", args.biases, "B Hkv T", DType::kFloat16);
  check.require(!args.biases || static_cast<bool>(args.layer.page_biases),
                "biases must be left out for a layer without page_biases");
  return backend(args.positions.device.type);
}

Backend& checked(const AppendArgs& args) {
  Checker check("append");
  check.floats("keys", args.keys, "B Hkv S D");
  check.floats("values", args.values, value_dims(args.layer, "B Hkv S D", "B Hkv S Dv"));
  check_head_dim(check);
  check_layer(check, args.layer);
  check_new_tokens(check);
  check_counts(check, "num_new", args.num_new, check.size("S"));
  return backend(args.keys.device.type);
}

Backend& checked(const ForkArgs& args) {
  Checker check("fork");
  check_any_layer(check, args.layer);
  check.tensor("source_table", args.source_table, "A Hkv M", DType::kInt32);
  check.tensor("source_lengths", args.source_lengths, "A Hkv", DType::kInt32);
  check.tensor("source_seen", args.source_seen, "A", DType::kInt32);
  if (args.layer.tails) {
    check.require(!args.back, "back must be left out for ", name_of(args.layer),
                  " pages, whose keys share scales");
    check_tails(check, "source_tails", args.source_tails, "A Hkv 2P D");
  } else {
    check.require(!args.source_tails, "source_tails must be left out for pages without tails");
  }
  check.tensor("sources", args.sources, "B", DType::kInt32);
  check.tensor("stretch", args.stretch, "B", DType::kInt32);
  check.optional("back", args.back, "B", DType::kInt32);
  check.tensor("page_ids", args.page_ids, "Q", DType::kInt32);
  check.tensor("page_indptr", args.page_indptr, "B+1", DType::kInt32);
  check.require(check.size("B+1") == check.size("B") + 1, "page_indptr must have ",
                check.size("B") + 1, " elements, got ", check.size("B+1"));
  return backend(args.layer.pages.device.type);
}

// How many pages of a row shortlist lists.
template <typename Args>
void check_listing(Checker& check, const Args& args) {
  check.require(args.share > 0 && args.share <= 1, "share must be above 0 and at most 1, got ",
                args.share);
  check.require(args.least >= 0, "least must not be negative, got ", args.least);
  check.require(args.newest >= 1, "newest must be at least 1, got ", args.newest);
}

Backend& checked(const PlanArgs& args) {
  Checker check("plan");
  check.tensor("lengths", args.lengths, "L B Hkv", DType::kInt32);
  check.tensor("block_table", args.block_table, "L B Hkv M", DType::kInt32);
  check.tensor("fresh_pages", args.fresh_pages, "L B Hkv F", DType::kInt32);
  check.require(args.new_tokens >= 0, "new_tokens must not be negative, got ", args.new_tokens);
  check_counts(check, "num_new", args.num_new, args.new_tokens);
  check.require(
      args.page_size >= 8 && args.page_size <= 256 && (args.page_size & (args.page_size - 1)) == 0,
      "page_size must be a power of two from 8 to 256, got ", args.page_size);
  const int64_t most = check.size("F") * args.page_size;
  check.require(args.new_tokens <= most, "at most F * P = ", most,
                " tokens can be appended in one piece, got new_tokens = ", args.new_tokens);
  check_num_workers(check, args.num_workers);
  if (args.share != 0) check_listing(check, args);
  check.tensor("schedule", args.schedule, "L X", DType::kInt32);
  const int64_t wanted = schedule_size(check.size("B") * check.size("Hkv"), args.num_workers);
  check.require(check.size("X") == wanted, "schedule must be [L, ", wanted, "], got ",
                args.schedule.shape_string());
  check.aligned("schedule", args.schedule);
  check.require(args.schedule.shape[0] <= 1 || args.schedule.stride[0] % 4 == 0,
                "schedule: layers must lie a multiple of 4 elements apart, got ",
                args.schedule.stride[0]);
  return backend(args.lengths.device.type);
}

void check_accumulated(Checker& check, const AttendArgs& args) {
  if (!args.accumulated) return;
  check.require(!args.layer.page_biases,
                "accumulated must be left out for a layer with page_biases");
  check.tensor("accumulated", args.accumulated, "B Hkv T", DType::kFloat32);
  const int64_t most = check.size("M") * check.size("P");
  check.require(check.size("T") >= most,
                "accumulated must be [B, Hkv, T] with T at least M * P = ", most, ", got ",
                args.accumulated.shape_string());
  check.require(static_cast<bool>(args.lse), "lse must be given with accumulated");
  check.require(args.decay >= 0 && args.decay <= 1, "decay must lie in 0 .. 1, got ", args.decay);
  check.require(std::isfinite(args.threshold) && args.threshold >= 0,
                "threshold must be 0 (1 / number of tokens) or more, got ", args.threshold);
}

void check_schedule(Checker& check, const TensorView& schedule, int num_workers) {
  check.tensor("schedule", schedule, "X", DType::kInt32);
  const int64_t wanted = schedule_size(check.size("B") * check.size("Hkv"), num_workers);
  check.require(check.size("X") == wanted, "schedule must be [", wanted, "], got ",
                schedule.shape_string());
  check.aligned("schedule", schedule);
}

// One of the tiers that a call has beside its layer. Returns where its columns of out end.
int64_t check_tier(const AttendArgs& args, size_t index) {
  const std::string verb = detail::concat("attend: others[", index, "]");
  Checker check(verb.c_str());
  const Tier& tier = args.others[index];
  check.floats("out", args.out, "B Hq S O");  // what was checked already binds the sizes
  check.tensor("layer.lengths", args.layer.lengths, "B Hkv", DType::kInt32);
  check.floats("queries", tier.queries ? tier.queries : args.queries, "B Hq S D");
  check_head_dim(check);
  check_layer(check, tier.layer);
  check_schedule(check, tier.schedule, args.num_workers);
  check.require(tier.column >= 0, "column must not be negative, got ", tier.column);
  const LayerView& layer = tier.layer;
  return tier.column + (layer.value_pages && !layer.tails ? check.size("Dv") : check.size("D"));
}

// The tiers beside the layer, and the width of out, which holds the columns of all of them.
void check_others(Checker& check, const AttendArgs& args) {
  check.require(args.others.size() <= kMostOthers, "others must be at most ", kMostOthers, ", got ",
                args.others.size());
  check.require(!args.accumulated, "accumulated must be left out with others");
  check.floats("out", args.out, "B Hq S O");
  int64_t width = args.layer.value_pages && !args.layer.tails ? check.size("Dv") : check.size("D");
  for (size_t i = 0; i < args.others.size(); ++i) width = std::max(width, check_tier(args, i));
  check.require(check.size("O") == width && width <= kMostColumns, "out must be [B, Hq, S, ", width,
                "], the columns of all tiers, at most ", kMostColumns, ", got ",
                args.out.shape_string());
}

Backend& checked(const AttendArgs& args) {
  Checker check("attend");
  check.floats("queries", args.queries, "B Hq S D");
  check_head_dim(check);
  check_layer(check, args.layer);
  check_group(check);
  check_num_workers(check, args.num_workers);
  check_schedule(check, args.schedule, args.num_workers);
  check.require(static_cast<bool>(args.keys) == static_cast<bool>(args.values),
                "keys and values must be given together");
  if (args.keys) {
    check.floats("keys", args.keys, "B Hkv S D");
    check.floats("values", args.values, value_dims(args.layer, "B Hkv S D", "B Hkv S Dv"));
    check_new_tokens(check);
  }
  check_counts(check, "num_new", args.num_new, check.size("S"));
  check.optional("sink_logits", args.sink_logits, "Hq", DType::kFloat32);
  check_options(check, args.scale, args.softcap);
  check.optional("lse", args.lse, "B Hq S", DType::kFloat32);
  if (args.others.empty()) {
    check.floats("out", args.out, value_dims(args.layer, "B Hq S D", "B Hq S Dv"));
    check_accumulated(check, args);
  } else {
    check_others(check, args);
  }
  return backend(args.queries.device.type);
}

Backend& checked(const ShortlistArgs& args) {
  Checker check("shortlist");
  check.floats("queries", args.queries, "B Hq S D");
  check_head_dim(check);
  check.floats("bounds", args.bounds, "N 2D");
  check.require(
      check.size("2D") == 2 * check.size("D") && args.bounds.stride[0] == check.size("2D"),
      "bounds must be contiguous [N, 2 D] with D = ", check.size("D"), ", got ",
      args.bounds.shape_string());
  check.aligned("bounds", args.bounds);
  check.tensor("lengths", args.lengths, "B Hkv", DType::kInt32);
  check_group(check);
  check.tensor("block_table", args.block_table, "B Hkv M", DType::kInt32);
  check_counts(check, "num_new", args.num_new, check.size("S"));
  check_options(check, args.scale, args.softcap);
  check.require(args.page_size >= 1 && args.page_size <= 256, "page_size must be 1 to 256, got ",
                args.page_size);
  check_row_lengths(check, args.lengths, check.size("M") * args.page_size);
  check_listing(check, args);
  check.require(args.mass > 0 && args.mass <= 1, "mass must be above 0 and at most 1, got ",
                args.mass);
  check.tensor("listed", args.listed, "B Hkv X", DType::kInt32);
  check.tensor("listed_lengths", args.listed_lengths, "B Hkv", DType::kInt32);
  const int64_t newest = std::min(check.size("M"), listing::newest_pages(args));
  check.require(check.size("X") >= newest, "listed must have room for the newest ", newest,
                " pages of a row, got ", args.listed.shape_string());
  return backend(args.queries.device.type);
}

// Arguments as backends get them.
template <typename Args>
const Args& for_backend(const Args& args) {
  return args;
}

// The keys of a layer are a tensor that says their shape and dtype: where they lie, the layer says.
ScoreArgs for_backend(const ScoreArgs& given) {
  ScoreArgs args = given;
  if (args.keys) return args;
  args.keys = TensorView(
      args.layer.pages.data,
      {args.scores.shape[0], args.scores.shape[1], args.scores.shape[2], args.queries.shape[3]},
      args.queries.dtype, args.queries.device);
  return args;
}

// Runs a verb that needs scratch memory.
template <typename Args>
void run(const char* verb, void (Backend::*body)(const Args&), const Args& args) {
  Backend& backend = checked(args);
  const auto& given = for_backend(args);
  Checker(verb).workspace(args.workspace, backend.workspace_bytes(given));
  (backend.*body)(given);
}

}  // namespace

void score(const ScoreArgs& args) {
  run("score", &Backend::score, args);
}
void value_norm(const ValueNormArgs& args) {
  run("value_norm", &Backend::value_norm, args);
}
void allocate(const AllocateArgs& args) {
  run("allocate", &Backend::allocate, args);
}
void select(const SelectArgs& args) {
  run("select", &Backend::select, args);
}
void compact(const CompactArgs& args) {
  run("compact", &Backend::compact, args);
}
void append(const AppendArgs& args) {
  checked(args).append(args);
}
void fork(const ForkArgs& args) {
  checked(args).fork(args);
}
void plan(const PlanArgs& args) {
  checked(args).plan(args);
}
void attend(const AttendArgs& args) {
  run("attend", &Backend::attend, args);
}
void shortlist(const ShortlistArgs& args) {
  run("shortlist", &Backend::shortlist, args);
}

size_t workspace_bytes(const ScoreArgs& args) {
  return checked(args).workspace_bytes(for_backend(args));
}
size_t workspace_bytes(const ValueNormArgs& args) {
  return checked(args).workspace_bytes(args);
}
size_t workspace_bytes(const AllocateArgs& args) {
  return checked(args).workspace_bytes(args);
}
size_t workspace_bytes(const SelectArgs& args) {
  return checked(args).workspace_bytes(args);
}
size_t workspace_bytes(const CompactArgs& args) {
  return checked(args).workspace_bytes(args);
}
size_t workspace_bytes(const AttendArgs& args) {
  return checked(args).workspace_bytes(args);
}
size_t workspace_bytes(const ShortlistArgs& args) {
  return checked(args).workspace_bytes(args);
}

int64_t schedule_size(int64_t num_rows, int num_workers) {
  constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();
  const Checker check("schedule_size");
  check.require(num_rows >= 0 && num_rows <= kMostRows, "num_rows must lie in 0 .. ", kMostRows,
                ", got ", num_rows);
  check_num_workers(check, num_workers);
  return static_cast<int64_t>(num_workers) * schedule::kWorkerInts + num_rows * schedule::kRowInts;
}

int default_num_workers(Device device) {
  return backend(device.type).default_num_workers(device);
}

Memory& device_memory(Device device) {
  return backend(device.type).memory(device);
}

#ifndef ADAKV_HAS_CUDA
Backend* cuda_backend() {
  return nullptr;
}

bool cuda_available(std::string* reason) {
  if (reason) *reason = "adakv was built without CUDA";
  return false;
}
#endif

Backend& backend(DeviceType type) {
  if (type == DeviceType::kCpu) return cpu_backend();
  std::string reason;
  if (!cuda_available(&reason)) throw Error(reason);
  return *cuda_backend();
}

}  // namespace adakv
