// Neighbouring numbers that each multiply whole vectors: the left side of the products.
//
// x86 broadcasts each from memory. On Arm that would take a slot of the multiply-adds themselves:
// there whole vectors are loaded, and the multiply-add names the lane.
#pragma once

#include "convert.h"

namespace ghosted_fast {
namespace {

inline VecD broadcast_double(double value) {
#if defined(__AVX512F__)
  return (VecD)_mm512_set1_pd(value);
#elif defined(__AVX2__)
  return (VecD)_mm256_set1_pd(value);
#else
  return VecD{value, value};
#endif
}

inline VecD multiply_add(VecD sum, VecD a, VecD b) { return a * b + sum; }

#if defined(GHOSTED_FAST_NEON)
// Of a vector, one number, or in the pair form a dword. The lane is a constant once loops are
// unrolled.
struct Lane {
  VecF vector;
  int lane;
};
struct DoubleLane {
  VecD vector;
  int lane;
};

inline VecF multiply_add_pairs(VecF sum, Lane left, VecF right) {
#if defined(GHOSTED_FAST_NEON_BF16)
  const float32x4_t to = (float32x4_t)sum;
  const bfloat16x8_t a = (bfloat16x8_t)right, b = (bfloat16x8_t)left.vector;
  switch (left.lane) {
    case 0:
      return (VecF)vbfdotq_laneq_f32(to, a, b, 0);
    case 1:
      return (VecF)vbfdotq_laneq_f32(to, a, b, 1);
    case 2:
      return (VecF)vbfdotq_laneq_f32(to, a, b, 2);
    default:
      return (VecF)vbfdotq_laneq_f32(to, a, b, 3);
  }
#else
  (void)left, (void)right;
  return sum;  // never reached
#endif
}

template <bool kPairs>
inline VecF multiply_add(VecF sum, Lane left, VecF right) {
  if constexpr (kPairs) {
    return multiply_add_pairs(sum, left, right);
  } else {
    return broadcast(left.vector[left.lane]) * right + sum;
  }
}

inline VecD multiply_add(VecD sum, DoubleLane left, VecD right) {
  return broadcast_double(left.vector[left.lane]) * right + sum;
}

// from[0, kCount)
template <int kCount>
class Lefts {
 public:
  explicit Lefts(const float* from) {
    GHOSTED_FAST_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      vectors_[i] = kWhole ? (VecF)vld1q_f32(from + i * kLanes) : broadcast(from[i]);
    }
  }
  Lane at(int i) const {
    return kWhole ? Lane{vectors_[i / kLanes], i % kLanes} : Lane{vectors_[i], 0};
  }

 private:
  static constexpr bool kWhole = kCount % kLanes == 0;
  static constexpr int kVectors = kWhole ? kCount / kLanes : kCount;
  VecF vectors_[kVectors];
};

// from[i * step], i in [0, kCount); with kNeighbours the step is 1.
template <int kCount, bool kNeighbours>
class DoubleLefts {
 public:
  DoubleLefts(const double* from, int64_t step) {
    GHOSTED_FAST_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const double* pair = from + kDoubleLanes * i * (kNeighbours ? 1 : step);
      vectors_[i] = kNeighbours ? (VecD)vld1q_f64(pair) : VecD{pair[0], pair[step]};
    }
  }
  DoubleLane at(int i) const { return {vectors_[i / kDoubleLanes], i % kDoubleLanes}; }

 private:
  static constexpr int kVectors = kCount / kDoubleLanes;
  VecD vectors_[kVectors];
};
#else
template <int kCount>
class Lefts {
 public:
  explicit Lefts(const float* from) : from_(from) {}
  VecF at(int i) const { return broadcast(from_[i]); }

 private:
  const float* from_;
};

template <int kCount, bool kNeighbours>
class DoubleLefts {
 public:
  DoubleLefts(const double* from, int64_t step) : from_(from), step_(step) {}
  VecD at(int i) const { return broadcast_double(from_[i * step_]); }

 private:
  const double* from_;
  int64_t step_;
};
#endif

}  // namespace
}  // namespace ghosted_fast
