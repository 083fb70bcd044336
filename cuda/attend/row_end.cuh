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

/// The end of a row: brings together what warps and workers found out about it.
template <typename Config>
class RowEnd {
 public:
  static constexpr int kQuads = Config::kHeadDim / 4;          // columns by four
  static constexpr int kAllQuads = Config::kQueries * kQuads;  // of all queries

  __device__ RowEnd(const AttendParams& p,
                    const RowContext& row,
                    AttendShared<Config>& shared,
                    int image)
      : p_(p),
        row_(row),
        image_(shared.image[image]),
        max_sum_(shared.max_sum[image]),
        is_last_(shared.is_last) {}

  /// All warps have stored their results, or are about to: barrier first.
  __device__ void run(const schedule::RowFacts& facts, int32_t row_index, bool cuts_rows) {
    bool is_whole = !cuts_rows || facts.num_partials <= 1;
    wait_for_warps();
#pragma unroll 1
    while (true) {  // at most twice: the same code adds up warps and workers, and stays small
#pragma unroll 1
      for (int i = threadIdx.x; i < kAllQuads; i += Config::kThreads) {
        const int query = i / kQuads, column = i % kQuads * 4;
        if (is_whole && query >= row_.num_queries) break;  // gather() reads the others, too
        const Part part = add_warps(query, column);
        if (is_whole) {
          finish(query, column, part);
        } else {
          publish(facts.first_partial + blockIdx.x - facts.first_worker, i, part);
        }
      }
      if (is_whole) return;
      wait_for_warps();
      if (threadIdx.x == 0) is_last_ = arrive(row_index, facts.num_partials);
      wait_for_warps();
      if (!is_last_) return;
      gather(facts.first_partial, facts.num_partials);
      wait_for_warps();
      is_whole = true;
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
    if (p_.others_lse.data) add_others(head, token, column, part);
    if (token >= p_.num_tokens - p_.new_tokens(row_.b) && part.max != -INFINITY) {
      const float sink = p_.sink_logits ? p_.sink_logits[head] * kLog2e : -INFINITY;
      const float most = fmaxf(part.max, sink), share = fast_exp2(part.max - most);
      const float sum = part.sum * share + fast_exp2(sink - most);
      factor = share / sum;
      lse = (most + log2f(sum)) * kLn2;
    }
    using Element = typename Config::Element;
    const float4 x = part.out;
    uint2 packed = make_uint2(0, 0);
    if (factor != 0) {
      packed.x = pack<Element>(x.x * factor, x.y * factor);
      packed.y = pack<Element>(x.z * factor, x.w * factor);
    }
    char* to = p_.out.at(row_.b, head, token) + column * 2;
    *reinterpret_cast<uint2*>(to) = packed;
    if (column == 0 && p_.lse.data) {
      *reinterpret_cast<float*>(p_.lse.at(row_.b, head, token)) = lse;
    }
  }

 private:
  /// Adds four columns of what other entries gave to a query's result.
  __device__ void add_others(int32_t head, int32_t token, int column, Part& part) const {
    using Element = typename Config::Element;
    const float lse = p_.others_of(row_.b, head, token);
    if (lse == -INFINITY) return;
    const char* from = p_.others_out.at(row_.b, head, token) + column * 2;
    const uint2 packed = *reinterpret_cast<const uint2*>(from);
    const float2 low = unpack<Element>(packed.x), high = unpack<Element>(packed.y);
    part.add({lse * kLog2e, 1, make_float4(low.x, low.y, high.x, high.y)});
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

  __device__ float4* partial_out(int32_t slot) const {
    return reinterpret_cast<float4*>(p_.partials) + int64_t{slot} * kAllQuads;
  }

  __device__ float2* partial_max_sum(int32_t slot) const {
    return reinterpret_cast<float2*>(partial_out(p_.max_partials)) + slot * Config::kQueries;
  }

  __device__ void publish(int32_t slot, int quad, const Part& part) const {
    partial_out(slot)[quad] = part.out;
    if (quad % kQuads == 0) {
      partial_max_sum(slot)[quad / kQuads] = make_float2(part.max, part.sum);
    }
  }

  /// Counts this worker in; true for the last one, to whom all partial results are visible then.
  __device__ bool arrive(int32_t row_index, int32_t num_partials) const {
    int32_t* counter = &p_.rows[row_index].arrived;
    int32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    const bool is_last = before == num_partials - 1;
    if (is_last) *counter = 0;  // the schedule serves again
    return is_last;
  }

  /// Partial results to images: warp w adds up those of workers w, w + kAllWarps, ...
  __device__ void gather(int32_t first_partial, int32_t num_partials) {
    constexpr int kPerLane = std::min(4, (kAllQuads + kWarpSize - 1) / kWarpSize), kAtOnce = 4;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int block = 0; block < kAllQuads; block += kPerLane * kWarpSize) {
      Part total[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) total[j] = Part::none();
#pragma unroll 1
      for (int32_t i = warp; i < num_partials; i += kAtOnce * Config::kAllWarps) {
        Part parts[kAtOnce][kPerLane];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int32_t slot = first_partial + min(i + k * Config::kAllWarps, num_partials - 1);
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) {
            const int quad = min(block + j * kWarpSize + lane, kAllQuads - 1);
            const float2 max_sum = __ldcg(partial_max_sum(slot) + quad / kQuads);
            parts[k][j] = {max_sum.x, max_sum.y, __ldcg(partial_out(slot) + quad)};
          }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (i + k * Config::kAllWarps >= num_partials) break;
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
  float (&image_)[Config::kAllWarps][Config::kQueries][Config::kImageStride];
  float2 (&max_sum_)[Config::kAllWarps][Config::kQueries];
  int32_t& is_last_;
};

}  // namespace adakv
