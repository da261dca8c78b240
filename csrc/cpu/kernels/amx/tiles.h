// The tile instructions of AMX, and the object that owns a thread's tiles.
//
// With GHOSTED_FAST_EMULATED_TILES the same functions come from tests/amx_emulation. Inline
// assembly rather than the compiler's intrinsics: it needs no flags, and that of GCC 12's
// _tile_loadd has no memory clobber, so that stores which a load depends on may move behind it.
#pragma once

#include <cstdint>

namespace ghosted_fast {
namespace {

constexpr int64_t kAmxRows = 16;
// Bytes of a row, and from one row to the next of a tile that lies in memory by itself.
constexpr int64_t kAmxRowBytes = 64;
constexpr int64_t kAmxDwords = 256;

// What ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t num_rows, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// All eight tiles 16 rows of 64 bytes.
inline TileConfig whole_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, kAmxRows, kAmxRowBytes);
  return config;
}

}  // namespace
}  // namespace ghosted_fast

#ifdef GHOSTED_FAST_EMULATED_TILES
#include "emulated_tiles.h"
#else

namespace ghosted_fast {
namespace {

inline void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void tile_release() { asm volatile("tilerelease"); }

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows that lie `stride` bytes apart.
template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

// The same for what the L1 cache shall not keep.
template <int kTile>
inline void tile_load_past_l1(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// sum[m][n] += a[m][k] * b[k][n] for pairs of bf16 in each dword of a and b.
template <int kSum, int kA, int kB>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// The same for four int8 in each dword, summed in int32.
template <int kSum, int kA, int kB>
inline void tile_dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace ghosted_fast
#endif

namespace ghosted_fast {
namespace {

// The tiles of the thread that makes it, until it dies: tiles in use make switches to other
// threads dearer.
class Tiles {
 public:
  explicit Tiles(const TileConfig& config) { tile_configure(config); }
  ~Tiles() { tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
}  // namespace ghosted_fast
