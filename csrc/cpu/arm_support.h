// Whether an Arm processor multiplies bf16 and int8.
#pragma once

#include <string>

namespace ghosted_fast {

// Why the path "neonbf16" cannot be used on this Arm processor; empty if it can, or on others.
const std::string& neonbf16_problem();

}  // namespace ghosted_fast
