// The end of a row in attend's fast kernel. The warps' results (maximum, sum, out) meet in shared
// memory. If several workers share the row, each writes a partial result, and the one that arrives
// last adds them up in the order of the workers: the same bits whoever it is.
#pragma once

#include <algorithm>
#include <cmath>

#include "attend/warp_codes.cuh"

namespace adakv {

/// Part of the result for one query: four of its columns.
struct Part {
  float max, sum;
  float4 out;

  static __device__ Part none() { return {-INFINITY, 0.f, make_float4(0, 0, 0, 0)}; }

  __device__ void add(const Part& part) {
    const float most = fmaxf(max, part.max), base = most == -INFINITY ? 0.f : most;
    const float mine = fast_exp2(max - base), other = fast_exp2(part.max - base);
    max = most;
    sum = sum * mine + part.sum * other;
    out.x = out.x * mine + part.out.x * other;
    out.y = out.y * mine + part.out.y * other;
    out.z = out.z * mine + part.out.z * other;
    out.w = out.w * mine + part.out.w * other;
  }
};

/// Where a partial result lies among all, and which columns of out it has, by four.
struct PartPlace {
  int32_t slot, first_quad, num_quads;
};

/// The partial results of a row whose entries lie in one tier: those of the workers that share it.
class OneTier {
 public:
  static constexpr bool kGoesOn = true;     // perhaps from what tiers before this one gave
  static constexpr bool kHasParts = false;  // of columns: each partial result has all of them
  static constexpr int kAtOnce = 4;         // that a warp reads at a time
  static constexpr int kMostWarps =
      16;  // that add them up; their number decides about the last bits

  __device__ OneTier(const AttendParams& p, int32_t row, const schedule::RowFacts& facts)
      : p_(p), row_(row), first_(facts.first_partial), num_(facts.num_partials) {}

  template <int kQuads>
  static constexpr int kPartQuads = kQuads;

  /// Columns of out, by four, where a tier has so many.
  static __device__ constexpr int32_t num_quads(int32_t of_tier) { return of_tier; }
  /// How many there are; if it is one, nobody shares the row.
  __device__ int32_t count() const { return num_; }
  /// Where the one of this block's worker lies, and the i-th of all.
  __device__ int32_t mine(const schedule::RowFacts& facts, int32_t worker) const {
    return first_ + worker - facts.first_worker;
  }
  __device__ PartPlace place(int32_t i) const { return {first_ + i, 0, 0}; }
  /// Places for partial results of all rows.
  __device__ int64_t num_slots() const { return p_.max_partials; }
  /// What counts the workers that are done.
  __device__ int32_t* arrived() const { return &p_.rows[row_].arrived; }

 private:
  const AttendParams& p_;
  int32_t row_, first_, num_;
};

/// The end of a row: brings together what warps and workers found out about it. Parts is OneTier or the
/// like.
template <typename Config, typename Parts = OneTier>
class RowEnd {
 public:
  static constexpr int kQuads = Config::kHeadDim / 4;          // columns by four
  static constexpr int kAllQuads = Config::kQueries * kQuads;  // of all queries
  // Of a query in a partial result.
  static constexpr int kPartQuads = Parts::template kPartQuads<kQuads>;

  __device__ RowEnd(const AttendParams& p,
                    const RowContext& row,
                    const Parts& parts,
                    AttendShared<Config>& shared,
                    int image)
      : p_(p),
        row_(row),
        parts_(parts),
        image_(shared.image[image]),
        max_sum_(shared.max_sum[image]),
        is_last_(shared.is_last) {}

