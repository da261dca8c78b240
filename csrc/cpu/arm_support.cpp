#include "arm_support.h"

#if defined(GHOSTED_FAST_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace ghosted_fast {

#ifdef GHOSTED_FAST_ARM
namespace {

std::string find_problem() {
#ifdef __linux__
  // Of AT_HWCAP2, as asm/hwcap.h numbers them; headers older than Linux 5.6 have no names for them.
  constexpr unsigned long kInt8Products = 1ul << 13, kBf16 = 1ul << 14;
  const unsigned long features = getauxval(AT_HWCAP2);
  if ((features & kBf16) == 0)
    return "the processor or the system has no bf16 products (FEAT_BF16)";
  if ((features & kInt8Products) != 0) return "";
  return "the processor or the system has no int8 products (FEAT_I8MM)";
#else
  return "asking for bf16 and int8 products (FEAT_BF16, FEAT_I8MM) is written for Linux only";
#endif
}

}  // namespace

const std::string& neonbf16_problem() {
  static const std::string problem = find_problem();
  return problem;
}
#else
const std::string& neonbf16_problem() {
  static const std::string problem;
  return problem;
}
#endif

}  // namespace ghosted_fast
