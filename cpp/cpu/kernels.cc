#include "cpu/kernels.h"

#include "adakv/error.h"
#include "cpu/isa.h"

namespace adakv {

// One per simd_<isa>.cc.
#define ADAKV_DECLARE(name) \
  namespace name {          \
  Kernels make_kernels();   \
  }
ADAKV_DECLARE(baseline)
ADAKV_DECLARE(x86_64_v3)
ADAKV_DECLARE(x86_64_v4)
ADAKV_DECLARE(x86_64_amx)

namespace {

Kernels choose_kernels() {
  const Isa isa = isa_of_this_machine();
#if defined(ADAKV_ONLY_ISA)
  if (isa < Isa::ADAKV_ONLY_ISA) {
    throw Error(detail::concat("this adakv was built with ADAKV_NATIVE for a machine with ",
                               ADAKV_ONLY_ISA::make_kernels().isa,
                               ", which this one lacks: build it here"));
  }
  return ADAKV_ONLY_ISA::make_kernels();
#elif defined(ADAKV_X86_64)
  switch (isa) {
    case Isa::x86_64_amx:
      return x86_64_amx::make_kernels();
    case Isa::x86_64_v4:
      return x86_64_v4::make_kernels();
    case Isa::x86_64_v3:
      return x86_64_v3::make_kernels();
    case Isa::baseline:
      break;
  }
#else
  (void)isa;
#endif
  return baseline::make_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose_kernels();
  return chosen;
}

const char* cpu_instruction_set() {
  return kernels().isa;
}

}  // namespace adakv
