// The kernels of x86-64-v4, and those for bfloat16 that the matrix unit does better. All others are
// compiled once, for both.
#define ADAKV_ISA x86_64_amx
#include "cpu/simd_attend_amx.h"
#include "cpu/simd_score.h"
#include "cpu/simd_value_norm.h"

namespace adakv {

namespace x86_64_v4 {
Kernels make_kernels();
}

namespace x86_64_amx {

constexpr int kBFloat16 = static_cast<int>(DType::kBFloat16);

/// In tiles, if there is enough to do.
template <PageFormat kFormat, typename Pages>
void attend_span_or_tiles(const AttendSpan& span) {
  static const auto by_vectors =
      x86_64_v4::make_kernels().attend_span[static_cast<int>(kFormat)][kBFloat16];
  if (TiledBlocks<Pages, 64>::suits(span)) {
    attend_span_by<Pages, TiledBlocks<Pages, 64>>(span);
  } else if (TiledBlocks<Pages, 128>::suits(span)) {
    attend_span_by<Pages, TiledBlocks<Pages, 128>>(span);
  } else {
    by_vectors(span);
  }
}

template <PageFormat kFormat, typename Pages>
void set_attend_span(Kernels& kernels) {
  kernels.attend_span[static_cast<int>(kFormat)][kBFloat16] = attend_span_or_tiles<kFormat, Pages>;
}

Kernels make_kernels();
Kernels make_kernels() {
  Kernels kernels = x86_64_v4::make_kernels();
  kernels.isa = "x86-64-v4 with AMX";
  set_attend_span<PageFormat::kPlain, PlainPages<BFloat16>>(kernels);
  set_attend_span<PageFormat::kInt8, CodePages<Int8Code, BFloat16>>(kernels);
  set_attend_span<PageFormat::kFp8, CodePages<Float8, BFloat16>>(kernels);
  set_attend_span<PageFormat::kInt4, Int4Pages<BFloat16>>(kernels);
  kernels.score_sums[kBFloat16] = score_sums<BFloat16>;
  kernels.score_window[kBFloat16] = score_window<BFloat16>;
  kernels.value_norm_span[kBFloat16] = value_norm_span<BFloat16>;
  return kernels;
}

}  // namespace x86_64_amx
}  // namespace adakv
