// Whether this process may use the tiles of AMX.
#pragma once

#include <string>

namespace ghosted_fast {

// Whether the processor has the tiles, products of bf16 and of int8.
bool has_amx();

// Why the AMX that the processor has cannot be used; empty if it can. Asks the kernel for the
// tiles' memory, once per process: threads inherit it.
const std::string& amx_problem();

}  // namespace ghosted_fast
