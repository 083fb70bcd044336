// What attend accumulates: the probabilities of a step's queries, which lse tells when rows have been
// read, join what each slot was given before.
//
//   p[q]  = exp(z[q] - lse[q]) of what q sees;  given = the mean, maximum or sum over a group
//   sum: decay * before + given    max: max(before, given)    last: the token's number if it is enough
//
// The fast kernels store z as they go (accumulate_logits). Where they don't, it is made again from the
// keys, a query and 32 slots at a time (accumulate_keys).
//
// grid: [num_rows, blocks]; the threads or warps of a row's blocks take its slots in turn.
#include <algorithm>

#include "attend/slots.cuh"
#include "common/async_copy.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"

namespace adakv {
namespace {

constexpr int kThreads = 256;
constexpr float kLog2e = 1.4426950408889634f;

/// What is accumulated, and how.
struct Accumulated {
  float* data;        // [B, Hkv, T]
  int64_t stride[2];  // of sequences and kv heads
  Accumulate accumulate;
  Reduce group_reduce;
  float decay, threshold;

  __device__ float* row(int32_t b, int32_t h) const { return data + b * stride[0] + h * stride[1]; }

  /// What a slot has behind token `number`, whose `group` q heads gave it these probabilities.
  __device__ float joined(float before, float sum, float most, int32_t group, float number) const {
    const float mean = sum / static_cast<float>(group);
    const float given = group_reduce == Reduce::kMax    ? most
                        : group_reduce == Reduce::kMean ? mean
                                                        : sum;
    if (accumulate == Accumulate::kSum) return before * decay + given;
    if (accumulate == Accumulate::kMax) return fmaxf(before, given);
    return given >= (threshold > 0 ? threshold : 1 / number) ? number : before;
  }
};

Accumulated accumulated(const AttendArgs& args) {
  const TensorView& x = args.accumulated;
  return {x.ptr<float>(),  {x.stride[0], x.stride[1]},
          args.accumulate, args.group_reduce,
          args.decay,      args.threshold};
}

/// A row of the grid: its sequence and kv head, how many entries it holds, and from where on these
/// are new.
struct Row {
  int32_t b, h, length, first_new;

  __device__ Row(const AttendParams& p, int32_t index)
      : b(p.num_heads.quotient(index)),
        h(p.num_heads.remainder(index)),
        length(p.rows[index].length),
        first_new(length - p.new_tokens(b)) {}
};

/// The lse of a query, or what makes all of its probabilities 0 if it was given nothing.
__device__ float lse_of(const AttendParams& p, const Row& row, int32_t q, int32_t s) {
  const char* lse = p.lse.at(row.b, row.h * p.group.value + q, s);
  const float x = *reinterpret_cast<const float*>(lse);
  return x == -INFINITY ? INFINITY : x;
}

// One token. kQueries: p.logits has so many for each slot, of which the group's come first.
template <int kQueries>
__global__ void __launch_bounds__(kThreads, 1)
    accumulate_logits_kernel(const __grid_constant__ AttendParams p,
                             const __grid_constant__ Accumulated to) {
  wait_for_previous_kernel();
  const Row row(p, blockIdx.x);
  if (row.first_new == row.length) return;  // of padding
  const int32_t group = p.group.value;
  const float number = static_cast<float>(p.layer.seen[row.b]);
  float base[kQueries];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    base[q] = q < group ? lse_of(p, row, q, 0) * kLog2e : INFINITY;
  }
  float* slots = to.row(row.b, row.h);
  const float* logits = p.logits + int64_t{blockIdx.x} * p.logits_length * kQueries;
#pragma unroll 2
  for (int32_t slot = blockIdx.y * kThreads + threadIdx.x; slot < row.length;
       slot += gridDim.y * kThreads) {
    const float before = slot < row.first_new ? slots[slot] : 0.f;
    float sum = 0, most = 0;
#pragma unroll
    for (int q = 0; q < kQueries; q += 4) {
      const float4 z = *reinterpret_cast<const float4*>(logits + int64_t{slot} * kQueries + q);
      const float each[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float probability = q + i < group ? fast_exp2(each[i] - base[q + i]) : 0.f;
        sum += probability;
        most = fmaxf(most, probability);
      }
    }
    slots[slot] = to.joined(before, sum, most, group, number);
  }
}

/// The products of a query with the keys of `count` slots, one in each lane.
template <typename SlotsOf, int kColumns>
__device__ float multiply(const float (&query)[kColumns], const SlotsOf& slots, int32_t count) {
  const int32_t lane = threadIdx.x % kWarpSize;
  float product = 0;
  slots.visit([&](const auto& reader) {
#pragma unroll(SlotsOf::kAtOnce)
    for (int32_t i = 0; i < count; ++i) {
      float key[kColumns], dot = 0;
      reader.key(i, key);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) dot += query[j] * key[j];
      dot = warp_sum(dot);
      if (lane == i) product = dot;
    }
  });
  return product;
}

