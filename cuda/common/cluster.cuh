// Clusters: CTAs that run at the same time and write into each other's shared memory (sm_90 and
// up). On older devices every CTA is a cluster of its own, so kernels need no second version.
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"

namespace adakv {

__device__ inline int cluster_rank() {
  int rank = 0;
  if constexpr (kArch >= 900) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline int cluster_size() {
  int size = 1;
  if constexpr (kArch >= 900) asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

/// The two halves of a barrier over all threads of the cluster. It orders no memory accesses but
/// the making of barriers: that would cost more than the rest of an exchange.
__device__ inline void cluster_arrive() {
  if constexpr (kArch >= 900) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  if constexpr (kArch >= 900) {
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  } else {
    __syncthreads();
  }
}

/// What the CTAs of a cluster send each other, in turns: all wait for a turn's data before they
/// send the next one's. A store brings its own signal, so no CTA waits for a barrier of the
/// cluster. In shared memory, the same in every CTA; for clusters of more than one.
class Exchange {
 public:
  /// One thread, before a barrier of the cluster.
  __device__ void init() {
    for (uint64_t& barrier : barriers_) init_barrier(address_of(&barrier));
    fence_barriers();
  }

  /// Sends 16 bytes, or 8, to the same variable in the CTA of a rank.
  __device__ void send(int turn, int rank, int4* to, int4 value) {
    if constexpr (kArch >= 900) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, "
          "[%5];" ::"r"(remote_address(to, rank)),
          "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w),
          "r"(remote_address(&barriers_[turn % 2], rank))
          : "memory");
    }
  }
  __device__ void send(int turn, int rank, uint64_t* to, uint64_t value) {
    if constexpr (kArch >= 900) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(
              remote_address(to, rank)),
          "l"(value), "r"(remote_address(&barriers_[turn % 2], rank))
          : "memory");
    }
  }

  /// Waits until all CTAs together have sent `num_bytes` here. Thread 0 and any others.
  __device__ void wait(int turn, int num_bytes) {
    const uint32_t barrier = address_of(&barriers_[turn % 2]);
    if constexpr (kArch >= 900) {
      if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                     "r"(num_bytes)
                     : "memory");
      }
    }
    wait_barrier(barrier, turn / 2 % 2);
  }

 private:
  __device__ static uint32_t address_of(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
  __device__ static uint32_t remote_address(const void* shared, int rank) {
    uint32_t address = 0;
    if constexpr (kArch >= 900) {
      asm("mapa.shared::cluster.u32 %0, %1, %2;"
          : "=r"(address)
          : "r"(address_of(shared)), "r"(rank));
    }
    return address;
  }

  uint64_t barriers_[2];  // of even and odd turns: some CTAs may be one turn ahead
};

}  // namespace adakv
