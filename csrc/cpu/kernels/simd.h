// Vectors of one instruction set. Included by the kernel headers, which `path_*.cpp` compile with
// different flags: all of it lives in an unnamed namespace, so that no code made for one processor
// is ever linked into the path of another.
//
// Arithmetic uses the compiler's vector extension (GCC, clang), which also serves processors
// without a path of their own; conversions use intrinsics where the extension gives slow code.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(GHOSTED_FAST_NEON)
#include <arm_neon.h>
#endif

#include "../../arguments.h"
#include "../parallel.h"

#define GHOSTED_FAST_UNROLL _Pragma("GCC unroll 16")

namespace ghosted_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kDoubleLanes = kLanes / 2;

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef double VecD __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));

// Whether these are the vectors of Arm; "portable" does without its intrinsics there too.
#if defined(GHOSTED_FAST_NEON)
constexpr bool kHasNeon = true;
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define GHOSTED_FAST_NEON_BF16
#endif
#else
constexpr bool kHasNeon = false;
#endif

// Whether a dword can hold two bf16 numbers that one instruction multiplies and adds.
#if defined(__AVX512BF16__) || defined(GHOSTED_FAST_NEON_BF16)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif
// Dwords of a column that lie side by side in panels of pairs: two where one instruction multiplies
// four bf16 of two rows and two columns (bfmmla).
constexpr bool kHasQuads = kHasNeon && kHasPairs;
constexpr int kPairDwords = kHasQuads ? 2 : 1;

constexpr int kPanelVectors = kPanel / kLanes;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

inline VecF load(const float* from) {
  VecF v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline void store(float* to, VecF v) { std::memcpy(to, &v, sizeof(v)); }
inline VecD load(const double* from) {
  VecD v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline void store(double* to, VecD v) { std::memcpy(to, &v, sizeof(v)); }

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <class F>
inline void for_each_task(int64_t count, int64_t max_threads, F&& body) {
  using Body = typename std::remove_reference<F>::type;
  run_tasks(
      count, max_threads,
      [](void* context, int64_t index, int64_t slot) {
        (*static_cast<Body*>(context))(index, slot);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace
}  // namespace ghosted_fast
