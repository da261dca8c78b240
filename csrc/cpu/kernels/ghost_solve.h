// ghost_solve on one path: (G + damping I) X = C by a Cholesky factor of the scaled matrix.
//
// d^3 / 3 + 2 d^2 m flops in fp64. The residual is estimated with sign vectors, which costs d m
// instead of d^2 m; only where it is not small the solution is refined once.
#pragma once

#include "solve_kernel.h"

namespace ghosted_fast {
namespace {

// Residuals above this are refined.
constexpr double kRefineAbove = 1e-12;
// Sign vectors, as many as the registers hold sums of.
constexpr int kProbes = kSolveRows * 8 / kDoubleLanes > 24 ? kStripWidth : 8;
// Strips that are solved together: each copy of U serves so many.
constexpr int64_t kGroupStrips = 16;
// Rows of a matrix that one thread takes at a time.
constexpr int64_t kSharedRows = 64;
constexpr int kProbeVectors = kProbes / kDoubleLanes;

inline bool all_finite(const double* values, int64_t count) {
  uint64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    bad |= static_cast<uint64_t>((bits & 0x7ff0000000000000u) == 0x7ff0000000000000u);
  }
  return bad == 0;
}

// Numbers that one thread looks through at a time.
constexpr int64_t kShare = int64_t{1} << 16;

// The same, shared between threads.
inline bool all_finite(const double* values, int64_t count, int64_t threads) {
  bool finite = true;
  for_each_task((count + kShare - 1) / kShare, threads, [&](int64_t task, int64_t) {
    const int64_t begin = task * kShare;
    if (!all_finite(values + begin, min64(kShare, count - begin))) {
      __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    }
  });
  return finite;
}

// Calls visit(begin, end) for the shares of some rows; where these are a multiple of 4, so is each.
template <class Visit>
inline void for_shared_rows(int64_t rows, int64_t threads, Visit&& visit) {
  for_each_task((rows + kSharedRows - 1) / kSharedRows, threads, [&](int64_t task, int64_t) {
    visit(task * kSharedRows, min64(rows, (task + 1) * kSharedRows));
  });
}

inline bool lower_triangle_is_finite(const double* matrix, int64_t size, int64_t threads) {
  bool finite = true;
  for_shared_rows(size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!all_finite(matrix + i * size, i + 1)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    }
  });
  return finite;
}

// The sum of term(value) over some numbers, in a fixed order.
template <class Term>
inline double sum_of(const double* values, int64_t count, Term term) {
  VecD sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kDoubleLanes <= count; i += 4 * kDoubleLanes) {
    for (int u = 0; u < 4; ++u) sums[u] += term(load(values + i + u * kDoubleLanes));
  }
  const VecD total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0.0;
  for (int lane = 0; lane < kDoubleLanes; ++lane) sum += total[lane];
  for (; i < count; ++i) sum += term(VecD{values[i]})[0];
  return sum;
}

inline double sum_of_squares(const double* values, int64_t count) {
  return sum_of(values, count, [](VecD value) { return value * value; });
}

inline double sum_of_magnitudes(const double* values, int64_t count) {
  return sum_of(values, count, [](VecD value) { return value < 0.0 ? -value : value; });
}

