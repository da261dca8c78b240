// The machine's limits: multiply-adds from registers, and bytes read from memory. Compiled and
// loaded by roofs.py with this processor's own instruction set.
#include <stddef.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__AVX512BF16__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define WITH_TILES
#include <sys/syscall.h>
#include <unistd.h>
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

// Enough to hide the latency of two multiply-adds per cycle; of four on Arm.
#if defined(__aarch64__)
#define IN_REGISTER "+w"
constexpr int kRegisters = 20;
#else
#define IN_REGISTER "+v"
constexpr int kRegisters = 12;
#endif

template <class Vector, class Step>
double multiply_adds(int64_t rounds, Step step) {
  Vector sums[kRegisters];
  for (int i = 0; i < kRegisters; ++i) sums[i] = Vector{};
  Vector a = Vector{} + 1, b = Vector{} + 1;
  for (int64_t round = 0; round < rounds; ++round) {
    // Keeps the loop from being computed beforehand.
    asm volatile("" : IN_REGISTER(a), IN_REGISTER(b));
#pragma GCC unroll 20
    for (int i = 0; i < kRegisters; ++i) sums[i] = step(sums[i], a, b);
  }
  double total = 0;
  for (int i = 0; i < kRegisters; ++i) total += static_cast<double>(sums[i][0]);
  return total;
}

#ifdef WITH_TILES
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return may;
}

// One product of tiles in each round; four sums hide its latency. Returns the flops.
double multiply_tiles(int64_t rounds) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  asm volatile("ldtilecfg %0" ::"m"(config));  // and zero tiles
  for (int64_t round = 0; round < rounds; round += 4) {
    asm volatile("tdpbf16ps %tmm5, %tmm4, %tmm0");
    if (round + 1 < rounds) asm volatile("tdpbf16ps %tmm5, %tmm4, %tmm1");
    if (round + 2 < rounds) asm volatile("tdpbf16ps %tmm5, %tmm4, %tmm2");
    if (round + 3 < rounds) asm volatile("tdpbf16ps %tmm5, %tmm4, %tmm3");
  }
  asm volatile("tilerelease");
  return 2.0 * 16 * 16 * 32 * rounds;
}
#endif

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
#ifdef WITH_TILES
  *sink = 0;
  if (may_use_tiles()) return multiply_tiles(rounds);
#endif
#if defined(__AVX512BF16__)
  *sink = multiply_adds<Floats>(rounds, [](Floats s, Floats a, Floats b) {
    return (Floats)_mm512_dpbf16_ps((__m512)s, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  });
  return 4.0 * rounds * kRegisters * 16;
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  *sink = multiply_adds<Floats>(rounds, [](Floats s, Floats a, Floats b) {
    return (Floats)vbfmmlaq_f32((float32x4_t)s, (bfloat16x8_t)a, (bfloat16x8_t)b);
  });
  return 2.0 * rounds * kRegisters * 16;
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
