// The part of gram_update that touches every token once: checks, scales, panels and moments.
#pragma once

#include "../token_order.h"
#include "gram_kernel.h"
#include "rows.h"

namespace ghosted_fast {
namespace {

// Columns that one packing task takes: eight panels.
constexpr int64_t kGroupColumns = 128;
// Scaled activations outside 2^-40 .. 2^40 are shifted by a power of two: their products stay in
// fp32's range, and vdpbf16ps, which flushes denormals, never sees one that matters.
constexpr int kSafeExponent = 40;

// The tokens that count, and what each is multiplied with.
struct Tokens {
  int64_t count = 0;
  int64_t* index = nullptr;          // row of x and y
  float* feature_scale = nullptr;    // sqrt(w), or sqrt(w) / rms, times 2^feature_shift
  float* target_scale = nullptr;     // sqrt(w) times 2^target_shift
  double* weight = nullptr;          // w, as scale_tokens takes it
  double* feature_weight = nullptr;  // w, or w / rms
  int feature_shift = 0;
  int target_shift = 0;
  bool feature_scales_are_exact = true;  // powers of two: bf16 stays bf16
  bool target_scales_are_exact = true;

  static size_t bytes(int64_t count) {
    return 2 * Scratch::bytes_for<int64_t>(count) + 4 * Scratch::bytes_for<float>(count) +
           3 * Scratch::bytes_for<double>(count);
  }
};

inline const char* row_of(const Rows& rows, int64_t token) {
  return static_cast<const char*>(rows.data) + token * rows.stride * bytes_of(rows.dtype);
}

inline bool is_power_of_two(double value) {
  int exponent;
  return std::frexp(value, &exponent) == 0.5;
}

// The power of two that a scale is meant to be whose weight was rounded to fp32; else the scale.
inline double snapped(double scale) {
  constexpr double kRounding = 1.01 / (1 << 25);  // half of the weight's: a scale is its root
  int exponent;
  const double fraction = std::frexp(scale, &exponent);
  const double power = std::ldexp(1.0, fraction > 0.75 ? exponent : exponent - 1);
  return std::fabs(scale - power) <= kRounding * power ? power : scale;
}

inline int safe_shift(double largest) {
  if (largest == 0.0) return 0;
  int exponent;
  std::frexp(largest, &exponent);
  return exponent > kSafeExponent || exponent < -kSafeExponent ? -exponent : 0;
}

// values[i] = values[order[i]]; `spare` has room for them.
template <class T>
inline void permute(T* values, const int64_t* order, int64_t count, double* spare) {
  T* copy = reinterpret_cast<T*>(spare);
  std::memcpy(copy, values, static_cast<size_t>(count) * sizeof(T));
  for (int64_t i = 0; i < count; ++i) values[i] = copy[order[i]];
}

// Lists the tokens of a weight above 0, or returns the first that has no weight.
inline GramStatus list_tokens(const GramArgs& args, Tokens& tokens) {
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    const float weight = args.token_weight == nullptr ? 1.0f : args.token_weight[token];
    if (!(weight >= 0.0f) || std::isinf(weight)) return {GramProblem::kWeight, token};
    if (weight == 0.0f) continue;
    tokens.index[tokens.count] = token;
    tokens.weight[tokens.count] = weight;
    ++tokens.count;
  }
  return {};
}

// The largest magnitudes of the listed tokens, and 1 / rms of x, 1 where x is not normed. Returns
// the first token that is not finite.
inline GramStatus measure_tokens(const GramArgs& args, const Tokens& tokens, int64_t threads,
                                 float* x_largest, float* y_largest, double* inverse_rms) {
  constexpr int64_t kRowsPerTask = 32;
  for_each_task(
      (tokens.count + kRowsPerTask - 1) / kRowsPerTask, threads, [&](int64_t task, int64_t) {
        const int64_t end = min64(tokens.count, (task + 1) * kRowsPerTask);
        for (int64_t i = task * kRowsPerTask; i < end; ++i) {
          const char* x = row_of(args.x, tokens.index[i]);
          x_largest[i] = largest_magnitude(x, args.x.dtype, args.hidden_size);
          y_largest[i] = 0.0f;
          if (args.y.data != nullptr) {
            y_largest[i] =
                largest_magnitude(row_of(args.y, tokens.index[i]), args.y.dtype, args.num_outputs);
          }
          inverse_rms[i] = 1.0;
          if (args.normed && x_largest[i] <= 3.4e38f) {
            const double squares = exact_sum_of_squares(x, args.x.dtype, args.hidden_size);
            const double size = static_cast<double>(args.hidden_size);
            inverse_rms[i] = 1.0 / std::sqrt(squares / size + args.norm_eps);
          }
        }
      });
  for (int64_t i = 0; i < tokens.count; ++i) {
    if (!std::isfinite(x_largest[i])) return {GramProblem::kX, tokens.index[i]};
  }
  for (int64_t i = 0; i < tokens.count; ++i) {
    if (!std::isfinite(y_largest[i])) return {GramProblem::kY, tokens.index[i]};
  }
  return {};
}

// The scales of the tokens, and the sizes of their largest products. What was 1 / rms in
// `feature_weight` becomes the weight of the features.
//
// The usual weights of normed rows are powers of four times their mean squares, so that bf16 stays
// bf16. They are taken as such in all sums: moved no further than their rounding has moved them.
inline void scale_tokens(const GramArgs& args, const float* x_largest, const float* y_largest,
                         Tokens& tokens, double* sizes) {
  const double* inverse_rms = tokens.feature_weight;
  const auto largest_target = [&](int64_t i) {
    return static_cast<double>(y_largest[i]) + (args.delta ? x_largest[i] : 0.0f);
  };
  double feature_largest = 0.0, target_largest = 0.0;
  for (int64_t i = 0; i < tokens.count; ++i) {
    const double root = std::sqrt(tokens.weight[i]);
    // Not std::fmax, over which GCC 12 breaks down where it compiles for Arm.
    const double feature = root * inverse_rms[i] * x_largest[i], target = root * largest_target(i);
    feature_largest = feature > feature_largest ? feature : feature_largest;
    target_largest = target > target_largest ? target : target_largest;
  }
  tokens.feature_shift = safe_shift(feature_largest);
  tokens.target_shift = safe_shift(target_largest);
  for (int64_t i = 0; i < tokens.count; ++i) {
    double root = std::sqrt(tokens.weight[i]), feature = root * inverse_rms[i];
    if (args.normed) {
      const double usual = snapped(feature), moved = usual / feature;
      root *= moved;
      feature = usual;
      tokens.weight[i] *= moved * moved;
    }
    tokens.feature_scales_are_exact &= is_power_of_two(feature);
    tokens.target_scales_are_exact &= is_power_of_two(root);
    tokens.feature_scale[i] = static_cast<float>(std::ldexp(feature, tokens.feature_shift));
    tokens.target_scale[i] = static_cast<float>(std::ldexp(root, tokens.target_shift));
    sizes[i] = feature * x_largest[i] * std::fmax(feature * x_largest[i], root * largest_target(i));
    tokens.feature_weight[i] = tokens.weight[i] * inverse_rms[i];
  }
}

// Fills `tokens`, or returns what is wrong with which token.
inline GramStatus prepare_tokens(const GramArgs& args, int64_t threads, Scratch& scratch,
                                 Tokens& tokens) {
  tokens.index = scratch.take<int64_t>(args.num_tokens);
  tokens.feature_scale = scratch.take<float>(args.num_tokens);
  tokens.target_scale = scratch.take<float>(args.num_tokens);
  float* x_largest = scratch.take<float>(args.num_tokens);
  float* y_largest = scratch.take<float>(args.num_tokens);
  tokens.weight = scratch.take<double>(args.num_tokens);
  tokens.feature_weight = scratch.take<double>(args.num_tokens);
  double* sizes = scratch.take<double>(args.num_tokens);
  int64_t* order = scratch.take<int64_t>(args.num_tokens);
  GramStatus status = list_tokens(args, tokens);
  if (status.problem != GramProblem::kNone) return status;
  status = measure_tokens(args, tokens, threads, x_largest, y_largest, tokens.feature_weight);
  if (status.problem != GramProblem::kNone) return status;
  scale_tokens(args, x_largest, y_largest, tokens, sizes);
  if (order_tokens(sizes, tokens.count, order)) {
    permute(tokens.index, order, tokens.count, sizes);
    permute(tokens.feature_scale, order, tokens.count, sizes);
    permute(tokens.target_scale, order, tokens.count, sizes);
    permute(tokens.weight, order, tokens.count, sizes);
    permute(tokens.feature_weight, order, tokens.count, sizes);
  }
  return {};
}

// What to pack: rows times a scale, less other rows if `minus` is given.
struct PackSource {
  Rows rows;
  const Rows* minus = nullptr;
  int64_t columns = 0;
  const float* scale = nullptr;
};

// Packs 128 columns of one slab of tokens [begin, end) into fp32 panels.
inline void pack_floats(const PackSource& source, const int64_t* index, int64_t begin, int64_t end,
                        int64_t column, float* slab) {
  const int64_t count = min64(kGroupColumns, source.columns - column);
  const int64_t padded = round_up(count, kPanel);
  float* panels = slab + column / kPanel * kPanelStride;
  float values[kGroupColumns], other[kGroupColumns];
  for (int64_t i = begin; i < end; ++i) {
    const Rows& rows = source.rows;
    row_to_float(row_of(rows, index[i]) + column * bytes_of(rows.dtype), rows.dtype, count, padded,
                 values);
    if (source.minus != nullptr) {
      const Rows& minus = *source.minus;
      row_to_float(row_of(minus, index[i]) + column * bytes_of(minus.dtype), minus.dtype, count,
                   padded, other);
      for (int64_t c = 0; c < padded; c += kLanes) {
        store(values + c, load(values + c) - load(other + c));
      }
    }
    const VecF scale = broadcast(source.scale[i]);
    float* to = panels + (i - begin) * kPanel;
    for (int64_t c = 0; c < padded; c += kPanel, to += kPanelStride) {
      for (int v = 0; v < kPanel; v += kLanes) store(to + v, load(values + c + v) * scale);
    }
  }
}

#if defined(GHOSTED_FAST_NEON_BF16)
// Eight bf16 times a power of two; zeros after the first `count`.
inline uint16x8_t scaled_bf16(const char* from, int64_t count, float scale) {
  uint16x8_t raw = {};
  if (count >= 8) {
    std::memcpy(&raw, from, sizeof(raw));
  } else if (count > 0) {
    std::memcpy(&raw, from, static_cast<size_t>(count) * 2);
  }
  const float32x4_t low = (float32x4_t)vshll_n_u16(vget_low_u16(raw), 16);
  const float32x4_t high = (float32x4_t)vshll_high_n_u16(raw, 16);
  return vuzp2q_u16((uint16x8_t)vmulq_n_f32(low, scale), (uint16x8_t)vmulq_n_f32(high, scale));
}

// Eight columns of four tokens as quads: to[column][token].
inline void store_quads(const uint16x8_t* tokens, float* to) {
  const uint32x4_t first[2] = {(uint32x4_t)vzip1q_u16(tokens[0], tokens[1]),
                               (uint32x4_t)vzip2q_u16(tokens[0], tokens[1])};
  const uint32x4_t second[2] = {(uint32x4_t)vzip1q_u16(tokens[2], tokens[3]),
                                (uint32x4_t)vzip2q_u16(tokens[2], tokens[3])};
  for (int i = 0; i < 2; ++i, to += 2 * kLanes) {
    store(to, (VecF)vzip1q_u32(first[i], second[i]));
    store(to + kLanes, (VecF)vzip2q_u32(first[i], second[i]));
  }
}
#endif

// Packs 128 columns of one slab of bf16 tokens into panels of pairs. Scales are powers of two.
inline void pack_pairs(const PackSource& source, const int64_t* index, int64_t begin, int64_t end,
                       int64_t column, float* slab) {
#if defined(__AVX512BF16__)
  const int64_t count = min64(kGroupColumns, source.columns - column);
  float* panels = slab + column / kPanel * kPanelStride;
  for (int64_t i = begin; i < end; i += 2) {
    const bool two = i + 1 < end;
    const char* even = row_of(source.rows, index[i]) + column * 2;
    const char* odd = two ? row_of(source.rows, index[i + 1]) + column * 2 : even;
    const __m512 even_scale = _mm512_set1_ps(source.scale[i]);
    const __m512 odd_scale = _mm512_set1_ps(two ? source.scale[i + 1] : 0.0f);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    float* to = panels + (i - begin) / 2 * kPanel;
    for (int64_t c = 0; c < count; c += kPanel, to += kPanelStride) {
      const __mmask16 mask =
          static_cast<__mmask16>(count - c >= kPanel ? 0xffff : (1 << (count - c)) - 1);
      const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + 2 * c));
      const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd + 2 * c));
      const __m512 a_scaled = _mm512_mul_ps((__m512)_mm512_slli_epi32(a, 16), even_scale);
      const __m512 b_scaled = _mm512_mul_ps((__m512)_mm512_slli_epi32(b, 16), odd_scale);
      const __m512i low = _mm512_srli_epi32((__m512i)a_scaled, 16);
      const __m512i pair = _mm512_or_si512(low, _mm512_and_si512((__m512i)b_scaled, high));
      _mm512_storeu_si512(to, pair);
    }
  }
