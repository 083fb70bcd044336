// The ten verbs.
//
//   prefill:  score, value_norm -> allocate -> select -> compact
//   decode:   plan, append -> attend
//   sparse reads, while decoding: plan, append -> shortlist -> attend
//
// Each verb is one struct and one function. A struct lists inputs, options, outputs, then scratch
// memory and the stream. The function checks its arguments (InvalidArgument names the argument,
// what was expected and what came), then runs the backend of the tensors' device. No verb allocates
// device memory, waits for the device or copies to the host; on CUDA all ten can be recorded in a
// graph. All tensors of a call live on one device. Floating-point tensors of a call have one dtype
// unless said.
//
// Letters: B sequences, T prompt length (padded at the end), S new tokens, W window, Hq q heads,
// Hkv kv heads, G = Hq / Hkv, D dimensions of a query and a key, Dv of a value (multiples of 8, at
// most 256; D unless the layer has value_pages), E model width, P page size, N pages in the pool, M
// most pages of a row, F fresh pages of a row, K kept entries of the whole batch, L layers, Z =
// ceil(D / 64) scale groups of an entry in quantised pages. A row is one (sequence, kv head) pair.
// The last dimension of every tensor is contiguous; other strides are free.
//
// Threads and streams: verbs may run at the same time as long as none writes a tensor that another
// one uses. attend writes its schedule (and leaves it as it was): two launches that may overlap need
// a schedule each.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "adakv/kv_cache.h"
#include "adakv/types.h"

