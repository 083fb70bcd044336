/* What embedder_c.c shows to c_test.cc. */
#pragma once

#include <adakv/c.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a program brings along: a device, memory there, a stream that all work goes into. */
typedef struct EmbedderDevice {
  AdakvDevice device;
  AdakvMemory memory; /* its context is this struct, which must stay where it is */
  int live;           /* allocations that were not given back */
  size_t bytes;       /* of all allocations, ever */
  void* stream;
  /* Copies to the host behind all that is in the stream, and waits for it; 0 on success. */
  int (*copy_to_host)(void* host, const void* data, size_t bytes, void* stream);
} EmbedderDevice;

/* The CPU. */
void embedder_host(EmbedderDevice* device);

/* The first GPU, with a stream of its own (tests/consumer/cuda.c); 0 on success. */
int embedder_cuda(EmbedderDevice* device);

/* 0, or the line that failed, with what failed in `message`. */
int life_of_a_sequence_in_c(EmbedderDevice* device, char message[256]);

/* What adakv_cache_create says when the caller's memory has none. */
AdakvStatus cache_without_memory_in_c(void);

#ifdef __cplusplus
}
#endif
