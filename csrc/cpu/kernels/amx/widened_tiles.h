// Tiles of an int8 weight as it lies, written as bf16, which holds every int8.
#pragma once

#include "ghost_stream.h"

namespace ghosted_fast {
namespace {

// How far ahead of its reading each of 16 rows of a weight is prefetched, in bytes.
constexpr int64_t kRowsAhead = 1024;

// Fetches a line of each of 16 rows, kRowsAhead behind the bytes `at`.
inline void prefetch_rows(const void* rows, int64_t stride, int64_t at) {
  // Behind the end of these rows the next 16 begin.
  const int64_t ahead = at + kRowsAhead < stride ? at + kRowsAhead : at + kRowsAhead + 15 * stride;
  for (int64_t row = 0; row < kAmxRows; ++row) {
    __builtin_prefetch(static_cast<const char*>(rows) + row * stride + ahead, 0, 2);
  }
}

// The first of the 16 outputs of a panel of a weight as it lies: those of the last panel may
// overlap those before, which are not written again.
inline int64_t first_output(int64_t size, int64_t panel) {
  return min64(panel * kPanel, size - kPanel);
}

// to[0, 16) = 32 int8 as pairs of bf16: fp32 of 8 bits has nothing but zeros in its lower half.
inline void widen_row(const int8_t* from, float* to) {
#if defined(__AVX512F__)
  const __m512i words =
      _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16);
  const __m512i odd = _mm512_srai_epi32(words, 16);
  const __m512i lower = _mm512_srli_epi32((__m512i)_mm512_cvtepi32_ps(even), 16);
  _mm512_storeu_si512(to, _mm512_or_si512((__m512i)_mm512_cvtepi32_ps(odd), lower));
#else
  uint16_t wide[kTileInputs];
  for (int64_t i = 0; i < kTileInputs; ++i) wide[i] = float_to_bfloat16(from[i]);
  std::memcpy(to, wide, sizeof(wide));
#endif
}

// to[row][16 pairs] of up to 16 rows of up to 32 inputs; zeros beyond them.
inline void widen_tile(const int8_t* from, int64_t stride, int64_t rows, int64_t inputs,
                       float* to) {
  if (rows >= kAmxRows && inputs >= kTileInputs) {
    for (int64_t row = 0; row < kAmxRows; ++row) widen_row(from + row * stride, to + row * kPanel);
    return;
  }
  for (int64_t row = 0; row < kAmxRows; ++row) {
    int8_t part[kTileInputs] = {};
    if (row < rows) {
      std::memcpy(part, from + row * stride, static_cast<size_t>(min64(kTileInputs, inputs)));
    }
    widen_row(part, to + row * kPanel);
  }
}

// The tiles of the panels [begin, end), in the order in which they are multiplied. Each is widened
// kAhead tiles before it is loaded: by then it has left the store buffer.
class WidenedTiles {
 public:
  WidenedTiles(const ApplyArgs& args, int64_t begin, int64_t end)
      : weight_(static_cast<const int8_t*>(args.weight)),
        size_(args.hidden_size),
        steps_(TileSteps(size_).count()),
        panel_(begin),
        end_(end) {
    for (int64_t tile = 0; tile < kAhead; ++tile) widen_next();
  }

  // The panels come in order, and so do their steps.
  void begin(int64_t) {}

  // Fills tile 7 with the next step.
  void load(int64_t) {
    widen_next();
    tile_load<7>(held_[loaded_++ % kHeld], kAmxRowBytes);
  }
  void load_rest(int64_t step) { load(step); }

 private:
  static constexpr int64_t kAhead = 3, kHeld = kAhead + 1;

  void widen_next() {
    if (panel_ == end_) return;
    const int64_t input = step_ * kTileInputs;
    const int8_t* rows = weight_ + first_output(size_, panel_) * size_;
    if (step_ % 2 == 0) prefetch_rows(rows, size_, input);
    widen_tile(rows + input, size_, kPanel, size_ - input, held_[widened_++ % kHeld]);
    if (++step_ < steps_) return;
    step_ = 0;
    ++panel_;
  }

  const int8_t* weight_;
  int64_t size_, steps_;
  int64_t panel_, end_, step_ = 0;  // what is widened next
  int64_t widened_ = 0, loaded_ = 0;
  alignas(64) float held_[kHeld][kAmxDwords];
};

}  // namespace
}  // namespace ghosted_fast
