// Writes new entries behind the last one of every row. A row that fills its page goes on in its
// next fresh one.
//
// A decode step's few tokens are one launch, with a block for each sequence. More tokens are shared
// out to several blocks; lengths may then change only when all have read them: a second launch.
#include "append.cuh"

#include <algorithm>

#include "common/async_copy.cuh"
#include "common/check.cuh"
#include "common/device_guard.h"
#include "common/dispatch.cuh"
#include "common/divisor.cuh"
#include "common/int4_page.cuh"
#include "common/launch.cuh"
#include "cuda_backend.h"

namespace adakv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRows = 2;                // that a warp has under way
constexpr int64_t kEntriesPerWarp = 4;  // with more, further blocks pay

/// How the warps of a sequence share out its rows and tokens.
struct Steps {
  Divisor heads;
  int32_t tokens;
};

/// New entries of a row (b, h) with a tail: those that fill a page are its codes, others go to the
/// tail. By warps.
template <typename Element>
class TailAppender {
 public:
  __device__ TailAppender(const AppendParams& p, int32_t b, int32_t h, FullTails full)
      : p_(p),
        b_(b),
        h_(h),
        full_(full),
        length_(*p.layer.lengths.at(b, h)),
        end_(length_ + p.count(b)),
        used_(p.layer.num_pages(length_)) {}

  /// Job `job` of `num_jobs` that share the row. The first has both the page that the tail belongs to
  /// and what goes to the tail behind it.
  __device__ void run(int32_t job, int32_t num_jobs) const {
    const int32_t first = length_ / kPageSlots, last = end_ / kPageSlots;
    if (job == 0) fill(first);
#pragma unroll 1
    for (int32_t column = first + 1 + job; column < last; column += num_jobs) fill(column);
    if (job == 0 && last > first) fill(last);
  }

 private:
  __device__ void fill(int32_t column) const {
    const LayerRows& layer = p_.layer;
    const int32_t lane = threadIdx.x % kWarpSize, page_begin = column * kPageSlots;
    const int32_t begin = max(length_, page_begin), end = min(end_, page_begin + kPageSlots);
    if (begin >= end) return;
    int32_t* table = layer.block_table.at(b_, h_);
    const int32_t page =
        column < used_ ? table[column] : layer.fresh_pages.at(b_, h_)[column - used_];
    if (lane == 0) table[column] = page;
    if (page_begin + lane >= begin && page_begin + lane < end) {
      layer.page_positions[page * layer.positions_stride + lane] =
          layer.seen[b_] + page_begin + lane - length_;
    }
    if (end == page_begin + kPageSlots && full_ == FullTails::kQuantise) {
      const auto of_page = [&](bool is_value, int32_t slot, int32_t element) {
        return load(is_value, page_begin + slot, element);
      };
      quantise_page<Element>(layer, page, of_page, 0, 1);
      __syncwarp();  // the tail has been read
      return;
    }
    const int32_t chunks = layer.head_dim / kChunkElements;
#pragma unroll 1
    for (int32_t i = lane; i < 2 * (end - begin) * chunks; i += kWarpSize) {
      const bool is_value = i >= (end - begin) * chunks;
      const int32_t entry = i / chunks - (is_value ? end - begin : 0);
      const int32_t element = i % chunks * kChunkElements;
      char* to = layer.tail(b_, h_, is_value, begin + entry - page_begin, element);
      *reinterpret_cast<uint4*>(to) = load(is_value, begin + entry, element);
    }
  }

  /// Elements of an entry of the row, which is in the tail or new.
  __device__ uint4 load(bool is_value, int32_t entry, int32_t element) const {
    if (entry < length_) {
      const char* from = p_.layer.tail(b_, h_, is_value, entry % kPageSlots, element);
      return *reinterpret_cast<const uint4*>(from);
    }
    const EntryRows& source = is_value ? p_.values : p_.keys;
    const int32_t token = p_.num_tokens - (end_ - entry);
    return load_chunk<Element>(source.at(b_, h_, token) + element * 2);
  }

  const AppendParams& p_;
  const int32_t b_, h_;
  const FullTails full_;
  const int32_t length_, end_, used_;  // entries before and after, pages before
};

/// Quantises the tail of a row that one new token has filled, if it has; `length` entries are in it
/// with that. By warps.
template <typename Element>
__device__ void quantise_tail(
    const LayerRows& layer, int32_t b, int32_t h, int32_t length, int32_t warp, int32_t num_warps) {
  if (length % kPageSlots != 0) return;
  const int32_t page = layer.block_table.at(b, h)[length / kPageSlots - 1];
  const auto load = [&](bool is_value, int32_t slot, int32_t element) {
    return *reinterpret_cast<const uint4*>(layer.tail(b, h, is_value, slot, element));
  };
  quantise_page<Element>(layer, page, load, warp, num_warps);
}

/// What one warp does: some rows of the sequence, some of its tokens.
template <typename Batch>
struct AppendByTokens {
  static __device__ void run(const AppendParams& p,
                             int32_t b,
                             const AppendShare& share,
                             FullTails) {
    append_entries<Batch>(p, b, share);
  }

  static __device__ void end(const AppendParams&, int32_t, FullTails) {}
};

template <typename Element>
struct AppendToTails {
  static __device__ void run(const AppendParams& p,
                             int32_t b,
                             const AppendShare& share,
                             FullTails full) {
    // A page that one token fills is quantised by all warps, below.
    const FullTails now = p.num_tokens == 1 ? FullTails::kLeave : full;
#pragma unroll 1
    for (int32_t h = share.first_head; h < p.layer.num_heads; h += share.head_step) {
      TailAppender<Element>(p, b, h, now).run(share.first_token, share.token_step);
    }
  }

