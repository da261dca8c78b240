// fp64 pieces of ghost_solve: a micro-kernel, the Cholesky factor, and triangular solves.
//
// The matrix is scaled, padded to whole tiles with ones on the diagonal, and factored as U^T U. The
// upper triangle of `Factor` holds U; the strict lower one keeps the scaled matrix for residuals.
// Right-hand sides are solved in strips [row][column], a few vectors wide, which are at the same
// time the packed operand of the micro-kernel. What of U meets several strips is copied first, in
// one order for both directions: read where it lies, its rows would fall into the same cache sets.
#pragma once

#include <cmath>

#include "lefts.h"

namespace ghosted_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kSolveRows = 8;
constexpr int kSolveVectors = 3;
#elif defined(GHOSTED_FAST_NEON)
constexpr int kSolveRows = 8;
constexpr int kSolveVectors = 2;
#elif defined(__AVX2__)
constexpr int kSolveRows = 4;
constexpr int kSolveVectors = 3;
#else
constexpr int kSolveRows = 4;
constexpr int kSolveVectors = 2;
#endif
constexpr int64_t kStripWidth = kSolveVectors * kDoubleLanes;
// Rows of U per step: a strip of them (18 KiB) stays in the L1 cache.
constexpr int64_t kSolveBlock = 96;
// Rows of U that are copied at a time: 384 KiB, in the L2 cache.
constexpr int64_t kCopiedRows = 512;
// A pivot of a matrix with unit diagonal that is not above this is rounding noise.
constexpr double kSmallestPivot = 4 * 2.220446049250313e-16;

struct Factor {
  double* data = nullptr;
  double* inverse_diagonal = nullptr;  // of U
  double* diagonal = nullptr;          // of the scaled matrix
  int64_t size = 0;                    // a multiple of kSolveRows
  int64_t stride = 0;
  double* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// tile[row] -= sum_k a(row, k) * b[k], rows of kVectors vectors; a(row, k) = a[row * row_step + k *
// k_step], b[k] = b + k * b_stride. With kNeighbours row_step is 1.
template <int kVectors, bool kNeighbours>
inline void subtract_product_of(int64_t count, const double* a, int64_t row_step, int64_t k_step,
                                const double* b, int64_t b_stride, double* tile,
                                int64_t tile_stride) {
  // The tile comes from an outer cache while the product is summed.
  for (int r = 0; r < kSolveRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(tile + r * tile_stride + v * kDoubleLanes, 1, 3);
    }
  }
  VecD acc[kSolveRows][kVectors] = {};
  for (int64_t k = 0; k < count; ++k) {
    VecD right[kVectors];
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_stride + v * kDoubleLanes);
    const DoubleLefts<kSolveRows, kNeighbours> left(a + k * k_step, row_step);
    GHOSTED_FAST_UNROLL
    for (int r = 0; r < kSolveRows; ++r) {
      const auto value = left.at(r);
      GHOSTED_FAST_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] = multiply_add(acc[r][v], value, right[v]);
    }
  }
  GHOSTED_FAST_UNROLL
  for (int r = 0; r < kSolveRows; ++r) {
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      double* to = tile + r * tile_stride + v * kDoubleLanes;
      store(to, load(to) - acc[r][v]);
    }
  }
}

template <int kVectors>
inline void subtract_product(int64_t count, const double* a, int64_t row_step, int64_t k_step,
                             const double* b, int64_t b_stride, double* tile, int64_t tile_stride) {
  if (kHasNeon && row_step == 1) {
    return subtract_product_of<kVectors, kHasNeon>(count, a, 1, k_step, b, b_stride, tile,
                                                   tile_stride);
  }
  subtract_product_of<kVectors, false>(count, a, row_step, k_step, b, b_stride, tile, tile_stride);
}

template <int kVectors>
inline void load_tile(const double* from, VecD (&tile)[kSolveRows][kVectors]) {
  GHOSTED_FAST_UNROLL
  for (int r = 0; r < kSolveRows; ++r) {
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) tile[r][v] = load(from + (r * kVectors + v) * kDoubleLanes);
  }
}

