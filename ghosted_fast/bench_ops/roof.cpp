// The machine's limits: multiply-adds from registers, and bytes read from memory. Compiled and
// loaded by roofs.py with this processor's own instruction set.
#include <stddef.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));

namespace {

// Enough to hide the latency of two multiply-adds per cycle.
constexpr int kRegisters = 12;

template <class Vector, class Step>
double multiply_adds(int64_t rounds, Step step) {
  Vector sums[kRegisters];
  for (int i = 0; i < kRegisters; ++i) sums[i] = Vector{};
  Vector a = Vector{} + 1, b = Vector{} + 1;
  for (int64_t round = 0; round < rounds; ++round) {
    asm volatile("" : "+v"(a), "+v"(b));  // keeps the loop from being computed beforehand
#pragma GCC unroll 12
    for (int i = 0; i < kRegisters; ++i) sums[i] = step(sums[i], a, b);
  }
  double total = 0;
  for (int i = 0; i < kRegisters; ++i) total += static_cast<double>(sums[i][0]);
  return total;
}

}  // namespace

extern "C" {

// Each returns the flops it did. The sums are stored, or the compiler would leave them out.
double roof_fp32(int64_t rounds, double* sink) {
  *sink = multiply_adds<Floats>(rounds, [](Floats s, Floats a, Floats b) { return s + a * b; });
  return 2.0 * rounds * kRegisters * (VECTOR_BYTES / 4);
}

double roof_fp64(int64_t rounds, double* sink) {
  *sink = multiply_adds<Doubles>(rounds, [](Doubles s, Doubles a, Doubles b) { return s + a * b; });
  return 2.0 * rounds * kRegisters * (VECTOR_BYTES / 8);
}

// 0 where the processor has no bf16 multiply-add of its own.
double roof_bf16(int64_t rounds, double* sink) {
#if defined(__AVX512BF16__)
  *sink = multiply_adds<Floats>(rounds, [](Floats s, Floats a, Floats b) {
    return (Floats)_mm512_dpbf16_ps((__m512)s, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  });
  return 4.0 * rounds * kRegisters * 16;
#else
  (void)rounds;
  *sink = 0;
  return 0;
#endif
}

// Memory made of huge pages is read fastest. To be called before the memory is first written.
void roof_use_huge_pages([[maybe_unused]] char* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  char* page = data + (-reinterpret_cast<uintptr_t>(data) & 4095);
  madvise(page, (bytes - (page - data)) & ~size_t{4095}, MADV_HUGEPAGE);
#endif
}

void roof_read(const uint64_t* data, size_t bytes, uint64_t* sink) {
  const Words* words = reinterpret_cast<const Words*>(data);
  Words sums[4] = {Words{}, Words{}, Words{}, Words{}};
  for (size_t i = 0; i + 4 <= bytes / VECTOR_BYTES; i += 4) {
    __builtin_prefetch(reinterpret_cast<const char*>(words + i) + 8192);
    for (int u = 0; u < 4; ++u) sums[u] ^= words[i + u];
  }
  *sink = (sums[0] ^ sums[1] ^ sums[2] ^ sums[3])[0];
}

}  // extern "C"
