// The order in which tokens are summed. Compiled once, for every path.
#pragma once

#include <cstdint>

namespace ghosted_fast {

// Fills `order` with the places 0 .. count - 1 in the order to sum them: as they are, but those far
// larger than the median at the end, the largest last. In fp32 a large sum rounds away the last
// bits of all that is added to it later. Returns whether any place moved.
//
// sizes: what a token adds to the sums, >= 0.
bool order_tokens(const double* sizes, int64_t count, int64_t* order);

}  // namespace ghosted_fast
