// The tile instructions in plain C++, with the names of csrc/cpu/kernels/amx/tiles.h.
//
// TDPBF16PS follows the documented order and rounding, bit for bit as the hardware does: for each
// output two chains of fused multiply-adds from zero, one for the even and one for the odd numbers
// of the pairs, then their sum, then its addition to the output; denormals count as zero. Aborts
// where the processor would raise an exception, and where a thread configures tiles that it has not
// released. What is read or written is seen by the sanitizers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ghosted_fast {
namespace {

struct EmulatedTile {
  uint32_t dword[16][16];
};
thread_local TileConfig emulated_config{0};
thread_local EmulatedTile emulated_tiles[8];

inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline bool tiles_in_use() { return emulated_config.palette != 0; }

inline void tile_configure(const TileConfig& config) {
  demand(!tiles_in_use(), "configured again before they were released");
  for (int tile = 0; tile < 8; ++tile) {
    demand(config.rows[tile] <= 16 && config.row_bytes[tile] <= 64, "larger than 16 rows of 64");
    demand((config.rows[tile] == 0) == (config.row_bytes[tile] == 0), "rows without columns");
  }
  emulated_config = config;
  std::memset(emulated_tiles, 0, sizeof(emulated_tiles));
}

inline void tile_release() {
  emulated_config = TileConfig{0};
  std::memset(emulated_tiles, 0xff, sizeof(emulated_tiles));
}

template <int kTile>
inline void tile_zero() {
  demand(tiles_in_use() && emulated_config.rows[kTile] != 0, "used before they were configured");
  std::memset(&emulated_tiles[kTile], 0, sizeof(EmulatedTile));
}

template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  tile_zero<kTile>();
  for (int row = 0; row < emulated_config.rows[kTile]; ++row) {
    std::memcpy(emulated_tiles[kTile].dword[row], static_cast<const char*>(from) + row * stride,
                emulated_config.row_bytes[kTile]);
  }
}

template <int kTile>
inline void tile_load_past_l1(const void* from, int64_t stride) {
  tile_load<kTile>(from, stride);
}

template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  demand(tiles_in_use() && emulated_config.rows[kTile] != 0, "used before they were configured");
  for (int row = 0; row < emulated_config.rows[kTile]; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, emulated_tiles[kTile].dword[row],
                emulated_config.row_bytes[kTile]);
  }
}

inline float flushed(float value) {
  return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.0f, value) : value;
}

inline float emulated_bfloat16(uint32_t dword, int odd) {
  const uint32_t bits = odd != 0 ? dword & 0xffff0000u : dword << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return flushed(value);
}

// Calls body(m, n, output) for the outputs, whose shape must fit those of the operands.
template <int kSum, int kA, int kB, class Body>
inline void for_outputs(Body&& body) {
  const TileConfig& config = emulated_config;
  demand(tiles_in_use(), "used before they were configured");
  demand(config.rows[kSum] == config.rows[kA] && config.row_bytes[kSum] == config.row_bytes[kB] &&
             config.row_bytes[kA] == 4 * config.rows[kB] && config.rows[kB] != 0,
         "multiplied in shapes that do not fit");
  for (int m = 0; m < config.rows[kSum]; ++m) {
    for (int n = 0; n < config.row_bytes[kSum] / 4; ++n) {
      body(m, n, config.rows[kB], &emulated_tiles[kSum].dword[m][n]);
    }
  }
}

template <int kSum, int kA, int kB>
inline void tile_dot() {
  for_outputs<kSum, kA, kB>([](int m, int n, int pairs, uint32_t* output) {
    float sums[2] = {0.0f, 0.0f}, value;
    for (int k = 0; k < pairs; ++k) {
      for (int odd = 0; odd < 2; ++odd) {
        const float a = emulated_bfloat16(emulated_tiles[kA].dword[m][k], odd);
        const float b = emulated_bfloat16(emulated_tiles[kB].dword[k][n], odd);
        sums[odd] = flushed(std::fma(a, b, sums[odd]));
      }
    }
    std::memcpy(&value, output, sizeof(value));
    value = flushed(flushed(value) + flushed(sums[0] + sums[1]));
    std::memcpy(output, &value, sizeof(value));
  });
}

template <int kSum, int kA, int kB>
inline void tile_dot_int8() {
  for_outputs<kSum, kA, kB>([](int m, int n, int quads, uint32_t* output) {
    uint32_t sum = *output;
    for (int k = 0; k < quads; ++k) {
      for (int byte = 0; byte < 32; byte += 8) {
        const auto a = static_cast<int8_t>(emulated_tiles[kA].dword[m][k] >> byte);
        const auto b = static_cast<int8_t>(emulated_tiles[kB].dword[k][n] >> byte);
        sum += static_cast<uint32_t>(a * b);
      }
    }
    *output = sum;
  });
}

}  // namespace
}  // namespace ghosted_fast