// A sign that depends on nothing but its position.
inline double sign_at(uint64_t position) {
  uint64_t z = (position + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return ((z ^ (z >> 31)) & 1) != 0 ? 1.0 : -1.0;
}

// out[row][probe] = -scale[row] * sum_j matrix[row][j] * signs[j][probe], or divided by the scale.
inline void probe(const double* matrix, const Factor& u, const SolveArgs& args, const double* signs,
                  const double* scale, bool divide, int64_t threads, double* out) {
  const int64_t size = args.size, columns = args.num_outputs;
  for_each_task((size + 63) / 64, threads, [&](int64_t task, int64_t) {
    const int64_t end = min64(u.size, (task + 1) * 64);
    for (int64_t row = task * 64; row < end; row += kSolveRows) {
      double* tile = out + row * kProbes;
      for (int64_t i = 0; i < kSolveRows * kProbes; ++i) tile[i] = 0.0;
      if (row + kSolveRows <= size) {
        subtract_product<kProbeVectors>(columns, matrix + row * columns, columns, 1, signs, kProbes,
                                        tile, kProbes);
      } else {
        for (int64_t r = 0; row + r < size; ++r) {
          for (int64_t j = 0; j < columns; ++j) {
            for (int64_t v = 0; v < kProbes; ++v) {
              tile[r * kProbes + v] -= matrix[(row + r) * columns + j] * signs[j * kProbes + v];
            }
          }
        }
      }
      for (int64_t r = 0; r < kSolveRows; ++r) {
        const double factor = divide ? 1.0 / scale[row + r] : scale[row + r];
        for (int64_t v = 0; v < kProbes; ++v) tile[r * kProbes + v] *= factor;
      }
    }
  });
}

// An estimate of |(G + damping I) X - C|_F / |C|_F: the mean square of R v over sign vectors v is
// |R|_F^2. `workspace` holds (num_outputs + 2 u.size) * kProbes doubles.
inline double estimate_residual(const SolveArgs& args, const Factor& u, const double* scale,
                                int64_t threads, double* workspace) {
  const int64_t size = args.size, outputs = args.num_outputs;
  double* signs = workspace;
  double* x = signs + outputs * kProbes;
  double* residual = x + u.size * kProbes;
  for (int64_t i = 0; i < outputs * kProbes; ++i) signs[i] = sign_at(static_cast<uint64_t>(i));
  probe(args.solution, u, args, signs, scale, true, threads, x);
  probe(args.cross, u, args, signs, scale, false, threads, residual);
  for_shared_rows(u.size, threads, [&](int64_t begin, int64_t end) {
    subtract_matrix_product<kProbeVectors>(u, x, begin, end, residual);
  });
  double squares = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t v = 0; v < kProbes; ++v) {
      const double value = residual[i * kProbes + v] / scale[i];
      squares += value * value;
    }
  }
  const double cross_squares = sum_of_squares(args.cross, size * outputs);
  return cross_squares > 0.0 ? std::sqrt(squares / kProbes / cross_squares) : 0.0;
}

// A lower estimate of |S^-1|_1, rarely low by more than a factor of two: one round of Hager's
// iteration on a block of vectors (Higham and Tisseur, 2000). `strip` holds 2 * size * kDoubleLanes
// doubles.
inline double inverse_norm(const Factor& u, int64_t size, double* strip) {
  double* largest = strip + u.size * kDoubleLanes;
  double norm = 0.0;
  auto measure = [&] {
    double sums[kDoubleLanes] = {};
    for (int64_t i = 0; i < size; ++i) {
      for (int c = 0; c < kDoubleLanes; ++c) sums[c] += std::fabs(strip[i * kDoubleLanes + c]);
    }
    for (int c = 0; c < kDoubleLanes; ++c) norm = std::fmax(norm, sums[c]);
  };
  const double share = 1.0 / static_cast<double>(size);
  for (int64_t i = 0; i < u.size; ++i) {
    for (int c = 0; c < kDoubleLanes; ++c) {
      const double sign = c == 0 ? 1.0 : sign_at(static_cast<uint64_t>(i * kDoubleLanes + c));
      strip[i * kDoubleLanes + c] = i < size ? sign * share : 0.0;
    }
  }
  solve_strips<1>(u, 1, strip, nullptr);
  measure();
  for (int64_t i = 0; i < u.size * kDoubleLanes; ++i) {
    strip[i] = i >= size * kDoubleLanes ? 0.0 : strip[i] < 0.0 ? -1.0 : 1.0;
  }
  solve_strips<1>(u, 1, strip, nullptr);
  for (int64_t i = 0; i < size; ++i) {
    largest[i] = 0.0;
    for (int c = 0; c < kDoubleLanes; ++c) {
      largest[i] = std::fmax(largest[i], std::fabs(strip[i * kDoubleLanes + c]));
    }
  }
  std::memset(strip, 0, static_cast<size_t>(u.size * kDoubleLanes) * sizeof(double));
  for (int c = 0; c < kDoubleLanes && c < size; ++c) {
    int64_t best = 0;
    for (int64_t i = 1; i < size; ++i) best = largest[i] > largest[best] ? i : best;
    strip[best * kDoubleLanes + c] = 1.0;
    largest[best] = -1.0;
  }
  solve_strips<1>(u, 1, strip, nullptr);
  measure();
  return norm;
}

