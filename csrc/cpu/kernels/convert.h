// Between the stored dtypes and fp32 vectors, and pairs of bf16 in a dword.
#pragma once

#include "simd.h"

namespace ghosted_fast {
namespace {

template <Dtype kType>
struct Storage;
template <>
struct Storage<Dtype::kBFloat16> {
  typedef uint16_t type;
};
template <>
struct Storage<Dtype::kFloat16> {
  typedef uint16_t type;
};
template <>
struct Storage<Dtype::kFloat32> {
  typedef float type;
};
template <>
struct Storage<Dtype::kInt8> {
  typedef int8_t type;
};
template <Dtype kType>
using StorageOf = typename Storage<kType>::type;

// A dtype as a value whose type tells which.
template <Dtype kType>
struct DtypeTag {
  static constexpr Dtype kDtype = kType;
};

// Returns body(tag), with the tag of a dtype of activations.
template <class Body>
inline auto with_dtype(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return body(DtypeTag<Dtype::kBFloat16>{});
    case Dtype::kFloat16:
      return body(DtypeTag<Dtype::kFloat16>{});
    default:
      return body(DtypeTag<Dtype::kFloat32>{});
  }
}

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kInt8 ? 1 : 2;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t mantissa = half & 0x3ff;
  if (exponent == 0) {  // zero or denormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
    return bits_to_float(sign | float_to_bits(magnitude));
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536
  if (magnitude < 0x38800000u) {
    // Denormal: adding 0.5 puts the rounding position of 2^-24 at the end of the mantissa.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfff + odd) >> 13));
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <Dtype kType>
inline VecF load_as_float(const StorageOf<kType>* from) {
  if constexpr (kType == Dtype::kFloat32) {
    return load(from);
  } else {
#if defined(__AVX512F__)
    if constexpr (kType == Dtype::kBFloat16) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
    } else if constexpr (kType == Dtype::kFloat16) {
      return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    } else {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return (VecF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
    }
#elif defined(__AVX2__)
    if constexpr (kType == Dtype::kBFloat16) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
    } else if constexpr (kType == Dtype::kFloat16) {
      return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    } else {
      const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      return (VecF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
    }
#elif defined(GHOSTED_FAST_NEON)
    if constexpr (kType == Dtype::kBFloat16) {
      return (VecF)vshll_n_u16(vld1_u16(from), 16);
    } else if constexpr (kType == Dtype::kFloat16) {
      return (VecF)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
    } else {
      int32_t four;
      std::memcpy(&four, from, sizeof(four));
      const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
      return (VecF)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    }
#else
    VecF v;
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (kType == Dtype::kBFloat16) {
        v[i] = bits_to_float(static_cast<uint32_t>(from[i]) << 16);
      } else if constexpr (kType == Dtype::kFloat16) {
        v[i] = half_to_float(from[i]);
      } else {
        v[i] = static_cast<float>(from[i]);
      }
    }
    return v;
#endif
  }
}

// The first `count` elements, zeros after them; nothing beyond is read.
template <Dtype kType>
inline VecF load_as_float(const StorageOf<kType>* from, int64_t count) {
  if (count >= kLanes) return load_as_float<kType>(from);
  StorageOf<kType> part[kLanes] = {};
  if (count > 0) std::memcpy(part, from, static_cast<size_t>(count) * sizeof(part[0]));
  return load_as_float<kType>(part);
}

template <Dtype kType>
inline void store_rounded(StorageOf<kType>* to, VecF v) {
  if constexpr (kType == Dtype::kFloat32) {
    store(to, v);
  } else {
#if defined(__AVX512F__)
    if constexpr (kType == Dtype::kFloat16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
      return;
    } else if constexpr (kType == Dtype::kBFloat16) {
      // Not vcvtneps2bf16: it flushes denormals.
      const __m512i bits = (__m512i)v;
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
      const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
      const __m512i top = _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(top));
      return;
    }
#elif defined(__AVX2__)
    if constexpr (kType == Dtype::kFloat16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                       _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#elif defined(GHOSTED_FAST_NEON)
    if constexpr (kType == Dtype::kFloat16) {
      vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
      return;
    } else if constexpr (kType == Dtype::kBFloat16) {
      const uint32x4_t bits = (uint32x4_t)v;
      const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
      const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
      const uint32x4_t is_number = vceqq_f32((float32x4_t)v, (float32x4_t)v);
      vst1_u16(to, vshrn_n_u32(vbslq_u32(is_number, up, quiet), 16));
      return;
    }
#endif
    for (int i = 0; i < kLanes; ++i) {
      to[i] = kType == Dtype::kBFloat16 ? float_to_bfloat16(v[i]) : float_to_half(v[i]);
    }
  }
}

template <Dtype kType>
inline void store_rounded(StorageOf<kType>* to, VecF v, int64_t count) {
  if (count >= kLanes) {
    store_rounded<kType>(to, v);
  } else if (count > 0) {
    StorageOf<kType> part[kLanes];
    store_rounded<kType>(part, v);
    std::memcpy(to, part, static_cast<size_t>(count) * sizeof(part[0]));
  }
}

// to[0, padded) = from[0, count) as fp32, zeros after it; padded is a multiple of kLanes.
template <Dtype kType>
inline void row_to_float_typed(const StorageOf<kType>* from, int64_t count, int64_t padded,
                               float* to) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    store(to + i, load_as_float<kType>(from + min64(i, count), count - i));
  }
}

inline void row_to_float(const void* from, Dtype dtype, int64_t count, int64_t padded, float* to) {
  const auto convert = [&](auto tag) {
    constexpr Dtype kType = decltype(tag)::kDtype;
    row_to_float_typed<kType>(static_cast<const StorageOf<kType>*>(from), count, padded, to);
  };
  if (dtype == Dtype::kInt8) return convert(DtypeTag<Dtype::kInt8>{});
  with_dtype(dtype, convert);
}

#if defined(__AVX512BF16__)
inline VecF multiply_add_pairs(VecF sum, VecF a, VecF b) {
  return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#elif defined(GHOSTED_FAST_NEON_BF16)
inline VecF multiply_add_pairs(VecF sum, VecF a, VecF b) {
  return (VecF)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#else
inline VecF multiply_add_pairs(VecF sum, VecF, VecF) { return sum; }  // never reached
#endif

// sum + a * b, of fp32 lanes or of pairs of bf16 lanes.
template <bool kPairs>
inline VecF multiply_add(VecF sum, VecF a, VecF b) {
  if constexpr (kPairs) {
    return multiply_add_pairs(sum, a, b);
  } else {
    return a * b + sum;
  }
}

inline VecF broadcast(float value) {
#if defined(__AVX512F__)
  return (VecF)_mm512_set1_ps(value);
#elif defined(__AVX2__)
  return (VecF)_mm256_set1_ps(value);
#else
  return VecF{value, value, value, value};
#endif
}

inline float sum_of_lanes(VecF v) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

}  // namespace
}  // namespace ghosted_fast
