#include "amx_support.h"

#include <cstdint>

#ifdef GHOSTED_FAST_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#endif
#endif

namespace ghosted_fast {

#ifdef GHOSTED_FAST_X86
namespace {

// Of CPUID leaf 7, EDX.
constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
constexpr uint32_t kOsXsave = 1u << 27;  // of leaf 1, ECX
// Of XCR0: the tiles' configuration and data.
constexpr uint64_t kTileState = uint64_t{3} << 17;

uint64_t enabled_state() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & kOsXsave) == 0) return 0;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (uint64_t{edx} << 32) | eax;
}

std::string find_problem() {
  if ((enabled_state() & kTileState) != kTileState) return "the system does not enable its tiles";
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return "the kernel refuses the memory for its tiles: " + std::system_category().message(errno);
#else
  return "asking for its tiles is written for Linux only";
#endif
}

}  // namespace

bool has_amx() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr uint32_t kNeeded = kAmxBf16 | kAmxTile | kAmxInt8;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kNeeded) == kNeeded;
}

const std::string& amx_problem() {
  static const std::string problem = has_amx() ? find_problem() : "";
  return problem;
}
#else
bool has_amx() { return false; }

const std::string& amx_problem() {
  static const std::string problem;
  return problem;
}
#endif

}  // namespace ghosted_fast
