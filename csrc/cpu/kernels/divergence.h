// divergence on one path: KL(p || q) of pairs of rows of logits, its gradient, and how it bends
// along other rows.
//
// A row of logits lies in an outer cache: it is read once for the two maxima, once for the sums,
// and once more where the gradient is wanted. Exponentials are made anew rather than kept. Sums are
// fp32 for a few vectors, then fp64.
#pragma once

#include <cmath>
#include <limits>

#include "convert.h"

namespace ghosted_fast {
namespace {

// exp(x) of x <= 0, to 2 units in the last place; 0 below -87, where fp32 ends. NaN stays NaN.
inline VecF exp_of_negative(VecF x) {
  const VecF magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const VecF shifted = x * broadcast(1.44269504088896341f) + magic;
  const VecF n = shifted - magic;
  // x - n ln 2, ln 2 in two parts of which the first times n is exact.
  VecF r = x - n * broadcast(0.693359375f);
  r = r + n * broadcast(2.12194440054690583e-4f);
  VecF y = broadcast(1.0f / 5040.0f);
  y = y * r + broadcast(1.0f / 720.0f);
  y = y * r + broadcast(1.0f / 120.0f);
  y = y * r + broadcast(1.0f / 24.0f);
  y = y * r + broadcast(1.0f / 6.0f);
  y = y * r + broadcast(0.5f);
  y = y * r + broadcast(1.0f);
  y = y * r + broadcast(1.0f);
  const VecI power = (VecI)shifted - (VecI)magic + 127;
  const VecF scaled = y * (VecF)(power << 23);
  const VecI vanishes = x < broadcast(-87.0f);
  return (VecF)((VecI)scaled & ~vanishes);
}

inline VecF larger(VecF a, VecF b) {
  const VecI is_larger = a > b;
  return (VecF)(((VecI)a & is_larger) | ((VecI)b & ~is_larger));
}

// A sum of fp32 vectors, in fp64 after every few.
struct Sum {
  VecF part = {};
  VecD low = {}, high = {};

  void settle() {
    typedef float Half __attribute__((vector_size(kDoubleLanes * 4)));
    Half halves[2];
    std::memcpy(halves, &part, sizeof(part));
    low += __builtin_convertvector(halves[0], VecD);
    high += __builtin_convertvector(halves[1], VecD);
    part = VecF{};
  }
  double total() {
    settle();
    const VecD lanes = low + high;
    double sum = 0.0;
    for (int i = 0; i < kDoubleLanes; ++i) sum += lanes[i];
    return sum;
  }
};

constexpr int kVectorsInFloat = 16;

// Elements [i, count) of a row, `beyond` in the lanes after its end.
template <Dtype kType>
inline VecF load_logits(const StorageOf<kType>* row, int64_t i, int64_t count, float beyond) {
  VecF v = load_as_float<kType>(row + i, count - i);
  for (int64_t lane = count - i; lane < kLanes; ++lane) v[lane] = beyond;
  return v;
}

// One pair of rows, and the rows that q's logits would move to.
template <Dtype kType, int kMoved>
struct LogitRows {
  const StorageOf<kType>* p;
  const StorageOf<kType>* q;
  const StorageOf<kType>* moved[kMoved > 0 ? kMoved : 1];
  int64_t count;
  float p_max, q_max;
  double p_sum, q_sum;

  // Calls body(i) for every vector of the row; the last may reach beyond its end.
  template <class Body>
  void for_each_vector(Body&& body) const {
    for (int64_t i = 0; i < count; i += kLanes) body(i);
  }

  void find_maxima() {
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    VecF p_lanes = broadcast(kLowest), q_lanes = broadcast(kLowest);
    for_each_vector([&](int64_t i) {
      p_lanes = larger(load_logits<kType>(p, i, count, kLowest), p_lanes);
      q_lanes = larger(load_logits<kType>(q, i, count, kLowest), q_lanes);
    });
    p_max = q_max = kLowest;
    for (int lane = 0; lane < kLanes; ++lane) {
      p_max = p_lanes[lane] > p_max ? p_lanes[lane] : p_max;
      q_max = q_lanes[lane] > q_max ? q_lanes[lane] : q_max;
    }
  }