template <int kVectors>
inline void store_tile(const VecD (&tile)[kSolveRows][kVectors], double* to) {
  GHOSTED_FAST_UNROLL
  for (int r = 0; r < kSolveRows; ++r) {
    GHOSTED_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) store(to + (r * kVectors + v) * kDoubleLanes, tile[r][v]);
  }
}

// The rows [begin, end) of U^T Z = B for one strip, given the rows before `begin` were subtracted.
template <int kVectors>
inline void forward_block(const Factor& u, int64_t begin, int64_t end, double* strip) {
  constexpr int64_t kWidth = kVectors * kDoubleLanes;
  for (int64_t g = begin; g < end; g += kSolveRows) {
    double* rows = strip + g * kWidth;
    subtract_product<kVectors>(g - begin, u.at(begin, g), 1, u.stride, strip + begin * kWidth,
                               kWidth, rows, kWidth);
    VecD x[kSolveRows][kVectors];
    load_tile<kVectors>(rows, x);
    GHOSTED_FAST_UNROLL
    for (int r = 0; r < kSolveRows; ++r) {
      const VecD inverse = broadcast_double(u.inverse_diagonal[g + r]);
      for (int v = 0; v < kVectors; ++v) x[r][v] *= inverse;
      GHOSTED_FAST_UNROLL
      for (int q = r + 1; q < kSolveRows; ++q) {
        const VecD value = broadcast_double(*u.at(g + r, g + q));
        for (int v = 0; v < kVectors; ++v) x[q][v] -= value * x[r][v];
      }
    }
    store_tile<kVectors>(x, rows);
  }
}

// The rows [begin, end) of U X = Z for one strip, given the rows from `end` on were subtracted.
template <int kVectors>
inline void backward_block(const Factor& u, int64_t begin, int64_t end, double* strip) {
  constexpr int64_t kWidth = kVectors * kDoubleLanes;
  for (int64_t g = end - kSolveRows; g >= begin; g -= kSolveRows) {
    double* rows = strip + g * kWidth;
    const int64_t next = g + kSolveRows;
    subtract_product<kVectors>(end - next, u.at(g, next), u.stride, 1, strip + next * kWidth,
                               kWidth, rows, kWidth);
    VecD x[kSolveRows][kVectors];
    load_tile<kVectors>(rows, x);
    GHOSTED_FAST_UNROLL
    for (int r = kSolveRows - 1; r >= 0; --r) {
      const VecD inverse = broadcast_double(u.inverse_diagonal[g + r]);
      for (int v = 0; v < kVectors; ++v) x[r][v] *= inverse;
      GHOSTED_FAST_UNROLL
      for (int q = 0; q < r; ++q) {
        const VecD value = broadcast_double(*u.at(g + q, g + r));
        for (int v = 0; v < kVectors; ++v) x[q][v] -= value * x[r][v];
      }
    }
    store_tile<kVectors>(x, rows);
  }
}

// Rows of a strip that are subtracted from, [first, last), and those that are multiplied.
struct StripRows {
  int64_t first, last, begin, end;
};

// to[k][row] = from[row * row_step + k * k_step], k in [0, count).
inline void copy_left(int64_t count, const double* from, int64_t row_step, int64_t k_step,
                      double* to) {
  if (row_step == 1) {
    for (int64_t k = 0; k < count; ++k) {
      std::memcpy(to + k * kSolveRows, from + k * k_step, kSolveRows * sizeof(double));
    }
    return;
  }
  // Counts are multiples of kSolveRows: squares, whose rows are read as vectors.
  for (int64_t k = 0; k < count; k += kSolveRows) {
    GHOSTED_FAST_UNROLL
    for (int64_t r = 0; r < kSolveRows; ++r) {
      GHOSTED_FAST_UNROLL
      for (int64_t c = 0; c < kSolveRows; ++c) {
        to[(k + c) * kSolveRows + r] = from[r * row_step + k + c];
      }
    }
  }
}

