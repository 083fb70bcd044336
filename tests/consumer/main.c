/* Runs the life of a sequence against an installed adakv: consumer [cuda] */
#include <stdio.h>
#include <string.h>

#include "embedder_c.h"

int main(int argc, char** argv) {
  EmbedderDevice device;
  embedder_host(&device);
  if (argc > 1 && strcmp(argv[1], "cuda") == 0) {
#ifdef CONSUMER_CUDA
    const int status = embedder_cuda(&device);
#else
    const int status = -1; /* CMake found no CUDA toolkit */
#endif
    if (status != 0) {
      printf("no CUDA: %d\n", status);
      return 2;
    }
  }
  char message[256] = "";
  const int line = life_of_a_sequence_in_c(&device, message);
  printf("adakv %s: line %d %s\n", adakv_version(), line, message);
  return line != 0;
}
