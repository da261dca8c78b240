// ghost_apply for a few rows with a packed weight, [panel][k][16 outputs] dwords: two bf16 of
// neighbouring k, or one fp32.
//
// The weight is one stream from its first byte to its last, whatever the number of rows, and a
// broadcast of x meets sixteen outputs: no lanes are left to add up.
#pragma once

#include "lefts.h"

namespace ghosted_fast {
namespace {

// Rows of x that meet a panel at once: with the panel's own vectors they fill the registers.
#if defined(__AVX512F__)
constexpr int kPanelTokens = 16;
#elif defined(__AVX2__) || defined(GHOSTED_FAST_NEON)
constexpr int kPanelTokens = 4;
#else
constexpr int kPanelTokens = 2;
#endif
// How far ahead of its reading the stream is prefetched: what memory delivers in one latency, and
// as much again.
constexpr int64_t kStreamAhead = 8192;

// Numbers of x that one dword of the weight meets, as dwords: a pair of bf16 is one where the
// processor multiplies pairs, and two fp32 numbers elsewhere.
template <Dtype kType>
constexpr int kInputsPerDword = kType == Dtype::kBFloat16 && !kHasPairs ? 2 : 1;

// Dwords per output of a packed weight.
template <Dtype kType>
inline int64_t packed_dwords(int64_t size) {
  return kType == Dtype::kBFloat16 ? (size + 1) / 2 : size;
}

// sums[t][output] of one panel for the tokens of x, [k][kInputsPerDword][kTokens] dwords. Each sum
// is spread over kChains registers, so that there are enough to hide the latency of an addition.
template <Dtype kType, int kTokens>
inline void panel_dots(const float* panel, int64_t dwords, const float* x, float* sums) {
  constexpr int kInputs = kInputsPerDword<kType>, kPerStep = kInputs * kTokens;
  constexpr int kChains = kPanelTokens / kTokens > 8 ? 8 : kPanelTokens / kTokens;
  VecF acc[kChains][kTokens * kPanelVectors] = {};
  // Of `inputs` those from `first` on are this step's.
  auto step = [&](int64_t k, VecF* into, const auto& inputs, int first) {
    VecF weight[kInputs * kPanelVectors];
    __builtin_prefetch(reinterpret_cast<const char*>(panel + k * kPanel) + kStreamAhead, 0, 3);
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) {
      const VecF dword = load(panel + k * kPanel + v * kLanes);
      if constexpr (kInputs == 2) {
        weight[v] = (VecF)((VecI)dword << 16);
        weight[kPanelVectors + v] = (VecF)((VecI)dword & static_cast<int32_t>(0xffff0000));
      } else {
        weight[v] = dword;
      }
    }
    GHOSTED_FAST_UNROLL
    for (int i = 0; i < kInputs; ++i) {
      GHOSTED_FAST_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const auto input = inputs.at(first + i * kTokens + t);
        GHOSTED_FAST_UNROLL
        for (int v = 0; v < kPanelVectors; ++v) {
          VecF& sum = into[t * kPanelVectors + v];
          sum = multiply_add < kType == Dtype::kBFloat16 &&
                kHasPairs > (sum, input, weight[i * kPanelVectors + v]);
        }
      }
    }
  };
  int64_t k = 0;
  for (; k + kChains <= dwords; k += kChains) {
    const Lefts<kChains * kPerStep> inputs(x + k * kPerStep);
    GHOSTED_FAST_UNROLL
    for (int chain = 0; chain < kChains; ++chain) {
      step(k + chain, acc[chain], inputs, chain * kPerStep);
    }
  }
  for (; k < dwords; ++k) step(k, acc[0], Lefts<kPerStep>(x + k * kPerStep), 0);
  GHOSTED_FAST_UNROLL
  for (int i = 0; i < kTokens * kPanelVectors; ++i) {
    VecF sum = acc[0][i];
    GHOSTED_FAST_UNROLL
    for (int chain = 1; chain < kChains; ++chain) sum += acc[chain][i];
    store(sums + i * kLanes, sum);
  }
}

// Panels of bf16 pairs as panels of fp32 numbers, [panel][size][16].
inline void widen_strip(const float* strip, int64_t panels, int64_t size, float* to) {
  const int64_t dwords = packed_dwords<Dtype::kBFloat16>(size);
  for (int64_t panel = 0; panel < panels; ++panel, strip += dwords * kPanel, to += size * kPanel) {
    for (int64_t i = 0; i < dwords * kPanel; i += kLanes) {
      const VecI pairs = (VecI)load(strip + i);
      float* low = to + i / kPanel * 2 * kPanel + i % kPanel;
      store(low, (VecF)(pairs << 16));
      if (i / kPanel * 2 + 1 < size) {
        store(low + kPanel, (VecF)(pairs & static_cast<int32_t>(0xffff0000)));
      }
    }
  }
}

// The narrowest instantiation that holds so many tokens.
inline int64_t panel_tokens_for(int64_t tokens) {
  int64_t held = 1;
  while (held < tokens && held < kPanelTokens) held *= 2;
  return kPanelTokens == 16 && tokens > 8 && tokens <= 12 ? 12 : held;
}

template <Dtype kType>
inline void panel_dots_of(int64_t tokens, const float* panel, int64_t dwords, const float* x,
                          float* sums) {
#if defined(__AVX512F__)
  if (tokens == 16) return panel_dots<kType, 16>(panel, dwords, x, sums);
  if (tokens == 12) return panel_dots<kType, 12>(panel, dwords, x, sums);
  if (tokens == 8) return panel_dots<kType, 8>(panel, dwords, x, sums);
#endif
#if defined(__AVX2__) || defined(GHOSTED_FAST_NEON)
  if (tokens == 4) return panel_dots<kType, 4>(panel, dwords, x, sums);
#endif
  if (tokens == 2) return panel_dots<kType, 2>(panel, dwords, x, sums);
  return panel_dots<kType, 1>(panel, dwords, x, sums);
}

// Writes rows of x, dwords of k at a distance of x_stride, as panel_dots reads them: `tokens` side
// by side, zeros for those beyond num_rows.
inline void interleave_rows(const float* x, int64_t x_stride, int64_t num_rows, int64_t dwords,
                            int64_t tokens, float* to) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = x + t * x_stride;
    for (int64_t k = 0; k < dwords; ++k) to[k * tokens + t] = t < num_rows ? row[k] : 0.0f;
  }
}

}  // namespace
}  // namespace ghosted_fast