  /// All warps have stored their results, or are about to: barrier first.
  __device__ void run(const schedule::RowFacts& facts, int32_t worker, bool cuts_rows) {
    bool is_whole = !cuts_rows || (parts_.count() <= 1 && parts_.num_quads(kQuads) == kQuads);
    int32_t first_quad = 0;  // of out, of those that are finished
    wait_for_warps();
#pragma unroll 1
    while (true) {  // the same code adds up warps and workers, and stays small
#pragma unroll 1
      for (int i = threadIdx.x; i < kAllQuads; i += Config::kThreads) {
        const int query = i / kQuads, quad = i % kQuads;
        if (is_whole && query >= row_.num_queries) break;  // gather() reads the others, too
        if (is_whole && first_quad + quad >= parts_.num_quads(kQuads)) continue;
        const Part part = add_warps(query, quad * 4);
        if (is_whole) {
          finish(query, (first_quad + quad) * 4, part);
        } else {
          publish(parts_.mine(facts, worker), i, part);
        }
      }
      if (is_whole) {
        first_quad += kQuads;
        if (!Parts::kHasParts || first_quad >= parts_.num_quads(kQuads)) return;
        wait_for_warps();
      } else {
        wait_for_warps();
        if (threadIdx.x == 0) is_last_ = arrive();
        wait_for_warps();
        if (!is_last_) return;
        is_whole = true;
      }
      gather(first_quad);
      wait_for_warps();
    }
  }

  /// A barrier for the warps that attend.
  static __device__ void wait_for_warps() {
    asm volatile("bar.sync 1, %0;" ::"n"(Config::kThreads) : "memory");
  }

  /// Writes four columns of a query's result.
  __device__ void finish(int query, int column, Part part) const {
    const int32_t number = row_.first_query + query, token = p_.group.quotient(number);
    const int32_t head = row_.h * p_.group.value + p_.group.remainder(number);
    float factor = 0, lse = -INFINITY;
    if (Parts::kGoesOn && p_.before_lse.data) add_before(head, token, column, part);
    if (token >= p_.num_tokens - p_.new_tokens(row_.b) && part.max != -INFINITY) {
      const float sink = p_.sink_logits ? p_.sink_logits[head] * kLog2e : -INFINITY;
      const float most = fmaxf(part.max, sink), share = fast_exp2(part.max - most);
      const float sum = part.sum * share + fast_exp2(sink - most);
      factor = share / sum;
      lse = (most + log2f(sum)) * kLn2;
    }
    using Element = typename Config::Element;
    const float4 x = part.out;
    char* to = p_.out.at(row_.b, head, token);
    if (Parts::kGoesOn && p_.writes_floats) {
      float4 out = make_float4(0, 0, 0, 0);
      if (factor != 0) out = make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
      *reinterpret_cast<float4*>(to + column * 4) = out;
    } else {
      uint2 packed = make_uint2(0, 0);
      if (factor != 0) {
        packed.x = pack<Element>(x.x * factor, x.y * factor);
        packed.y = pack<Element>(x.z * factor, x.w * factor);
      }
      *reinterpret_cast<uint2*>(to + column * 2) = packed;
    }
    if (column == 0 && p_.lse.data) {
      *reinterpret_cast<float*>(p_.lse.at(row_.b, head, token)) = lse;
    }
  }

 private:
  /// Adds four columns of what tiers before this one gave to a query's result.
  __device__ void add_before(int32_t head, int32_t token, int column, Part& part) const {
    const float lse = p_.before_of(row_.b, head, token);
    if (lse == -INFINITY) return;
    const char* from = p_.before_out.at(row_.b, head, token) + column * 4;
    part.add({lse * kLog2e, 1, *reinterpret_cast<const float4*>(from)});
  }

  __device__ Part add_warps(int query, int column) const {
    Part part = Part::none();
#pragma unroll
    for (int w = 0; w < Config::kAllWarps; ++w) part.max = fmaxf(part.max, max_sum_[w][query].x);
    const float base = part.max == -INFINITY ? 0.f : part.max;
#pragma unroll
    for (int w = 0; w < Config::kAllWarps; ++w) {
      const float2 max_sum = max_sum_[w][query];
      const float factor = fast_exp2(max_sum.x - base);
      const float4 x = *reinterpret_cast<const float4*>(&image_[w][query][column]);
      part.sum += factor * max_sum.y;
      part.out.x += factor * x.x;
      part.out.y += factor * x.y;
      part.out.z += factor * x.z;
      part.out.w += factor * x.w;
    }
    return part;
  }