#pragma GCC visibility push(default)  // what a shared adakv shows
namespace adakv {

/// How several numbers become one, see ScoreArgs.
enum class Reduce : uint8_t { kMean, kMax, kSum };
/// How a score takes part in its neighbours', see ScoreArgs.
enum class Pool : uint8_t { kMax, kAvg, kNone };
/// Whether the q heads of a group are reduced before pooling or after it, see ScoreArgs.
enum class Order : uint8_t { kGroupFirst, kPoolFirst };
/// What a head gets however low its scores are, see AllocateArgs.
enum class Safeguard : uint8_t { kBlend, kHardFloor, kOfficialRound, kNone };
/// The size of an entry's part in the layer's output, see ValueNormArgs.
enum class Norm : uint8_t { kL1, kL2Gram };
/// How what an entry is given in one step joins what it was given before, see AttendArgs.
enum class Accumulate : uint8_t { kSum, kMax, kLast };

/// How strongly the last W queries of the prompt attend to each entry (SnapKV, arXiv 2404.14469;
/// the base of Ada-KV and CriticalKV). With W = T, all of its queries (H2O, arXiv 2306.14048).
///   z[q,w,t]    = softcap * tanh(queries[q,w] . keys[q / G, t] * scale / softcap)
///                 (without softcap: the bare product)
///   p[q,w,:]    = softmax over t of z[q,w,:], causal, the window and the head's sink included
///   scores[h,t] = pool over t ( group_reduce over q of h ( window_reduce over w ( p[q,w,t] ) ) )
/// Query w stands at position(w) = seq_len - 1 - (W - 1 - w) * stride, and counts for the entries up
/// to position(w) - distance; a mean is over the queries that count, 0 if there are none. All in
/// float32. Max-pooling ignores what lies outside the candidates 0 .. n-1, n = seq_len - window;
/// average pooling counts it as zero.
/// With a layer instead of keys, the keys are those that its rows hold, read where they lie: row
/// (b, h) has entries 0 .. lengths[b, h] - 1, of which the last ones are its window, and n differs
/// from row to row. Of quantised pages, a key is what codes and scale say, rounded to the dtype of the
/// queries; not of a layer with tails, and not of a layer with page_biases.
struct ScoreArgs {
  TensorView queries;   // [B, Hq, W, D]   of each sequence's last positions, after RoPE
  TensorView keys;      // [B, Hkv, T, D]  prompt keys, after RoPE; not given: those of the layer
  LayerView layer;      // of the same B sequences, in; given if keys are not
  TensorView seq_lens;  // [B] int32       prompt lengths, 0 .. T; not given: all T, or the layer's
  TensorView sink_logits;  // [Hq] float32    optional: joins each softmax, attends to nothing
  TensorView lse;          // [B, Hq, W] float32  optional: natural log-sum-exp of z, sink included
  float scale = 0.f;       // 0: 1 / sqrt(D)
  float softcap = 0.f;     // 0: none
  Reduce window_reduce = Reduce::kMean;  // over the queries of the window
  Reduce group_reduce = Reduce::kMean;   // over the q heads of a group
  Order order = Order::kGroupFirst;      // kPoolFirst: pool each q head, then reduce the group
  Pool pool = Pool::kMax;                // over neighbouring positions
  int pool_width = 7;                    // odd
  int window = -1;                       // last positions of the prompt, which don't compete; -1: W
  int stride = 1;                        // positions from one query to the next
  int distance = 0;         // positions that a query is behind an entry, at least, to count for it
  TensorView scores;        // [B, Hkv, T] float32, out; -inf from n on; T at least the longest row
  TensorView workspace;     // [workspace_bytes(args) / 4] int32
  Stream stream = nullptr;  // where CUDA work is put
};
/// Writes args.scores.
void score(const ScoreArgs& args);

/// How much an entry can move the layer's output (CriticalKV, arXiv 2502.03805).
///   kL1:      norms[h,t] = mean over the q heads q of h of || values[h,t] Wo[q] ||_1,
///             Wo[q] = w_o[:, q*D : (q+1)*D]^T
///   kL2Gram:  norms[h,t] = sqrt(v G_h v^T),  G_h = mean over q of Wo[q] Wo[q]^T; far cheaper
struct ValueNormArgs {
  TensorView values;        // [B, Hkv, T, Dv]
  TensorView w_o;           // [E, Hq * Dv]   weight of the output projection as torch stores it
  TensorView seq_lens;      // [B] int32     not given: all T
  Norm norm = Norm::kL1;    // which of the two formulas
  TensorView norms;         // [B, Hkv, T] float32, out; -inf at t >= seq_len
  TensorView workspace;     // [workspace_bytes(args) / 4] int32
  Stream stream = nullptr;  // where CUDA work is put
};
/// Writes args.norms.
void value_norm(const ValueNormArgs& args);

/// How many entries each kv head may keep, from one top-k over all heads of the layer (Ada-KV,
/// arXiv 2407.11550, Algorithms 1 and 2). Candidates are the positions 0 .. n-1, n = seq_len -
/// window; b = budget - window of them are kept in a head on average.
///   f[h] = how many of the Hkv * b highest scores lie in head h
///   kBlend:          (1 - floor) * f[h] + floor * b by largest remainder; sums to Hkv * b exactly
///   kHardFloor:      every head takes its own top int(floor * b), then the layer-wide top-k
///   kOfficialRound:  round_half_even((1 - floor) * f[h] + int(floor * b)), as the authors' code;
///                    the sum drifts
///   kNone:           f[h]
/// Equal scores: lower position first, then lower head. NaN counts as -inf and ranks last.
/// Sequences with n <= b keep everything.
struct AllocateArgs {
  TensorView scores;                        // [B, Hkv, T] float32
  TensorView seq_lens;                      // [B] int32   not given: all T
  int budget = 0;                           // entries per kv head, window included: window .. any
  int window = 0;                           // last positions of the prompt, always kept
  double floor = 0.2;                       // 0 .. 1; in double, so that shares round as written
  Safeguard safeguard = Safeguard::kBlend;  // how the floor is kept
  TensorView budgets;                       // [B, Hkv] int32, out; window included, at most seq_len
  TensorView workspace;                     // [workspace_bytes(args) / 4] int32
  Stream stream = nullptr;                  // where CUDA work is put
};
/// Writes args.budgets.
void allocate(const AllocateArgs& args);

/// Which positions each row keeps: the window, and the best candidates by score; ascending within a
/// row. With norms, in two stages (CriticalKV, arXiv 2502.03805, Algorithm 1): of the budgets -
/// window candidates of a row, the first int(first * count) by score and the rest by (score + eps)
/// * norm. A score of +inf pins an entry in both stages. Equal values: lower position first. NaN
/// ranks last. Budgets are clamped to what the row has: min(window, seq_len) .. seq_len.
struct SelectArgs {
  TensorView scores;     // [B, Hkv, T] float32
  TensorView budgets;    // [B, Hkv] int32, window included
  TensorView norms;      // [B, Hkv, T] float32   optional
  TensorView seq_lens;   // [B] int32   not given: all T
  int window = 0;        // last positions of the prompt, always kept
  double first = 0.5;    // share of a row's candidates taken in stage one; 0 .. 1
  float eps = 1e-4f;     // what is added to scores in stage two; 0 or more
  TensorView positions;  // [K] int32, out; K at least the sum of the clamped budgets; -1 behind it
  TensorView indptr;  // [B * Hkv + 1] int32, out: row r keeps positions[indptr[r] .. indptr[r + 1])
  TensorView workspace;     // [workspace_bytes(args) / 4] int32
  Stream stream = nullptr;  // where CUDA work is put
};
/// Writes args.positions and args.indptr.
void select(const SelectArgs& args);

/// Moves the kept entries of a prompt into pages. The pages of a sequence (in the order
/// KVCache::begin gave them) are dealt to its rows: first ceil(length / P) to each row in turn,
/// then one fresh page to each.
///   row (b, h), slot i  <-  keys, values of position positions[indptr[b * Hkv + h] + i]
/// If only some entries of a prompt are there, in whatever order, places say where each of them lies:
/// its keys and values are those of place places[indptr[b * Hkv + h] + i]. seq_lens must be given
/// then.
/// In a layer with page_biases the entry has the bias that stands beside it, or 0. Quantised pages
/// get the codes and scales of ops/quantise.h. An entry that isn't finite makes its own scale NaN and
/// no other. They take float16 and bfloat16, no float32. With tails what does not fill a page goes to
/// the row's tail.
///
/// Without keys and values, the entries are those that the layer's rows hold, positions are slots of
/// the row, and everything that can stays in its place (KVCache::begin_again):
///   slot i  <-  slot positions[indptr[b * Hkv + h] + i], codes, scales, position and bias as they are
/// A row keeps its first ceil(length / P) pages, but for those that page_ids does not name. These are
/// replaced, row by row, by pages of page_ids that no row has kept, in their order; the next ones of
/// them are the fresh pages. seen stays as it is. Not of a layer with tails, where a page's keys share scales.
struct CompactArgs {
  TensorView keys;         // [B, Hkv, T, D]  optional, with values
  TensorView values;       // [B, Hkv, T, Dv]
  TensorView positions;    // [K] int32
  TensorView indptr;       // [B * Hkv + 1] int32
  TensorView places;       // [K] int32   optional, with keys; not given: positions
  TensorView seq_lens;     // [B] int32   not given: all T
  TensorView page_ids;     // [Q] int32   sequence b: page_ids[page_indptr[b] .. page_indptr[b + 1])
  TensorView page_indptr;  // [B + 1] int32
  TensorView biases;       // [B, Hkv, T] float16  optional, with keys; for a layer with page_biases
  LayerView layer;       // of the same B sequences, out: everything in it; seen = seq_lens. In and
                         // out, but for seen, without keys
  TensorView workspace;  // [workspace_bytes(args) / 4] int32
  Stream stream = nullptr;  // where CUDA work is put
};
/// Writes args.layer.
void compact(const CompactArgs& args);

/// Fills the rows of the sequences that KVCache::fork made, each a branch of one of another cache that
/// shares its pages: sequence b holds what the source's sequences[b] does, without its back[b] newest
/// tokens. A row shares its pages, but for its last two: P entries may still go into the last one, and
/// the one before it is copied where the row has begun its last page within the newest stretch[b]
/// tokens, so that the host knows whose both are. Of page_ids [2, Hkv] a row has the copy of the page
/// that it had before the stretch, and the one that it begins in it, which is its fresh page until
/// then. With `whole` all pages are copied: page_ids are dealt as in compact.
struct ForkArgs {
  TensorView source_table;    // [A, Hkv, M] int32
  TensorView source_lengths;  // [A, Hkv] int32
  TensorView source_seen;     // [A] int32
  TensorView source_tails;    // [A, Hkv, 2 P, D]  only of int4 and int2
  TensorView sources;         // [B] int32, 0 .. A - 1
  TensorView stretch;         // [B] int32, 0 .. P: Fork::stretch
  TensorView back;            // [B] int32, 0 .. what each row holds; not given: 0. Not with tails
  TensorView page_ids;     // [Q] int32   sequence b: page_ids[page_indptr[b] .. page_indptr[b + 1])
  TensorView page_indptr;  // [B + 1] int32
  bool whole = false;      // whether rows share nothing
  LayerView layer;         // of the same B sequences, out: everything but the shared pages
  Stream stream = nullptr;  // where CUDA work is put
};
/// Writes args.layer.
void fork(const ForkArgs& args);

/// Adds S new tokens of each sequence to all of its rows. The caller has made room with
/// KVCache::grow. Right-aligned: of the S columns, the last num_new[b] belong to sequence b (left
/// padding is never stored). A new entry's bias is 0. Quantised pages get codes as in compact; with tails
/// entries go to the row's tail, which becomes codes as soon as it is full.
struct AppendArgs {
  TensorView keys;          // [B, Hkv, S, D]  after RoPE
  TensorView values;        // [B, Hkv, S, Dv]
  TensorView num_new;       // [B] int32, 0 .. S; not given: all S
  LayerView layer;          // in and out: all but fresh_pages
  Stream stream = nullptr;  // where CUDA work is put
};
/// Changes args.layer.
void append(const AppendArgs& args);

/// Shares the pages of all rows out to workers, so that each has the same work although rows differ
/// in length. One call serves all layers of a step: the schedule of layer l is schedule[l]. It is
/// made before append and valid for the one step. How many pages shortlist lists follows from a row's
/// length while its mass is 1, so that a plan with share is made before the step, too: attend then
/// finds in the listed block table which ones they are. For new_tokens = 0 it is of one token, which
/// lengths have already. The format is in cpp/ops/schedule.h; both backends write the same integers.
struct PlanArgs {
  TensorView lengths;      // [L, B, Hkv] int32      before this step's append
  TensorView block_table;  // [L, B, Hkv, M] int32
  TensorView fresh_pages;  // [L, B, Hkv, F] int32   pages that this step's append will take
  TensorView num_new;      // [B] int32; not given: all new_tokens
  int new_tokens = 1;      // S of this step; 0 if the step's tokens are in lengths already
  int page_size = 16;      // P
  int num_workers = 0;     // 1 to 32767, as default_num_workers(device)
  double share = 0.;       // 0: for all pages of rows; else for those that shortlist will list with
  int least = 8;           //   this share, least and newest and a mass of 1 of the step's S tokens
  int newest = 1;
  TensorView schedule;      // [L, schedule_size(B * Hkv, num_workers)] int32, out
  Stream stream = nullptr;  // where CUDA work is put
};
/// Writes args.schedule.
void plan(const PlanArgs& args);

/// int32 elements of one layer's schedule, which is aligned to 16 bytes. Throws InvalidArgument for
/// fewer than no rows or more than int32 counts, and for workers that plan does not take.
int64_t schedule_size(int64_t num_rows, int num_workers);

/// Workers that a device keeps busy: its multiprocessors, or a fixed number on the CPU (results do
/// not depend on threads).
int default_num_workers(Device device);

/// Entries of the same rows that lie elsewhere, in another tier.
struct Tier {
  LayerView layer;      // of the same B sequences, without the call's new tokens
  TensorView schedule;  // of this layer: planned with new_tokens = 0 and the call's num_workers
  TensorView queries;   // [B, Hq, S, D] with D of the tier; not given: those of the call
  int column = 0;       // of out, to which the first element of its values belongs
};

/// Tiers that attend takes beside a layer, at most.
constexpr int kMostOthers = 7;

/// Attention of S new queries over what each row holds. The newest S entries of a row are those of
/// the S columns, so that
///   query s of sequence b sees slots 0 .. lengths[b,h] - S + s
///   z = softcap * tanh(q . k * scale / softcap) + bias, if the layer has page_biases
///   out = sum of softmax(z, with the head's sink logit) * v
/// With keys and values given, they are appended first, in the same launch (see append). Of quantised
/// pages, k and v are what codes and scales say, also for the newest entries; with tails the last lengths
/// % P of a row are what its tail says, and where S = 1 and keys are given, a page that the new entry
/// fills is quantised after it was read.
/// Columns that are left padding (num_new) and rows that hold nothing give out = 0 and lse = -inf.
///
/// With others, the entries of a row lie in several tiers, each with pages of its own format: the
/// softmax is over all of them, and the results of the tiers meet in float32. The newest S entries are
/// those of `layer`, to which alone keys and values are appended; every query sees all slots of the
/// others. A tier may hold fewer dimensions of its keys, or others in their place, and has its own
/// queries then; and values that are coordinates of their own, which come to columns of their own:
///   z   = softcap * tanh(queries of the tier . k * scale / softcap)
///   out[column .. column + Dv) += softmax(z) * v of the tier
///
/// With accumulated, each slot of a row keeps what the q heads gave it. For each new token s in turn,
///   p[q]    = exp(z[q] - lse[q]) of a slot that s sees, else 0
///   r       = group_reduce over q of h ( p[q] )
///   kSum:   accumulated[b,h,slot] = decay * accumulated[b,h,slot] + r
///   kMax:   accumulated[b,h,slot] = max(accumulated[b,h,slot], r)
///   kLast:  accumulated[b,h,slot] = i if r >= threshold; i: tokens of b up to s, seen - (S - 1 - s)
/// The slots of the new tokens begin at 0, whatever was there. What lies behind a row is left alone.
/// Not of a layer with page_biases, and not with others.
struct AttendArgs {
  TensorView queries;        // [B, Hq, S, D]
  LayerView layer;           // in; in and out if keys are given
  TensorView schedule;       // [schedule_size(B * Hkv, num_workers)] int32, of this layer
  TensorView keys;           // [B, Hkv, S, D]  optional: the new tokens' keys
  TensorView values;         // [B, Hkv, S, Dv]  optional: the new tokens' values
  TensorView num_new;        // [B] int32, 0 .. S; not given: all S
  TensorView sink_logits;    // [Hq] float32    optional
  std::vector<Tier> others;  // at most kMostOthers: where else the rows' entries lie
  float scale = 0.f;         // 0: 1 / sqrt(D)
  float softcap = 0.f;       // 0: none
  int num_workers = 0;       // as given to plan
  bool prefetch = false;     // CUDA: pages and schedule may be read while the kernel before this
                             // one runs, because it writes neither. Planned with share, only the
                             // schedule is
  Accumulate accumulate = Accumulate::kSum;  // what accumulated keeps
  Reduce group_reduce = Reduce::kMean;       // over the q heads of a group
  float decay = 1.f;                         // of a sum, from token to token; 0 .. 1
  float threshold = 0.f;                     // of kLast; 0: 1 / i
  TensorView out;           // [B, Hq, S, O], out; O: Dv, or where the last tier's columns end
  TensorView lse;           // [B, Hq, S] float32, out, optional without accumulated: natural log
  TensorView accumulated;   // [B, Hkv, T] float32, out and in, optional; T at least M * P
  TensorView workspace;     // [workspace_bytes(args) / 4] int32
  Stream stream = nullptr;  // where CUDA work is put
};
/// Writes args.out and args.lse; changes args.accumulated, and args.layer if keys are given.
void attend(const AttendArgs& args);

/// Which pages of what its rows hold a step reads (Quest, arXiv 2406.10774; top-p as in SpecAttn, arXiv
/// 2510.27641). A row has n = ceil(lengths[b,h] / P) pages, of which the last newest + ceil((S - 1) / P)
/// are listed always. Of each other page p
///   z[q,s,p] = softcap * tanh(scale / softcap * sum over d of max(queries[q,s,d] * largest[p,d],
///              queries[q,s,d] * smallest[p,d]))
///   w[q,s,:] = softmax over the row's other pages of z[q,s,:]
///   worth[p] = max over q of h and s of w[q,s,p]
/// and the best are listed, up to max(ceil(share * n), min(least, n)) pages of the row in all; equal
/// worth: lower page first. With mass below 1, a page counts for a query only if w is at least a
/// threshold, found by ten bisections between 0 and the largest w, above which the row of w has that
/// much of its sum; and a page that counts for none is not listed. In float32; NaN bounds are -inf.
/// share is rounded to a multiple of 2^-20.
struct ShortlistArgs {
  TensorView queries;      // [B, Hq, S, D]
  TensorView bounds;       // [N, 2 D]   largest, then smallest of a page's keys in each dimension
  TensorView lengths;      // [B, Hkv] int32      the step's S tokens included
  TensorView block_table;  // [B, Hkv, M] int32
  TensorView num_new;      // [B] int32, 0 .. S; not given: all S
  float scale = 0.f;       // 0: 1 / sqrt(D)
  float softcap = 0.f;     // 0: none
  int page_size = 16;      // P
  double share = 0.125;    // of a row's pages, above 0, at most 1
  double mass = 1.;        // above 0, at most 1
  int least = 8;           // pages that a row lists at least, if it has them
  int newest = 1;          // at least 1
  bool prefetch = false;   // CUDA: bounds and older pages of the block table may be read while the
                           // kernel before this one runs, because it writes none of them: it may be
                           // the step's append
  TensorView listed;  // [B, Hkv, X] int32, out   ascending, then -1; a row lists X pages at most
  TensorView listed_lengths;  // [B, Hkv] int32, out   entries of the listed pages
  TensorView workspace;       // [workspace_bytes(args) / 4] int32
  Stream stream = nullptr;    // where CUDA work is put
};
/// Writes args.listed and args.listed_lengths: with them instead of its table and lengths, plan
/// and attend take a layer as one that holds just these pages.
void shortlist(const ShortlistArgs& args);

/// Bytes of scratch memory that score needs, aligned to 16, from shapes and options only. Checks the
/// arguments, but for the workspace itself.
size_t workspace_bytes(const ScoreArgs& args);
/// The same for value_norm.
size_t workspace_bytes(const ValueNormArgs& args);
/// The same for allocate.
size_t workspace_bytes(const AllocateArgs& args);
/// The same for select.
size_t workspace_bytes(const SelectArgs& args);
/// The same for compact.
size_t workspace_bytes(const CompactArgs& args);
/// The same for attend.
size_t workspace_bytes(const AttendArgs& args);
/// The same for shortlist.
size_t workspace_bytes(const ShortlistArgs& args);

/// Threads that the CPU backend may use, this call's thread included: 1 to 4096. Results do not depend
/// on it.
void set_num_threads(int num_threads);

/// Name of the instruction set that the CPU backend was chosen for: "baseline", "x86_64_v3", ...
const char* cpu_instruction_set();

/// True if the CUDA backend is built in and finds a device; otherwise `reason` (if given) says why
/// not.
bool cuda_available(std::string* reason = nullptr);

}  // namespace adakv
#pragma GCC visibility pop
