// The table of one instruction set. Included once by each simd_<isa>.cc but AMX's, behind its
// definition of ADAKV_ISA.
#pragma once

#include "cpu/simd_accumulate.h"
#include "cpu/simd_attend.h"
#include "cpu/simd_quantise.h"
#include "cpu/simd_quantise_page.h"
#include "cpu/simd_score.h"
#include "cpu/simd_value_norm.h"

namespace adakv::ADAKV_ISA {

Kernels make_kernels();
Kernels make_kernels() {
  return {
      ADAKV_ISA_NAME,
      {{attend_span<PlainPages<float>>, attend_span<PlainPages<Float16>>,
        attend_span<PlainPages<BFloat16>>},
       {nullptr, attend_span<CodePages<Int8Code, Float16>>,
        attend_span<CodePages<Int8Code, BFloat16>>},
       {nullptr, attend_span<CodePages<Float8, Float16>>, attend_span<CodePages<Float8, BFloat16>>},
       {nullptr, attend_span<Int4Pages<Float16>>, attend_span<Int4Pages<BFloat16>>},
       {nullptr, attend_span<Int2Pages<Float16>>, attend_span<Int2Pages<BFloat16>>}},
      {nullptr, attend_span<MixedPages<Float16>>, attend_span<MixedPages<BFloat16>>},
      accumulate_span,
      {{nullptr, nullptr, nullptr},
       {nullptr, quantise<Int8Code, Float16>, quantise<Int8Code, BFloat16>},
       {nullptr, quantise<Float8, Float16>, quantise<Float8, BFloat16>},
       {nullptr, nullptr, nullptr},
       {nullptr, nullptr, nullptr}},
      {nullptr, quantise_page<Float16>, quantise_page<BFloat16>},
      {score_sums<float>, score_sums<Float16>, score_sums<BFloat16>},
      {score_window<float>, score_window<Float16>, score_window<BFloat16>},
      {value_norm_span<float>, value_norm_span<Float16>, value_norm_span<BFloat16>},
      {gram_span<float>, gram_span<Float16>, gram_span<BFloat16>},
      {gram_norm_span<float>, gram_norm_span<Float16>, gram_norm_span<BFloat16>},
  };
}

}  // namespace adakv::ADAKV_ISA
