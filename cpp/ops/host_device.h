// Marks functions that the CPU backend and CUDA kernels share, so that integers are made by the
// same code on both.
#pragma once

#ifdef __CUDACC__
#define ADAKV_HOST_DEVICE __host__ __device__
#else
#define ADAKV_HOST_DEVICE
#endif