#elif defined(GHOSTED_FAST_NEON_BF16)
  constexpr int64_t kTaken = 4, kColumns = 8;
  const int64_t count = min64(kGroupColumns, source.columns - column);
  float* panels = slab + column / kPanel * kPanelStride;
  for (int64_t i = begin; i < end; i += kTaken) {
    float* to = panels + (i - begin) / 2 * kPanel;
    for (int64_t c = 0; c < count; c += kPanel, to += kPanelStride) {
      for (int64_t half = 0; half < kPanel; half += kColumns) {
        uint16x8_t tokens[kTaken] = {};
        for (int64_t t = 0; t < min64(kTaken, end - i); ++t) {
          const char* from = row_of(source.rows, index[i + t]) + (column + c + half) * 2;
          tokens[t] = scaled_bf16(from, count - c - half, source.scale[i + t]);
        }
        store_quads(tokens, to + 2 * half);
      }
    }
  }
#else
  (void)source, (void)index, (void)begin, (void)end, (void)column, (void)slab;
#endif
}

// Packs the tokens [begin, end) into panels; each slab's columns are cut into tasks.
inline void pack(const PackSource& source, const Tokens& tokens, int64_t begin, int64_t end,
                 int64_t threads, const Panels& panels) {
  const int64_t slab_tokens = panels.tokens_per_slab();
  const int64_t slabs = (end - begin + slab_tokens - 1) / slab_tokens;
  const int64_t groups = (source.columns + kGroupColumns - 1) / kGroupColumns;
  for_each_task(slabs * groups, threads, [&](int64_t task, int64_t) {
    const int64_t slab = task / groups;
    const int64_t from = begin + slab * slab_tokens;
    float* to = panels.data + slab * panels.count * kPanelStride;
    (panels.pairs ? pack_pairs : pack_floats)(source, tokens.index, from,
                                              min64(end, from + slab_tokens),
                                              task % groups * kGroupColumns, to);
  });
}