// Fills the scaled matrix and its scale; returns its 1-norm.
inline double scale_matrix(const SolveArgs& args, const Factor& u, int64_t threads,
                           double* __restrict scale, double* __restrict sums) {
  const int64_t size = args.size;
  for (int64_t i = 0; i < u.size; ++i) {
    const double diagonal = i < size ? args.gram[i * size + i] + args.damping : 1.0;
    scale[i] = diagonal > 0.0 ? 1.0 / std::sqrt(diagonal) : 1.0;
    u.diagonal[i] = diagonal > 0.0 ? 1.0 : diagonal;
  }
  for_shared_rows(u.size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double* __restrict row = u.at(i, 0);
      std::memset(row, 0, static_cast<size_t>(u.stride) * sizeof(double));
      if (i >= size) continue;
      const double factor = scale[i];
      for (int64_t j = 0; j < i; ++j) row[j] = args.gram[i * size + j] * factor * scale[j];
    }
  });
  constexpr int64_t kTile = 4;
  // The mirror image, tile by tile.
  for_shared_rows(u.size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kTile) {
      for (int64_t j = 0; j < i; j += kTile) {
        const double* __restrict from = u.at(i, j);
        double* __restrict to = u.at(j, i);
        GHOSTED_FAST_UNROLL
        for (int64_t r = 0; r < kTile; ++r) {
          GHOSTED_FAST_UNROLL
          for (int64_t c = 0; c < kTile; ++c) to[r * u.stride + c] = from[c * u.stride + r];
        }
      }
      for (int64_t r = i; r < i + kTile; ++r) {
        *u.at(r, r) = u.diagonal[r];
        for (int64_t c = i; c < r; ++c) *u.at(c, r) = *u.at(r, c);
      }
    }
  });
  for_shared_rows(u.size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < min64(size, end); ++i) {
      sums[i] = sum_of_magnitudes(u.at(i, 0), size);
    }
  });
  double norm = 0.0;
  for (int64_t i = 0; i < size; ++i) norm = std::fmax(norm, sums[i]);
  return norm;
}

// Strips that lie side by side in a matrix of `columns` columns, from `column` on.
struct StripColumns {
  int64_t column, columns, strips, strip_size;

  // Calls body(s, width) for the strips and their columns; the compiler knows the usual width.
  template <class Body>
  void for_each(Body&& body) const {
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t left = columns - column - s * kStripWidth;
      if (left >= kStripWidth) {
        body(s, std::integral_constant<int64_t, kStripWidth>());
      } else {
        body(s, left);
      }
    }
  }
};

// data[strip][row][c] = scale * matrix[row][column of the strip + c]; zeros beyond the matrix. All
// strips of a row before the next: a row is on a page of its own.
inline void load_strips(const double* matrix, int64_t size, const StripColumns& of,
                        const double* scale, bool divide, int64_t padded, double* data) {
  for (int64_t i = 0; i < padded; ++i) {
    const double factor = i >= size ? 0.0 : divide ? 1.0 / scale[i] : scale[i];
    of.for_each([&](int64_t s, auto width) {
      double* to = data + s * of.strip_size + i * kStripWidth;
      const double* from = matrix + i * of.columns + of.column + s * kStripWidth;
      const int64_t there = i < size ? int64_t{width} : int64_t{0};
      for (int64_t c = 0; c < there; ++c) to[c] = from[c] * factor;
      for (int64_t c = there; c < kStripWidth; ++c) to[c] = 0.0;
    });
  }
}

// solution[row][column of the strip + c] = or += scale * data[strip][row][c].
inline void store_strips(const double* data, int64_t size, const StripColumns& of,
                         const double* scale, bool add, double* solution) {
  for (int64_t i = 0; i < size; ++i) {
    of.for_each([&](int64_t s, auto width) {
      const double* from = data + s * of.strip_size + i * kStripWidth;
      double* to = solution + i * of.columns + of.column + s * kStripWidth;
      if (add) {
        for (int64_t c = 0; c < width; ++c) to[c] += scale[i] * from[c];
      } else {
        for (int64_t c = 0; c < width; ++c) to[c] = scale[i] * from[c];
      }
    });
  }
}

// The doubles that a thread needs to solve `group` strips together.
inline int64_t slot_size(const Factor& u, int64_t group) {
  return (group + 1) * u.size * kStripWidth + (group > 1 ? kCopiedRows * kSolveBlock : 0);
}

