// attend: the launcher. Decode over pages of 16 slots or a multiple, 16-bit elements and head dims
// 64, 80, 96, 128 and 256 go to the fast kernels (attend.cuh), and pages of codes where there is the
// bulk copy engine, for some head dims and whole tiles; all else to any.cu, and with that biases of
// entries, and values of another width than keys. Tiers, also of some widths, go to one launch of the
// fast kernels, or one after the other to those, and what is left to one of any.cu, in float32 between
// them.
#include <algorithm>
#include <optional>
#include <vector>

#include "attend/attend.h"
#include "common/device_guard.h"
#include "common/dispatch.cuh"
#include "common/dtype.cuh"
#include "cuda_backend.h"
#include "ops/tiers.h"

namespace adakv {
namespace {

bool is_coded(const AttendArgs& args) {
  return args.layer.format() != PageFormat::kPlain;
}

/// Whether a tail that the one new token fills is read in 16 bits, and quantised behind that.
bool leaves_full_tails(const AttendArgs& args) {
  return args.layer.tails && args.keys && args.keys.shape[2] == 1;
}

/// Calls the body with the head dim if there is a fast kernel for it; returns whether there is.
template <typename Body>
bool dispatch_fast(const AttendArgs& args, const Body& body) {
  const int64_t head_dim = args.queries.shape[3];
  if (is_coded(args) && !has_code_kernel(args.layer.format(), head_dim)) return false;
  return dispatch_head_dim(head_dim, body);
}

/// Whether a tile's scales begin at multiples of 16 bytes.
bool scales_are_aligned(const TensorView& scales) {
  return reinterpret_cast<uintptr_t>(scales.data) % 16 == 0 && scales.stride[0] * 2 % 16 == 0;
}

/// Whether fast kernels of the head dim take the pages, as far as these are concerned.
bool fits_fast_kernel(const AttendArgs& args) {
  if (args.layer.page_biases || args.layer.value_pages) return false;
  const int64_t page_size = args.layer.pages.shape[2], head_dim = args.queries.shape[3];
  const bool fits_tiles = page_size % tile_slots(args.layer.format(), head_dim) == 0 &&
                          args.queries.dtype != DType::kFloat32;
  const size_t query_alignment = args.layer.tails ? 16 : is_coded(args) ? 8 : 4;
  const bool is_aligned = rows_are_aligned(args.layer.pages, 16) &&
                          rows_are_aligned(args.queries, query_alignment) &&
                          rows_are_aligned(args.out, 8);
  if (!is_coded(args)) return fits_tiles && is_aligned;
  return fits_tiles && is_aligned && scales_are_aligned(args.layer.key_scales) &&
         scales_are_aligned(args.layer.value_scales) && device_copies_boxes();
}

bool has_fast_kernel(const AttendArgs& args) {
  return dispatch_fast(args, [](auto) {}) && fits_fast_kernel(args);
}

int64_t num_queries(const AttendArgs& args) {
  const int64_t heads = args.layer.lengths.shape[1];
  return heads == 0 ? 0 : args.queries.shape[1] / heads * args.queries.shape[2];
}

/// Whether the rows' ranges are those of the schedule; else each row is done in one piece.
bool cuts_rows(const AttendArgs& args) {
  return has_fast_kernel(args) &&
         num_queries(args) <= most_queries(args.layer.format(), args.queries.shape[3]);
}

/// Whether logits are stored for what accumulates; else they are made again.
bool stores_logits(const AttendArgs& args) {
  const int64_t head_dim = args.queries.shape[3];
  return args.accumulated && args.queries.shape[2] == 1 && cuts_rows(args) &&
         device_copies_boxes() &&
         has_storing_kernel(args.layer.format(), head_dim, padded_queries(num_queries(args)));
}

size_t partial_bytes(const AttendArgs& args) {
  if (!cuts_rows(args)) return 0;
  const size_t floats_per_query = args.queries.shape[3] + 2;
  return schedule::max_partials(args.num_workers) * padded_queries(num_queries(args)) *
         floats_per_query * sizeof(float);
}

/// Slots that a row has at most.
int64_t most_slots(const AttendArgs& args) {
  return args.layer.block_table.shape[2] * args.layer.page_positions.shape[1];
}

AttendParams attend_params(const AttendArgs& args) {
  AttendParams p = {};
  p.workers = args.schedule.ptr<const schedule::Worker>();
  p.rows = reinterpret_cast<schedule::RowFacts*>(args.schedule.ptr<schedule::Worker>() +
                                                 args.num_workers);
  p.layer = layer_rows(args.layer);
  p.queries = entry_rows(args.queries);
  p.out = entry_rows(args.out);
  p.lse = entry_rows(args.lse);
  p.num_new = args.num_new ? args.num_new.ptr<int32_t>() : nullptr;
  p.sink_logits = args.sink_logits ? args.sink_logits.ptr<float>() : nullptr;
  p.partials = args.workspace.ptr<float>();
  p.num_rows = static_cast<int32_t>(args.layer.lengths.shape[0]) * p.layer.num_heads;
  p.num_workers = args.num_workers;
  p.max_partials = static_cast<int32_t>(schedule::max_partials(args.num_workers));
  p.num_tokens = static_cast<int32_t>(args.queries.shape[2]);
  p.prefetches = args.prefetch && cuts_rows(args);
  p.leaves_full_tails = leaves_full_tails(args);
  p.group = Divisor::of(args.queries.shape[1] / p.layer.num_heads);
  p.num_heads = Divisor::of(p.layer.num_heads);
  p.scale = scale_of(args);
  if (args.softcap != 0) p.scale /= args.softcap;
  p.softcap = args.softcap;
  if (stores_logits(args)) {
    p.logits = args.workspace.ptr<float>() + partial_bytes(args) / sizeof(float);
    p.logits_length = static_cast<int32_t>(most_slots(args));
  }
  return p;
}

void fast_attend(const AttendArgs& args, const AttendParams& p) {
  dispatch_dtype(args.queries.dtype, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    const int64_t num_pages = args.layer.pages.shape[0];
    if constexpr (!std::is_same_v<Element, float>) {
      dispatch_fast(args, [&](auto head_dim) {
        dispatch_format(args.layer.format(), [&](auto format) {
          using Format = typename decltype(format)::type;
          if constexpr (Format::kScales == 0 || has_code_kernel(Format::kFormat, head_dim)) {
            launch_attend<Element, Format, head_dim>(p, num_pages,
                                                     static_cast<cudaStream_t>(args.stream));
          }
        });
      });
    }
  });
}

/// The tiers of a call, and which of them have fast kernels.
struct Tiers {
  std::vector<AttendArgs> args;
  TierList fast, others;
  bool has_kernel = false;  // whether one launch of the fast kernels takes all,
  int set = 0;              // which set of kTierSets these are,
  std::vector<int> kinds;   // and which kinds of it

