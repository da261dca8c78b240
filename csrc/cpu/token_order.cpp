#include "token_order.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace ghosted_fast {
namespace {

// Tokens below this many medians leave the others' last bits alone, as sums of many tokens do.
constexpr double kLargeRatio = 64.0;

}  // namespace

bool order_tokens(const double* sizes, int64_t count, int64_t* order) {
  std::iota(order, order + count, int64_t{0});
  if (count < 2) return false;
  std::vector<double> sorted(sizes, sizes + count);
  std::nth_element(sorted.begin(), sorted.begin() + count / 2, sorted.end());
  const double limit = kLargeRatio * sorted[static_cast<size_t>(count / 2)];
  int64_t* const large = std::stable_partition(
      order, order + count, [&](int64_t token) { return sizes[token] <= limit; });
  if (large == order + count) return false;
  std::stable_sort(large, order + count, [&](int64_t a, int64_t b) { return sizes[a] < sizes[b]; });
  return true;
}

}  // namespace ghosted_fast
