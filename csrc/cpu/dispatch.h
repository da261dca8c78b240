// The choice of instruction set, made once at run time.
#pragma once

#include <string>
#include <vector>

#include "../arguments.h"

namespace ghosted_fast {

// The table in use: the best this processor can run, or the one named last by set_cpu_path.
const KernelTable& kernel_table();

// The names of the paths that this processor can run, the best first.
std::vector<std::string> cpu_paths();

// Uses a path from now on, in every thread; "auto" for the best. False if it cannot run here.
bool set_cpu_path(const std::string& name);

}  // namespace ghosted_fast