  explicit Tiers(const AttendArgs& call) : args(tiers_of(call)) {
    bool fits = args.size() <= kMostFastTiers && device_copies_boxes() &&
                has_tiers_kernel(call.queries.shape[3], num_queries(call));
    for (size_t i = 0; i < args.size(); ++i) {
      const bool is_like_first =
          tier_column(call, i) == 0 && args[i].queries.shape[3] == call.queries.shape[3];
      (is_like_first && has_fast_kernel(args[i]) ? fast : others).push_back(i);
      fits = fits && fits_fast_kernel(args[i]) && tier_column(call, i) % 4 == 0;
    }
    const bool has_same_columns = call.out.shape[3] == call.queries.shape[3];
    for (set = 0; fits && !has_kernel && set < kNumTierSets; set += !has_kernel) {
      kinds.clear();
      for (const AttendArgs& tier : args) {
        kinds.push_back(
            tier_kind(set, tier.layer.format(), tier.queries.shape[3], call.queries.shape[3]));
      }
      has_kernel = (has_same_columns || has_narrow_tiers(set)) &&
                   *std::max_element(kinds.begin(), kinds.end()) < kTierKinds;
    }
  }

  bool is_first_fast() const { return !fast.empty() && fast[0] == 0; }
};

/// All tiers in one launch; `first` is the first one, perhaps with what it appends.
void attend_tiers(const AttendArgs& args, const Tiers& tiers, const AttendParams& first) {
  AttendTiersParams p = {};
  int64_t num_pages[kMostFastTiers] = {};
  p.num_tiers = static_cast<int32_t>(tiers.args.size());
  p.width = static_cast<int32_t>(args.out.shape[3]);
  p.set = tiers.set;
  for (size_t i = 0; i < tiers.args.size(); ++i) {
    p.tiers[i] = i == 0 ? first : attend_params(tiers.args[i]);
    p.tiers[i].sees_all = i > 0;
    p.tiers[i].prefetches = first.prefetches;
    p.kinds[i] = tiers.kinds[i];
    p.columns[i] = tier_column(args, i);
    num_pages[i] = tiers.args[i].layer.pages.shape[0];
  }
  const TensorView& queries = args.queries;
  dispatch_dtype(queries.dtype, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<Element, float>) {
      const auto stream = static_cast<cudaStream_t>(args.stream);
      if (queries.shape[3] == 64) {
        launch_attend_tiers<Element, 64>(p, num_pages, stream);
      } else {
        launch_attend_tiers<Element, 128>(p, num_pages, stream);
      }
    }
  });
}

/// Float32 memory for what a tier gave, out and lse.
struct Between {
  TensorView out, lse;

  static size_t num_bytes(const AttendArgs& args) {
    return (args.out.size() + args.out.size() / args.out.shape[3] * 4) * sizeof(float);
  }