template <typename Element, typename Entry, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    accumulate_keys_kernel(const __grid_constant__ AttendParams p,
                           const __grid_constant__ Accumulated to,
                           int32_t head_dim) {
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Row row(p, blockIdx.x);
  const Query place = {row.b, row.h, 0, 0, row.length, row.length};
  const int32_t group = p.group.value, num_new = row.length - row.first_new;
  using SlotsOf = Slots<Entry, kColumns>;

  for (int32_t first = (blockIdx.y * (kThreads / kWarpSize) + warp) * kWarpSize; first < row.length;
       first += gridDim.y * kThreads) {
    const int32_t slot = first + lane, count = min(kWarpSize, row.length - first);
    float* at = to.row(row.b, row.h) + slot;
    float x = slot < row.first_new ? *at : 0.f;
    const SlotsOf slots(p, place, first, count);
    for (int32_t s = p.num_tokens - num_new; s < p.num_tokens; ++s) {
      const int32_t behind = p.num_tokens - 1 - s;
      const bool is_seen = slot < row.length - behind;
      float sum = 0, most = 0;
      for (int32_t q = 0; q < group; ++q) {
        const Element* data =
            reinterpret_cast<const Element*>(p.queries.at(row.b, row.h * group + q, s));
        float query[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int32_t d = SlotsOf::column(j);
          query[j] = d < head_dim ? to_float(data[d]) : 0.f;
        }
        float z = multiply(query, slots, count) * p.scale;
        if (p.softcap != 0) z = p.softcap * tanhf(z);
        const float probability = expf(z - lse_of(p, row, q, s));
        sum += probability;
        most = fmaxf(most, probability);
      }
      const float number = static_cast<float>(p.layer.seen[row.b] - behind);
      if (is_seen) x = to.joined(x, sum, most, group, number);
    }
    if (lane < count && num_new > 0) *at = x;
  }
}

/// Blocks that go to each row: so many that all multiprocessors are busy, and no more than there are
/// slots for.
dim3 grid_of(const AttendArgs& args, const AttendParams& p) {
  const int64_t most = args.layer.block_table.shape[2] * p.layer.page_size;
  const int64_t wanted = std::min(schedule::ceil_div(8 * args.num_workers, p.num_rows), 65535);
  return dim3(p.num_rows,
              std::max<int64_t>(1, std::min<int64_t>(wanted, (most + kThreads - 1) / kThreads)));
}

}  // namespace

void accumulate_logits(const AttendArgs& args, const AttendParams& p) {
  LaunchShape shape;
  shape.grid = grid_of(args, p);
  shape.threads = kThreads;
  shape.early = true;
  const auto run = [&](auto queries) {
    launch("attend", accumulate_logits_kernel<queries>, shape, args.stream, p, accumulated(args));
  };
  switch (padded_queries(p.group.value)) {
    case 4:
      return run(IntTag<4>{});
    case 8:
      return run(IntTag<8>{});
    default:
      return run(IntTag<16>{});
  }
}

void accumulate_keys(const AttendArgs& args, const AttendParams& p) {
  const int32_t head_dim = static_cast<int32_t>(args.queries.shape[3]);
  dispatch_entries(args, head_dim, [&](auto element, auto entry, auto columns) {
    accumulate_keys_kernel<typename decltype(element)::type, typename decltype(entry)::type,
                           columns>
        <<<grid_of(args, p), kThreads, 0, static_cast<cudaStream_t>(args.stream)>>>(
            p, accumulated(args), head_dim);
  });
  ADAKV_CUDA_CHECK("attend", cudaGetLastError());
}

}  // namespace adakv
