/* Runs the life of a sequence against an installed adakv. */
#include <stdio.h>

#include "embedder_c.h"

int main(void) {
  char message[256] = "";
  const int line = life_of_a_sequence_in_c(message);
  printf("adakv %s: line %d %s\n", adakv_version(), line, message);
  return line != 0;
}