// Solves, or with `refine` improves, all columns; and does `beside()`, which other threads need not
// wait for.
template <class Beside>
inline void solve_columns(const SolveArgs& args, const Factor& u, const double* scale, bool refine,
                          int64_t group, int64_t threads, double* buffers, Beside&& beside) {
  const int64_t strips = (args.num_outputs + kStripWidth - 1) / kStripWidth;
  const int64_t strip_size = u.size * kStripWidth;
  for_each_task(1 + (strips + group - 1) / group, threads, [&](int64_t task, int64_t slot) {
    if (task == 0) return beside();
    const int64_t first = (task - 1) * group, count = min64(group, strips - first);
    double* right = buffers + slot * slot_size(u, group);
    double* x = right + group * strip_size;
    double* copies = group > 1 ? x + strip_size : nullptr;
    const StripColumns columns{first * kStripWidth, args.num_outputs, count, strip_size};
    load_strips(args.cross, args.size, columns, scale, false, u.size, right);
    for (int64_t s = 0; refine && s < count; ++s) {
      const StripColumns column{(first + s) * kStripWidth, args.num_outputs, 1, strip_size};
      load_strips(args.solution, args.size, column, scale, true, u.size, x);
      subtract_matrix_product<kSolveVectors>(u, x, 0, u.size, right + s * strip_size);
    }
    solve_strips<kSolveVectors>(u, count, right, copies);
    store_strips(right, args.size, columns, scale, refine, args.solution);
  });
}

inline SolveInfo ghost_solve(const SolveArgs& args) {
  const int64_t size = args.size, threads = max64(1, num_threads());
  const int64_t elements = size * args.num_outputs;
  SolveInfo info{0, 1.0, 0.0, nullptr};
  if (size == 0) return info;
  if (!lower_triangle_is_finite(args.gram, size, threads)) info.non_finite = "gram";
  if (info.non_finite == nullptr && !all_finite(args.cross, elements, threads)) {
    info.non_finite = "cross";
  }
  if (info.non_finite != nullptr) return info;

  Factor u;
  u.size = round_up(size, kSolveRows);
  // Room for a strip that begins in the last column; no power of two, so that rows spread over the
  // cache sets.
  u.stride = round_up(u.size + kStripWidth, 8) + 8;
  const int64_t strips = (args.num_outputs + kStripWidth - 1) / kStripWidth;
  const int64_t group = max64(1, min64(kGroupStrips, (strips + 2 * threads - 1) / (2 * threads)));
  const int64_t panel_size = kSolveBlock * (u.stride + kStripWidth);
  const int64_t buffer_size = threads * slot_size(u, group);
  const int64_t probe_size = (args.num_outputs + 2 * u.size) * kProbes;
  const int64_t shared = max64(max64(panel_size, buffer_size), probe_size);
  const int64_t norm_size = 2 * u.size * kDoubleLanes;
  Scratch scratch(Scratch::bytes_for<double>(u.size * u.stride) +
                  4 * Scratch::bytes_for<double>(u.size) + Scratch::bytes_for<double>(shared) +
                  Scratch::bytes_for<double>(norm_size));
  u.data = scratch.take<double>(u.size * u.stride);
  u.inverse_diagonal = scratch.take<double>(u.size);
  u.diagonal = scratch.take<double>(u.size);
  double* scale = scratch.take<double>(u.size);
  double* sums = scratch.take<double>(u.size);
  double* workspace = scratch.take<double>(shared);
  double* strip = scratch.take<double>(norm_size);

  const double norm = scale_matrix(args, u, threads, scale, sums);
  info.failing_pivot = factorize(u, threads, workspace);
  if (info.failing_pivot == 0) {
    solve_columns(args, u, scale, false, group, threads, workspace,
                  [&] { info.condition = norm * inverse_norm(u, size, strip); });
    if (all_finite(args.solution, elements, threads)) {
      info.residual = estimate_residual(args, u, scale, threads, workspace);
      if (info.residual > kRefineAbove) {
        solve_columns(args, u, scale, true, group, threads, workspace, [] {});
        info.residual = estimate_residual(args, u, scale, threads, workspace);
      }
    }
    if (!all_finite(args.solution, elements, threads)) {  // overflow: blame the smallest pivot
      int64_t smallest = 0;
      for (int64_t i = 1; i < size; ++i) {
        if (u.inverse_diagonal[i] > u.inverse_diagonal[smallest]) smallest = i;
      }
      info.failing_pivot = smallest + 1;
    }
  }
  if (info.failing_pivot != 0) {
    info.condition = HUGE_VAL;
    info.residual = 1.0;
    std::memset(args.solution, 0, static_cast<size_t>(elements) * sizeof(double));
  }
  return info;
}

}  // namespace
}  // namespace ghosted_fast