  __device__ float4* partial_out(int64_t slot) const {
    return reinterpret_cast<float4*>(p_.partials) + slot * Config::kQueries * kPartQuads;
  }

  __device__ float2* partial_max_sum(int32_t slot) const {
    return reinterpret_cast<float2*>(partial_out(parts_.num_slots())) + slot * Config::kQueries;
  }

  /// Where four columns of a query lie in a partial result.
  static __device__ int in_part(int query, int quad) { return query * kPartQuads + quad; }

  __device__ void publish(int32_t slot, int quad, const Part& part) const {
    partial_out(slot)[in_part(quad / kQuads, quad % kQuads)] = part.out;
    if (quad % kQuads == 0) {
      partial_max_sum(slot)[quad / kQuads] = make_float2(part.max, part.sum);
    }
  }

  /// Four columns, counted from first_quad on, of a partial result; 0 where it has none.
  __device__ Part load(const PartPlace& place, int32_t first_quad, int quad) const {
    const int query = quad / kQuads;
    const float2 max_sum = __ldcg(partial_max_sum(place.slot) + query);
    if constexpr (!Parts::kHasParts) {
      return {max_sum.x, max_sum.y, __ldcg(partial_out(place.slot) + quad)};
    } else {
      Part part = {max_sum.x, max_sum.y, make_float4(0, 0, 0, 0)};
      const int at = first_quad + quad % kQuads - place.first_quad;
      if (at >= 0 && at < place.num_quads) {
        part.out = __ldcg(partial_out(place.slot) + in_part(query, at));
      }
      return part;
    }
  }

  /// Counts this worker in; true for the last one, to whom all partial results are visible then.
  __device__ bool arrive() const {
    int32_t* counter = parts_.arrived();
    int32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    const bool is_last = before == parts_.count() - 1;
    if (is_last) *counter = 0;  // the schedule serves again
    return is_last;
  }

  /// Partial results, of columns from first_quad on, to images: warp w of those that add adds up the
  /// w-th, and each kAdders-th from there.
  __device__ void gather(int32_t first_quad) {
    const int32_t num_partials = parts_.count();
    constexpr int kPerLane = std::min(4, (kAllQuads + kWarpSize - 1) / kWarpSize);
    constexpr int kAtOnce = Parts::kAtOnce,
                  kAdders = std::min(Parts::kMostWarps, Config::kAllWarps);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int block = 0; block < kAllQuads; block += kPerLane * kWarpSize) {
      Part total[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) total[j] = Part::none();
#pragma unroll 1
      for (int32_t i = warp; i < num_partials && warp < kAdders; i += kAtOnce * kAdders) {
        Part parts[kAtOnce][kPerLane];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const PartPlace place = parts_.place(min(i + k * kAdders, num_partials - 1));
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) {
            const int quad = min(block + j * kWarpSize + lane, kAllQuads - 1);
            parts[k][j] = load(place, first_quad, quad);
          }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (i + k * kAdders >= num_partials) break;
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) total[j].add(parts[k][j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int quad = block + j * kWarpSize + lane, query = quad / kQuads;
        if (quad >= kAllQuads) break;
        *reinterpret_cast<float4*>(&image_[warp][query][quad % kQuads * 4]) = total[j].out;
        if (quad % kQuads == 0) max_sum_[warp][query] = make_float2(total[j].max, total[j].sum);
      }
    }
  }

  const AttendParams& p_;
  const RowContext& row_;
  const Parts& parts_;
  float (&image_)[Config::kAllWarps][Config::kQueries][Config::kImageStride];
  float2 (&max_sum_)[Config::kAllWarps][Config::kQueries];
  int32_t& is_last_;
};

}  // namespace adakv
