/* What embedder_c.c shows to c_test.cc. */
#pragma once

#include <adakv/c.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 0, or the line that failed, with what failed in `message`. */
int life_of_a_sequence_in_c(char message[256]);

/* What adakv_cache_create says when the caller's memory has none. */
AdakvStatus cache_without_memory_in_c(void);

#ifdef __cplusplus
}
#endif