  static __device__ void end(const AppendParams& p, int32_t b, FullTails full) {
    if (full == FullTails::kLeave || p.num_tokens > 1 || p.count(b) == 0) return;
#pragma unroll 1
    for (int32_t h = 0; h < p.layer.num_heads; ++h) {
      quantise_tail<Element>(p.layer, b, h, *p.layer.lengths.at(b, h) + 1, threadIdx.x / kWarpSize,
                             kWarps);
    }
    __syncthreads();
  }
};

// grid: [blocks of a sequence, B]
template <typename Append>
__global__ void __launch_bounds__(kThreads, 2)
    append_kernel(const __grid_constant__ AppendParams p, Steps steps, FullTails full) {
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const int32_t b = blockIdx.y;
  const int32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  const int32_t first_token = steps.heads.quotient(warp);
  if (first_token < steps.tokens) {
    Append::run(p, b, {steps.heads.remainder(warp), steps.heads.value, first_token, steps.tokens},
                full);
  }
  if (gridDim.x > 1) return;
  __syncthreads();
  Append::end(p, b, full);
  count_appended(p, b, threadIdx.x, kThreads);
}

// grid: [B]
__global__ void __launch_bounds__(kThreads)
    append_count_kernel(const __grid_constant__ AppendParams p) {
  count_appended(p, blockIdx.x, threadIdx.x, kThreads);
}

// grid: [B * Hkv]; one block: a row, whose tail one new token may have filled.
template <typename Element>
__global__ void __launch_bounds__(kThreads, 2)
    quantise_tails_kernel(const __grid_constant__ AppendParams p) {
  const int32_t b = blockIdx.x / p.layer.num_heads, h = blockIdx.x % p.layer.num_heads;
  if (p.count(b) == 0) return;
  quantise_tail<Element>(p.layer, b, h, *p.layer.lengths.at(b, h), threadIdx.x / kWarpSize, kWarps);
}

}  // namespace

// ------------------------------------------------------------------------------------------------

void quantise_filled_tails(const AppendArgs& args) {
  const AppendParams p = append_params(args.layer, args.keys, args.values, args.num_new);
  const int32_t grid = p.batch * p.layer.num_heads;
  if (grid == 0) return;
  dispatch_16_bits(args.keys.dtype, [&](auto element) {
    quantise_tails_kernel<typename decltype(element)::type>
        <<<grid, kThreads, 0, static_cast<cudaStream_t>(args.stream)>>>(p);
  });
  ADAKV_CUDA_CHECK("append", cudaGetLastError());
}

void CudaBackend::append(const AppendArgs& args) {
  launch_append(args, FullTails::kQuantise);
}

void launch_append(const AppendArgs& args, FullTails full) {
  const DeviceGuard guard(args.keys.device);
  const AppendParams p = append_params(args.layer, args.keys, args.values, args.num_new);
  if (p.batch == 0 || p.num_tokens == 0) return;
  const cudaStream_t stream = static_cast<cudaStream_t>(args.stream);
  const int64_t entries = int64_t{p.layer.num_heads} * p.num_tokens;
  const int64_t wanted = p.num_tokens == 1 ? 1 : entries / (kWarps * kEntriesPerWarp);
  const dim3 grid(static_cast<uint32_t>(std::clamp<int64_t>(wanted, 1, 256)),
                  static_cast<uint32_t>(p.batch));
  const bool is_aligned = rows_are_aligned(args.keys, 16) && rows_are_aligned(args.values, 16) &&
                          rows_are_aligned(args.layer.pages, 16) &&
                          rows_are_aligned(args.layer.values(), 16);
  const int32_t num_warps = static_cast<int32_t>(grid.x) * kWarps;
  Steps steps = {Divisor::of(std::clamp(p.layer.num_heads, 1, num_warps)), 0};
  steps.tokens = num_warps / steps.heads.value;
  const auto run = [&](auto append) {
    launch("append", append_kernel<typename decltype(append)::type>,
           {grid, kThreads, 0, has_sm90("append", args.keys.device.index)}, stream, p, steps, full);
  };
  const PageFormat format = args.layer.format();
  if (format == PageFormat::kPlain) {
    dispatch_chunk(is_aligned, args.keys.dtype, [&](auto chunk) {
      using Chunk = typename decltype(chunk)::type;
      if (args.layer.value_pages) {
        run(TypeTag<AppendByTokens<EntryBatch<Chunk, kRows, false>>>{});
      } else {
        run(TypeTag<AppendByTokens<EntryBatch<Chunk, kRows>>>{});
      }
    });
  } else {
    dispatch_codes(args.keys.dtype, format, [&](auto element, auto codes) {
      using Element = typename decltype(element)::type;
      using Format = typename decltype(codes)::type;
      if constexpr (Format::kHasTails) {
        run(TypeTag<AppendToTails<Element>>{});
      } else {
        run(TypeTag<AppendByTokens<CodeBatch<Element, Format, kRows>>>{});
      }
    });
  }
  ADAKV_CUDA_CHECK("append", cudaGetLastError());
  if (grid.x > 1) {
    append_count_kernel<<<p.batch, kThreads, 0, stream>>>(p);
    ADAKV_CUDA_CHECK("append", cudaGetLastError());
  }
}

}  // namespace adakv