// moments += sums over all tokens, in fp64.
inline void add_moments(const GramArgs& args, const Tokens& tokens, int64_t threads) {
  const int64_t groups = (args.hidden_size + kGroupColumns - 1) / kGroupColumns;
  for_each_task(groups, threads, [&](int64_t group, int64_t) {
    const int64_t column = group * kGroupColumns;
    const int64_t count = min64(kGroupColumns, args.hidden_size - column);
    const int64_t padded = round_up(count, kPanel);
    double features[kGroupColumns] = {}, change[kGroupColumns] = {}, squares[kGroupColumns] = {};
    float x[kGroupColumns], y[kGroupColumns];
    for (int64_t i = 0; i < tokens.count; ++i) {
      row_to_float(row_of(args.x, tokens.index[i]) + column * bytes_of(args.x.dtype), args.x.dtype,
                   count, padded, x);
      const double feature_weight = tokens.feature_weight[i], weight = tokens.weight[i];
      for (int64_t c = 0; c < padded; ++c) features[c] += feature_weight * x[c];
      if (args.y.data == nullptr) continue;
      row_to_float(row_of(args.y, tokens.index[i]) + column * bytes_of(args.y.dtype), args.y.dtype,
                   count, padded, y);
      for (int64_t c = 0; c < padded; ++c) {
        const double delta = static_cast<double>(y[c]) - x[c];
        change[c] += weight * delta;
        squares[c] += weight * delta * delta;
      }
    }
    double* out = args.moments + column;
    for (int64_t c = 0; c < count; ++c) {
      out[c] += features[c];
      out[args.hidden_size + c] += change[c];
      out[2 * args.hidden_size + c] += squares[c];
    }
  });
}

}  // namespace
}  // namespace ghosted_fast