// Rows [first, last) of every strip, less the products of U with the rows [begin, end) of the
// strip. The piece of U for row r and strip row k is u[r * row_step + k * k_step]. With `copies`,
// kCopiedRows * kSolveBlock doubles, U is copied first: a strip's rows then stay in the L1 cache
// while U streams past, and the strip is read in order.
template <int kVectors>
inline void subtract_from_strips(const StripRows& rows, const double* u, int64_t row_step,
                                 int64_t k_step, int64_t strips, int64_t strip_size, double* data,
                                 double* copies) {
  constexpr int64_t kWidth = kVectors * kDoubleLanes;
  const int64_t count = rows.end - rows.begin;
  for (int64_t from = rows.first; from < rows.last; from += kCopiedRows) {
    const int64_t to = min64(rows.last, from + kCopiedRows);
    for (int64_t row = from; copies != nullptr && row < to; row += kSolveRows) {
      copy_left(count, u + row * row_step + rows.begin * k_step, row_step, k_step,
                copies + (row - from) * kSolveBlock);
    }
    for (int64_t s = 0; s < strips; ++s) {
      double* strip = data + s * strip_size;
      for (int64_t row = from; row < to; row += kSolveRows) {
        const double* left = u + row * row_step + rows.begin * k_step;
        if (copies != nullptr) left = copies + (row - from) * kSolveBlock;
        subtract_product<kVectors>(
            count, left, copies != nullptr ? 1 : row_step, copies != nullptr ? kSolveRows : k_step,
            strip + rows.begin * kWidth, kWidth, strip + row * kWidth, kWidth);
      }
    }
  }
}

// Solves U^T U X = B in place for `strips` strips that lie u.size rows apart. `copies`: memory for
// subtract_from_strips, or null.
template <int kVectors>
inline void solve_strips(const Factor& u, int64_t strips, double* data, double* copies) {
  constexpr int64_t kWidth = kVectors * kDoubleLanes;
  const int64_t strip_size = u.size * kWidth;
  for (int64_t begin = 0; begin < u.size; begin += kSolveBlock) {
    const int64_t end = min64(u.size, begin + kSolveBlock);
    for (int64_t s = 0; s < strips; ++s) {
      forward_block<kVectors>(u, begin, end, data + s * strip_size);
    }
    subtract_from_strips<kVectors>({end, u.size, begin, end}, u.data, 1, u.stride, strips,
                                   strip_size, data, copies);
  }
  for (int64_t end = u.size; end > 0;) {
    const int64_t begin = (end - 1) / kSolveBlock * kSolveBlock;
    for (int64_t s = 0; s < strips; ++s) {
      backward_block<kVectors>(u, begin, end, data + s * strip_size);
    }
    subtract_from_strips<kVectors>({0, begin, begin, end}, u.data, u.stride, 1, strips, strip_size,
                                   data, copies);
    end = begin;
  }
}

// residual -= S X for the rows [begin, end) of one strip, S the scaled matrix.
template <int kVectors>
inline void subtract_matrix_product(const Factor& u, const double* x, int64_t begin, int64_t end,
                                    double* residual) {
  constexpr int64_t kWidth = kVectors * kDoubleLanes;
  for (int64_t g = begin; g < end; g += kSolveRows) {
    double* rows = residual + g * kWidth;
    const int64_t next = g + kSolveRows;
    subtract_product<kVectors>(g, u.at(g, 0), u.stride, 1, x, kWidth, rows, kWidth);
    subtract_product<kVectors>(u.size - next, u.at(next, g), 1, u.stride, x + next * kWidth, kWidth,
                               rows, kWidth);
    for (int64_t r = 0; r < kSolveRows; ++r) {
      for (int64_t q = 0; q < kSolveRows; ++q) {
        const double value = r == q  ? u.diagonal[g + r]
                             : q < r ? *u.at(g + r, g + q)
                                     : *u.at(g + q, g + r);
        for (int64_t c = 0; c < kWidth; ++c)
          rows[r * kWidth + c] -= value * x[(g + q) * kWidth + c];
      }
    }
  }
}

