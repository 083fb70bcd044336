// Clusters: CTAs that run at the same time and read each other's shared memory (sm_90 and up). On
// older devices every CTA is a cluster of its own, so kernels need no second version.
#pragma once

#include <cstdint>

namespace adakv {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

/// The two halves of a barrier over all threads of the cluster: what was written before arriving is
/// seen after waiting. A CTA must not exit before the others have read its memory.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Address of the same shared variable in the CTA of a rank.
__device__ inline uint32_t cluster_address(const void* shared, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(rank));
  return address;
}

__device__ inline int32_t cluster_load(const int32_t* shared, int rank) {
  int32_t value;
  asm volatile("ld.shared::cluster.s32 %0, [%1];"
               : "=r"(value)
               : "r"(cluster_address(shared, rank))
               : "memory");
  return value;
}

__device__ inline void cluster_add(int32_t* shared, int rank, int32_t value) {
  asm volatile(
      "red.relaxed.cluster.shared::cluster.add.s32 [%0], %1;" ::"r"(cluster_address(shared, rank)),
      "r"(value)
      : "memory");
}

#else

__device__ inline int cluster_rank() {
  return 0;
}
__device__ inline int cluster_size() {
  return 1;
}
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {
  __syncthreads();
}
__device__ inline int32_t cluster_load(const int32_t* shared, int) {
  return *shared;
}
__device__ inline void cluster_add(int32_t* shared, int, int32_t value) {
  atomicAdd(shared, value);
}

#endif

}  // namespace adakv