  Between(const AttendArgs& args, char* memory) {
    const int64_t* n = args.out.shape;
    out = TensorView(memory, {n[0], n[1], n[2], n[3]}, DType::kFloat32, args.out.device);
    lse = TensorView(out.ptr<float>() + args.out.size(), {n[0], n[1], n[2]}, DType::kFloat32,
                     args.out.device);
  }
};

/// Of the partial results of a tier, which the next one's come to, too.
size_t most_partial_bytes(const Tiers& tiers) {
  size_t most = 0;
  for (const size_t i : tiers.fast) most = std::max(most, partial_bytes(tiers.args[i]));
  return most;
}

/// A launch for each tier that has a fast kernel, and one for all others. Each goes on from what those
/// before it gave.
void attend_tier_by_tier(const AttendArgs& args, const Tiers& tiers, const AttendParams& first) {
  char* memory = args.workspace.ptr<char>() + most_partial_bytes(tiers);
  const Between between[] = {{args, memory}, {args, memory + Between::num_bytes(args)}};
  const auto go_on = [&](AttendParams& p, size_t launch) {
    if (launch == 0) return;
    p.sink_logits = nullptr;
    p.before_out = entry_rows(between[launch % 2].out);
    p.before_lse = entry_rows(between[launch % 2].lse);
  };
  for (size_t launch = 0; launch < tiers.fast.size(); ++launch) {
    const size_t tier = tiers.fast[launch];
    AttendParams p = tier == 0 ? first : attend_params(tiers.args[tier]);
    p.sees_all = tier > 0;
    if (launch > 0) p.prefetches = cuts_rows(tiers.args[tier]);  // nobody writes to its pages
    go_on(p, launch);
    p.writes_floats = launch + 1 < tiers.fast.size() || !tiers.others.empty();
    if (p.writes_floats) {
      p.out = entry_rows(between[(launch + 1) % 2].out);
      p.lse = entry_rows(between[(launch + 1) % 2].lse);
    }
    fast_attend(tiers.args[tier], p);
  }
  if (tiers.others.empty()) return;
  AttendParams p = first;
  go_on(p, tiers.fast.size());
  any_attend(args, p, tiers.others);
}

size_t tiers_workspace_bytes(const AttendArgs& args) {
  if (args.queries.size() == 0) return 0;
  const DeviceGuard guard(args.queries.device);
  const Tiers tiers(args);
  if (tiers.fast.empty()) return 0;
  if (!tiers.has_kernel) return most_partial_bytes(tiers) + 2 * Between::num_bytes(args);
  const size_t slots = schedule::max_partials(args.num_workers) + args.layer.lengths.size();
  return tiers.args.size() * slots * padded_queries(num_queries(args)) *
         (args.queries.shape[3] + 2) * sizeof(float);
}

}  // namespace

// ------------------------------------------------------------------------------------------------

void CudaBackend::attend(const AttendArgs& args) {
  if (args.queries.size() == 0) return;
  const DeviceGuard guard(args.queries.device);
  AttendParams p = attend_params(args);
  const bool leaves = p.leaves_full_tails;
  std::optional<Tiers> tiers;
  if (!args.others.empty()) tiers.emplace(args);
  const bool is_fast = tiers ? tiers->is_first_fast() : has_fast_kernel(args);
  const bool appends_along = args.keys && is_fast && cuts_rows(args) &&
                             rows_are_aligned(args.keys, 16) && rows_are_aligned(args.values, 16) &&
                             (!args.layer.tails || leaves);
  const AppendArgs to_append = {args.keys, args.values, args.num_new, args.layer, args.stream};
  if (appends_along) {
    p.append = append_params(args.layer, args.keys, args.values, args.num_new);
  } else if (args.keys) {
    launch_append(to_append, leaves ? FullTails::kLeave : FullTails::kQuantise);
  }
  if (tiers && tiers->has_kernel) {
    attend_tiers(args, *tiers, p);
  } else if (tiers) {
    attend_tier_by_tier(args, *tiers, p);
  } else if (is_fast) {
    fast_attend(args, p);
  } else {
    any_attend(args, p, {0});
  }
  if (args.accumulated) {
    if (p.logits) {
      accumulate_logits(args, p);
    } else {
      accumulate_keys(args, p);
    }
  }
  if (leaves && !appends_along) quantise_filled_tails(to_append);
}

size_t CudaBackend::workspace_bytes(const AttendArgs& args) const {
  if (!args.others.empty()) return tiers_workspace_bytes(args);
  if (!args.accumulated) return partial_bytes(args);
  const DeviceGuard guard(args.queries.device);  // which may store logits, whatever others do
  size_t bytes = partial_bytes(args);
  if (stores_logits(args)) {
    bytes += args.layer.lengths.size() * most_slots(args) * padded_queries(num_queries(args)) *
             sizeof(float);
  }
  return bytes;
}

}  // namespace adakv