// Tile [row, row + kSolveRows) x [column, column + width) of U less a product; what lies left of
// the diagonal is kept.
inline void update_tile(const Factor& u, int64_t row, int64_t column, int64_t count,
                        const double* a, const double* b, int64_t b_stride) {
  if (column >= row + kSolveRows - 1) {
    subtract_product<kSolveVectors>(count, a, 1, u.stride, b, b_stride, u.at(row, column),
                                    u.stride);
    return;
  }
  double tile[kSolveRows * kStripWidth] = {};
  subtract_product<kSolveVectors>(count, a, 1, u.stride, b, b_stride, tile, kStripWidth);
  for (int64_t r = 0; r < kSolveRows; ++r) {
    for (int64_t c = max64(0, row + r - column); c < kStripWidth; ++c) {
      *u.at(row + r, column + c) += tile[r * kStripWidth + c];
    }
  }
}

// Factors the diagonal block [begin, end). Returns the 1-based failing pivot, or 0.
inline int64_t factor_diagonal(const Factor& u, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; g += kSolveRows) {
    // Beyond `end` a tile would touch columns that the caller solves: those are cut off.
    for (int64_t column = g; column < end; column += kStripWidth) {
      if (column + kStripWidth <= end) {
        update_tile(u, g, column, g - begin, u.at(begin, g), u.at(begin, column), u.stride);
        continue;
      }
      for (int64_t r = 0; r < kSolveRows; ++r) {
        for (int64_t k = begin; k < g; ++k) {
          const double value = *u.at(k, g + r);
          for (int64_t c = max64(column, g + r); c < end; ++c) {
            *u.at(g + r, c) -= value * *u.at(k, c);
          }
        }
      }
    }
    for (int64_t r = g; r < g + kSolveRows; ++r) {
      const double pivot = *u.at(r, r);
      if (!(pivot > kSmallestPivot)) return r + 1;
      const double inverse = 1.0 / std::sqrt(pivot);
      u.inverse_diagonal[r] = inverse;
      double* row = u.at(r, 0);
      for (int64_t c = r; c < end; ++c) row[c] *= inverse;
      for (int64_t q = r + 1; q < g + kSolveRows; ++q) {
        double* below = u.at(q, 0);
        const double value = row[q];
        for (int64_t c = q; c < end; ++c) below[c] -= value * row[c];
      }
    }
  }
  return 0;
}

// Factors the whole matrix. `panel` holds kSolveBlock * stride doubles. Returns the 1-based failing
// pivot, or 0.
inline int64_t factorize(const Factor& u, int64_t threads, double* panel) {
  for (int64_t begin = 0; begin < u.size; begin += kSolveBlock) {
    const int64_t end = min64(u.size, begin + kSolveBlock), count = end - begin;
    const int64_t failing = factor_diagonal(u, begin, end);
    if (failing != 0) return failing;
    if (end == u.size) return 0;
    const int64_t strips = (u.size - end + kStripWidth - 1) / kStripWidth;
    // forward_block counts rows from the strip's start.
    for_each_task(strips, threads, [&](int64_t s, int64_t) {
      const int64_t column = end + s * kStripWidth;
      double* strip = panel + s * kSolveBlock * kStripWidth;
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t c = 0; c < kStripWidth; ++c) {
          strip[k * kStripWidth + c] = *u.at(begin + k, column + c);
        }
      }
      const Factor block{u.at(begin, begin), u.inverse_diagonal + begin, nullptr, count, u.stride};
      forward_block<kSolveVectors>(block, 0, count, strip);
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t c = 0; c < kStripWidth; ++c) {
          *u.at(begin + k, column + c) = strip[k * kStripWidth + c];
        }
      }
    });
    // Strips in groups share the rows of U that they multiply with.
    const int64_t group = max64(1, min64(8, strips / (4 * threads)));
    const int64_t groups = (strips + group - 1) / group;
    for_each_task(groups, threads, [&](int64_t task, int64_t) {
      const int64_t first = (groups - 1 - task) * group, last = min64(strips, first + group);
      const int64_t row_end = min64(u.size, end + last * kStripWidth);
      for (int64_t row = end; row < row_end; row += kSolveRows) {
        for (int64_t s = first; s < last; ++s) {
          const int64_t column = end + s * kStripWidth;
          if (row >= column + kStripWidth) continue;
          update_tile(u, row, column, count, u.at(begin, row),
                      panel + s * kSolveBlock * kStripWidth, kStripWidth);
        }
      }
    });
  }
  return 0;
}

}  // namespace
}  // namespace ghosted_fast
