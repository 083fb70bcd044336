// Prints the instruction set that inner loops would be chosen for on this machine (ADAKV_NATIVE).
#include <cstdio>

#include "cpu/isa.h"

int main() {
  constexpr const char* kNames[] = {"baseline", "x86_64_v3", "x86_64_v4", "x86_64_amx"};
  std::fputs(kNames[static_cast<int>(adakv::isa_of_this_machine())], stdout);
}
