// Matrix instructions of a warpgroup (four warps), sm_90a only: 64 rows times 128 rows, 16 elements
// of each, from shared memory to which tiles came by the bulk copy engine.
//
// A tile is panels of 64 columns, 128 bytes a row, with the hardware's 128-byte swizzle; a panel
// begins at a multiple of 1024 bytes. Sums lie in the lanes 4 g + t of warp w as
//   sums[4 j + 0..1]: row 16 w + g, columns 8 j + 2 t and the next;   sums[4 j + 2..3]: row + 8
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "common/async_copy.cuh"
#include "common/mma.cuh"

namespace adakv {

constexpr int kPanelColumns = 64, kPanelRowBytes = 128;

/// Offset in bytes of 16 bytes in a panel.
__device__ inline int panel_offset(int row, int chunk) {
  return row * kPanelRowBytes + ((chunk ^ row % 8) << 4);
}

/// What the instruction wants to know of a panel: eight rows are 1024 bytes apart from the next.
__device__ inline uint64_t panel_descriptor(uint32_t address) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

/// The descriptor of columns 16 k and on, of a tile with panels of `panel_bytes`.
__device__ inline uint64_t column_descriptor(uint64_t panel, int k, int panel_bytes) {
  return panel + ((k / 4 * panel_bytes + k % 4 * 32) >> 4);
}

__device__ inline void warpgroup_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most kPending groups of products are under way.
template <int kPending>
__device__ inline void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The 64 sums as operands of an instruction.
#define ADAKV_SUM_REGISTERS                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "  \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "  \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define ADAKV_SUM_OPERANDS                                                                        \
  "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]), "+f"(sums[5]),       \
      "+f"(sums[6]), "+f"(sums[7]), "+f"(sums[8]), "+f"(sums[9]), "+f"(sums[10]), "+f"(sums[11]), \
      "+f"(sums[12]), "+f"(sums[13]), "+f"(sums[14]), "+f"(sums[15]), "+f"(sums[16]),             \
      "+f"(sums[17]), "+f"(sums[18]), "+f"(sums[19]), "+f"(sums[20]), "+f"(sums[21]),             \
      "+f"(sums[22]), "+f"(sums[23]), "+f"(sums[24]), "+f"(sums[25]), "+f"(sums[26]),             \
      "+f"(sums[27]), "+f"(sums[28]), "+f"(sums[29]), "+f"(sums[30]), "+f"(sums[31]),             \
      "+f"(sums[32]), "+f"(sums[33]), "+f"(sums[34]), "+f"(sums[35]), "+f"(sums[36]),             \
      "+f"(sums[37]), "+f"(sums[38]), "+f"(sums[39]), "+f"(sums[40]), "+f"(sums[41]),             \
      "+f"(sums[42]), "+f"(sums[43]), "+f"(sums[44]), "+f"(sums[45]), "+f"(sums[46]),             \
      "+f"(sums[47]), "+f"(sums[48]), "+f"(sums[49]), "+f"(sums[50]), "+f"(sums[51]),             \
      "+f"(sums[52]), "+f"(sums[53]), "+f"(sums[54]), "+f"(sums[55]), "+f"(sums[56]),             \
      "+f"(sums[57]), "+f"(sums[58]), "+f"(sums[59]), "+f"(sums[60]), "+f"(sums[61]),             \
      "+f"(sums[62]), "+f"(sums[63])

/// sums (+)= A B^T with A [64, 16] and B [128, 16] in shared memory.
template <typename Element>
__device__ inline void multiply_64x128(float (&sums)[64], uint64_t a, uint64_t b, bool adds) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " ADAKV_SUM_REGISTERS
        ", %64, %65, adds, 1, 1, 0, 0;\n}"
        : ADAKV_SUM_OPERANDS
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
  } else {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " ADAKV_SUM_REGISTERS
        ", %64, %65, adds, 1, 1, 0, 0;\n}"
        : ADAKV_SUM_OPERANDS
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
  }
}

/// The same with A in registers, as mma_16x8x16 takes it for each warp's 16 rows.
template <typename Element>
__device__ inline void multiply_64x128(float (&sums)[64],
                                       const uint32_t (&a)[4],
                                       uint64_t b,
                                       bool adds) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " ADAKV_SUM_REGISTERS
        ", {%64, %65, %66, %67}, %68, adds, 1, 1, 0;\n}"
        : ADAKV_SUM_OPERANDS
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)));
  } else {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " ADAKV_SUM_REGISTERS
        ", {%64, %65, %66, %67}, %68, adds, 1, 1, 0;\n}"
        : ADAKV_SUM_OPERANDS
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)));
  }
}

#undef ADAKV_SUM_REGISTERS
#undef ADAKV_SUM_OPERANDS

// --- Rings of tiles -----------------------------------------------------------------------------

/// Stages in shared memory that one thread fills and others empty.
template <int kStages>
struct Ring {
  uint64_t full[kStages], empty[kStages];

  /// By one thread: `copies` boxes fill a stage, `readers` threads give it back.
  __device__ void init(int copies, int readers) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared_address(&full[i]), copies);
      init_barrier(shared_address(&empty[i]), readers);
    }
    fence_barriers();
  }

  __device__ uint32_t full_barrier(int i) const { return shared_address(&full[i % kStages]); }

  /// Waits until the stage of tile i (counted from the first that was ever loaded) may be filled.
  __device__ void wait_empty(int i) const {
    if (i < kStages) return;
    wait_barrier(shared_address(&empty[i % kStages]), (i / kStages - 1) % 2);
  }
  __device__ void wait_full(int i) const { wait_barrier(full_barrier(i), i / kStages % 2); }

  /// By a thread that gives back, without a branch for those that don't: products may be under way.
  __device__ void give_back(int i, bool gives) const {
    asm volatile(
        "{\n.reg .pred gives;\nsetp.ne.b32 gives, %1, 0;\n"
        "@gives mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(
            shared_address(&empty[i % kStages])),
        "r"(static_cast<int>(gives))
        : "memory");
  }
};

}  // namespace adakv
