// Prints the paths that this processor can run, the best first, and why neonbf16 is not one.
#include <cstdio>

#include "arm_support.h"
#include "dispatch.h"
#include "stand_ins.h"

using namespace ghosted_fast;

int main() {
  for (const std::string& path : cpu_paths()) std::printf("%s ", path.c_str());
  std::printf("| %s | %s\n", kernel_table().name, neonbf16_problem().c_str());
  return set_cpu_path("portable") && !set_cpu_path("amx") ? 0 : 1;
}