  // Writes the divergence, its slope along each moved row and its curvature: 1 + k + k (k + 1) / 2.
  void find_sums(double* found) {
    Sum p_total, q_total, distance;
    Sum p_moved[kMoved + 1], q_moved[kMoved + 1], q_products[kMoved * (kMoved + 1) / 2 + 1];
    const VecF p_top = broadcast(p_max), q_top = broadcast(q_max);
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    int vectors = 0;
    for_each_vector([&](int64_t i) {
      const VecF q_logits = load_logits<kType>(q, i, count, kLowest);
      const VecF a = load_logits<kType>(p, i, count, kLowest) - p_top, b = q_logits - q_top;
      const VecF p_here = exp_of_negative(a), q_here = exp_of_negative(b);
      p_total.part += p_here;
      q_total.part += q_here;
      // Where p is zero the term is, though both logits may be minus infinity.
      const VecI is_zero = p_here == broadcast(0.0f);
      distance.part += (VecF)((VecI)(p_here * (a - b)) & ~is_zero);
      VecF change[kMoved + 1];
      GHOSTED_FAST_UNROLL
      for (int k = 0, pair = 0; k < kMoved; ++k) {
        const VecF to = load_logits<kType>(moved[k], i, count, kLowest);
        // What no distribution reaches, a masked word, does not move.
        const VecI is_same = to == q_logits;
        change[k] = (VecF)((VecI)(to - q_logits) & ~is_same);
        p_moved[k].part += p_here * change[k];
        const VecF weighted = q_here * change[k];
        q_moved[k].part += weighted;
        for (int j = 0; j <= k; ++j) q_products[pair++].part += weighted * change[j];
      }
      if (++vectors % kVectorsInFloat != 0) return;
      p_total.settle();
      q_total.settle();
      distance.settle();
      for (int k = 0; k < kMoved; ++k) {
        p_moved[k].settle();
        q_moved[k].settle();
      }
      for (int k = 0; k < kMoved * (kMoved + 1) / 2; ++k) q_products[k].settle();
    });
    p_sum = p_total.total();
    q_sum = q_total.total();
    found[0] = distance.total() / p_sum + std::log(q_sum) - std::log(p_sum);
    double mean[kMoved + 1];
    for (int k = 0, pair = 0; k < kMoved; ++k) {
      mean[k] = q_moved[k].total() / q_sum;
      found[1 + k] = mean[k] - p_moved[k].total() / p_sum;
      for (int j = 0; j <= k; ++j, ++pair) {
        found[1 + kMoved + pair] = q_products[pair].total() / q_sum - mean[k] * mean[j];
      }
    }
  }

  // softmax(q) - softmax(p), rounded.
  void write_gradient(StorageOf<kType>* gradient) const {
    const VecF p_top = broadcast(p_max), q_top = broadcast(q_max);
    const VecF p_scale = broadcast(static_cast<float>(1.0 / p_sum));
    const VecF q_scale = broadcast(static_cast<float>(1.0 / q_sum));
    for_each_vector([&](int64_t i) {
      const VecF a = load_as_float<kType>(p + i, count - i) - p_top;
      const VecF b = load_as_float<kType>(q + i, count - i) - q_top;
      const VecF away = exp_of_negative(b) * q_scale - exp_of_negative(a) * p_scale;
      store_rounded<kType>(gradient + i, away, count - i);
    });
  }
};

template <Dtype kType, int kMoved>
inline void typed_divergence(const DivergenceArgs& args) {
  typedef StorageOf<kType> Element;
  constexpr int64_t kFound = 1 + kMoved + kMoved * (kMoved + 1) / 2;
  const auto row_of = [&](const void* rows, int64_t row) {
    return static_cast<const Element*>(rows) + row * args.num_columns;
  };
  for_each_task(args.num_rows, num_threads(), [&](int64_t row, int64_t) {
    double* found = args.sums + row * kFound;
    Element* gradient = args.gradient == nullptr
                            ? nullptr
                            : static_cast<Element*>(args.gradient) + row * args.num_columns;
    if (args.counted != nullptr && !args.counted[row]) {
      std::memset(found, 0, kFound * sizeof(double));
      if (gradient != nullptr) {
        std::memset(gradient, 0, static_cast<size_t>(args.num_columns) * sizeof(Element));
      }
      return;
    }
    LogitRows<kType, kMoved> rows;
    rows.p = row_of(args.dense, row);
    rows.q = row_of(args.smaller, row);
    for (int k = 0; k < kMoved; ++k) rows.moved[k] = row_of(args.moved[k], row);
    rows.count = args.num_columns;
    rows.find_maxima();
    rows.find_sums(found);
    if (gradient != nullptr) rows.write_gradient(gradient);
  });
}

inline void divergence(const DivergenceArgs& args) {
  with_dtype(args.dtype, [&](auto tag) {
    constexpr Dtype kType = decltype(tag)::kDtype;
    switch (args.num_moved) {
      case 0:
        return typed_divergence<kType, 0>(args);
      case 1:
        return typed_divergence<kType, 1>(args);
      case 2:
        return typed_divergence<kType, 2>(args);
      default:
        return typed_divergence<kType, 3>(args);
    }
  });
}

}  // namespace
}  // namespace ghosted_fast
