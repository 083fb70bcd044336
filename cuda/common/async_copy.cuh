// Copies from device to shared memory that run beside the computation: 16 bytes at a time on every
// architecture, and whole boxes of a tensor (the bulk copy engine) from sm_90 on.
//
// Data that is read once asks the L2 cache to let it go first, so that what is read again stays.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace adakv {

#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 0;
#endif

__device__ inline uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

/// For data that will be read again soon.
__device__ inline uint64_t normal_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

/// What no kernel writes meanwhile; 16 bytes pass by the first cache.
template <typename Chunk>
__device__ inline Chunk read_once(const Chunk* from, uint64_t) {
  return __ldg(from);
}
__device__ inline uint4 read_once(const uint4* from, uint64_t policy) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from), "l"(policy));
  return x;
}

// --- 16 bytes a thread ----------------------------------------------------------------------

__device__ inline void copy_16_bytes(uint32_t to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "l"(policy)
               : "memory");
}

__device__ inline void copy_4_bytes(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most kPending of this thread's groups of copies are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- Boxes ----------------------------------------------------------------------------------

/// Makes a barrier in shared memory for a number of arrivals; others see it after the fence.
__device__ inline void init_barrier(uint32_t barrier, int arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void fence_barriers() {
  if constexpr (kArch >= 900) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Arrives at a barrier that now also waits for so many bytes.
__device__ inline void arrive_with_bytes(uint32_t barrier, uint32_t num_bytes) {
  if constexpr (kArch >= 900) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(num_bytes)
                 : "memory");
  }
}

/// Starts the copy of the box at `coordinates` of a tensor map, by one thread. It completes on the
/// barrier, which waits for its bytes already.
__device__ inline void start_box(uint32_t to,
                                 const CUtensorMap* map,
                                 const int32_t (&coordinates)[4],
                                 uint32_t barrier,
                                 uint64_t policy) {
  if constexpr (kArch >= 900) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
        "l"(map), "r"(coordinates[0]), "r"(coordinates[1]), "r"(coordinates[2]),
        "r"(coordinates[3]), "r"(barrier), "l"(policy)
        : "memory");
  }
}

__device__ inline void start_box(uint32_t to,
                                 const CUtensorMap* map,
                                 const int32_t (&coordinates)[5],
                                 uint32_t barrier,
                                 uint64_t policy) {
  if constexpr (kArch >= 900) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(to),
        "l"(map), "r"(coordinates[0]), "r"(coordinates[1]), "r"(coordinates[2]),
        "r"(coordinates[3]), "r"(coordinates[4]), "r"(barrier), "l"(policy)
        : "memory");
  }
}

/// The same for a multiple of 16 bytes.
__device__ inline void start_bytes(
    uint32_t to, const void* from, uint32_t num_bytes, uint32_t barrier, uint64_t policy) {
  if constexpr (kArch >= 900) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(num_bytes), "r"(barrier), "l"(policy)
        : "memory");
  }
}

/// Starts the copy of the box at `coordinates` of a 4-dimensional tensor map, by one thread. It
/// completes on the barrier.
__device__ inline void copy_box(uint32_t to,
                                const CUtensorMap* map,
                                const int32_t (&coordinates)[4],
                                uint32_t num_bytes,
                                uint32_t barrier,
                                uint64_t policy) {
  if constexpr (kArch >= 900) {
    arrive_with_bytes(barrier, num_bytes);
    start_box(to, map, coordinates, barrier, policy);
  }
}

/// Starts the copy of a multiple of 16 bytes, by one thread. It completes on the barrier.
__device__ inline void copy_bytes(uint32_t to,
                                  const void* from,
                                  uint32_t num_bytes,
                                  uint32_t barrier) {
  if constexpr (kArch >= 900) {
    arrive_with_bytes(barrier, num_bytes);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(num_bytes), "r"(barrier)
        : "memory");
  }
}

/// Waits until the barrier has completed the phase of this parity.
__device__ inline void wait_barrier(uint32_t barrier, uint32_t parity) {
  if constexpr (kArch >= 900) {
    asm volatile(
        "{\n"
        ".reg .pred is_done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 is_done, [%0], %1;\n"
        "@!is_done bra WAIT;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
  }
}

/// Orders ordinary accesses to shared memory before later copies of boxes into it.
__device__ inline void fence_before_boxes() {
  if constexpr (kArch >= 900) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void prefetch_map(const CUtensorMap* map) {
  if constexpr (kArch >= 900) asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// --- Programmatic launches ------------------------------------------------------------------

/// Waits for the kernels before this one in the stream, if it was launched to overlap them.
__device__ inline void wait_for_previous_kernel() {
  if constexpr (kArch >= 900) asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// Lets a next kernel that is launched so begin.
__device__ inline void let_next_kernel_begin() {
  if constexpr (kArch >= 900) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace adakv
