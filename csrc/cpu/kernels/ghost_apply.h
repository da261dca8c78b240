// ghost_apply on one path: y = x + f(x) W^T (+ bias), and the RMS norm of y where it is asked for.
//
// 2 T d^2 flops and d^2 weights. Few rows: ghost_panels.h for a packed weight, else ghost_dot.h,
// bound by the reading of the weights. Many: ghost_gemm.h. Accumulated in fp32, rounded once; the
// norm is a factor per row of x W^T.
#pragma once

#include "ghost_gemm.h"
#include "ghost_panels.h"
#include "rows.h"

namespace ghosted_fast {
namespace {

// Bytes of weights below which waking another thread costs more than it saves.
constexpr int64_t kBytesPerThread = int64_t{256} << 10;
// Pieces that a packed weight is cut into for each thread.
constexpr int64_t kRunsPerThread = 4;

// What turns sums into outputs.
struct Epilogue {
  const ApplyArgs& args;
  const float* bias = nullptr;        // fp32, padded
  const float* row_factor = nullptr;  // 1 / rms(x), or null
  const void* first_state = nullptr;  // in x's dtype
};

// y[row][column, column + count) from the sums of x W^T; `sums` may be read to a whole vector.
template <Dtype kType>
inline void finish(const Epilogue& epilogue, int64_t row, int64_t column, int64_t count,
                   const float* sums) {
  typedef StorageOf<kType> Stored;
  const ApplyArgs& args = epilogue.args;
  const int64_t offset = row * args.hidden_size + column;
  Stored* y = static_cast<Stored*>(args.y) + offset;
  if (args.is_first != nullptr && args.is_first[row]) {
    std::memcpy(y, static_cast<const Stored*>(epilogue.first_state) + column,
                static_cast<size_t>(count) * sizeof(Stored));
    return;
  }
  const Stored* x = static_cast<const Stored*>(args.x) + offset;
  const VecF factor = broadcast(epilogue.row_factor == nullptr ? 1.0f : epilogue.row_factor[row]);
  for (int64_t c = 0; c < count; c += kLanes) {
    VecF value = load(sums + c) * factor;
    if (args.scale != nullptr) {
      value *= load_as_float<Dtype::kFloat32>(args.scale + column + c, count - c);
    }
    value += load_as_float<kType>(x + c, count - c);
    if (epilogue.bias != nullptr) value += load(epilogue.bias + column + c);
    store_rounded<kType>(y + c, value, count - c);
  }
}

inline void finish_of(const Epilogue& epilogue, int64_t row, int64_t column, int64_t count,
                      const float* sums) {
  switch (epilogue.args.dtype) {
    case Dtype::kBFloat16:
      return finish<Dtype::kBFloat16>(epilogue, row, column, count, sums);
    case Dtype::kFloat16:
      return finish<Dtype::kFloat16>(epilogue, row, column, count, sums);
    default:
      return finish<Dtype::kFloat32>(epilogue, row, column, count, sums);
  }
}

// normalized = norm_weight * round(y * rsqrt(mean(y^2) + eps)), row by row.
template <Dtype kType>
inline void normalize_row(const ApplyArgs& args, int64_t row) {
  typedef StorageOf<kType> Stored;
  const int64_t size = args.hidden_size;
  const Stored* y = static_cast<const Stored*>(args.y) + row * size;
  const Stored* weight = static_cast<const Stored*>(args.norm_weight);
  Stored* out = static_cast<Stored*>(args.normalized) + row * size;
  const double mean = sum_of_squares(y, kType, size) / static_cast<double>(size);
  const VecF factor = broadcast(static_cast<float>(1.0 / std::sqrt(mean + args.output_eps)));
  for (int64_t c = 0; c < size; c += kLanes) {
    Stored rounded[kLanes];
    store_rounded<kType>(rounded, load_as_float<kType>(y + c, size - c) * factor);
    const VecF value = load_as_float<kType>(rounded) * load_as_float<kType>(weight + c, size - c);
    store_rounded<kType>(out + c, value, size - c);
  }
}

inline void normalize_rows(const ApplyArgs& args, int64_t threads) {
  constexpr int64_t kRowsPerTask = 16;
  for_each_task((args.num_rows + kRowsPerTask - 1) / kRowsPerTask, threads,
                [&](int64_t task, int64_t) {
                  const int64_t end = min64(args.num_rows, (task + 1) * kRowsPerTask);
                  for (int64_t row = task * kRowsPerTask; row < end; ++row) {
                    switch (args.dtype) {
                      case Dtype::kBFloat16:
                        normalize_row<Dtype::kBFloat16>(args, row);
                        break;
                      case Dtype::kFloat16:
                        normalize_row<Dtype::kFloat16>(args, row);
                        break;
                      default:
                        normalize_row<Dtype::kFloat32>(args, row);
                    }
                  }
                });
}

// x as the kernels read it: rows of dwords, zero-padded to a whole step.
struct Inputs {
  const float* data = nullptr;
  int64_t stride = 0;
};

template <Dtype kType, bool kPairs>
inline void apply_few(const Epilogue& epilogue, const Inputs& x, int64_t threads) {
  const ApplyArgs& args = epilogue.args;
  const int64_t size = args.hidden_size, bytes = bytes_of(kType);
  const int64_t used = min64(threads, max64(1, size * size * bytes / kBytesPerThread));
  for_each_task((size + kDotGroup - 1) / kDotGroup, used, [&](int64_t group, int64_t) {
    alignas(64) float sums[kDotTokens * kDotGroup];
    const int64_t out = group * kDotGroup, rows = min64(kDotGroup, size - out);
    const char* weight = static_cast<const char*>(args.weight) + out * size * bytes;
    dot_group<kType, kPairs>(weight, size, rows, used * kDotGroup * size, x.data, x.stride,
                             args.num_rows, sums);
    for (int64_t row = 0; row < args.num_rows; ++row) {
      finish_of(epilogue, row, out, rows, sums + row * kDotGroup);
    }
  });
}

template <Dtype kType>
inline void apply_few_packed(const Epilogue& epilogue, const Inputs& x, int64_t threads) {
  const ApplyArgs& args = epilogue.args;
  const int64_t size = args.hidden_size, rows = args.num_rows;
  const int64_t panels = (size + kPanel - 1) / kPanel, dwords = packed_dwords<kType>(size);
  const int64_t inputs = dwords * kInputsPerDword<kType>;
  const int64_t tokens = panel_tokens_for(rows), groups = (rows + tokens - 1) / tokens;
  Scratch scratch(rows == 1 ? 0 : Scratch::bytes_for<float>(groups * tokens * inputs));
  const float* interleaved = x.data;
  if (rows > 1) {
    float* to = scratch.take<float>(groups * tokens * inputs);
    for (int64_t g = 0; g < groups; ++g) {
      interleave_rows(x.data + g * tokens * x.stride, x.stride, rows - g * tokens, inputs, tokens,
                      to + g * tokens * inputs);
    }
    interleaved = to;
  }
  const int64_t bytes = panels * dwords * kPanel * static_cast<int64_t>(sizeof(float));
  const int64_t used = min64(threads, max64(1, bytes / kBytesPerThread));
  // Long runs of panels keep the stream unbroken; several per thread even out their speeds.
  const int64_t tasks = used == 1 ? 1 : min64(panels, kRunsPerThread * used);
  for_each_task(tasks, used, [&](int64_t task, int64_t) {
    alignas(64) float sums[kPanelTokens * kPanel];
    for (int64_t p = task * panels / tasks; p < (task + 1) * panels / tasks; ++p) {
      const float* panel = static_cast<const float*>(args.weight) + p * dwords * kPanel;
      const int64_t out = p * kPanel, count = min64(kPanel, size - out);
      for (int64_t g = 0; g < groups; ++g) {
        panel_dots_of<kType>(tokens, panel, dwords, interleaved + g * tokens * inputs, sums);
        for (int64_t row = g * tokens; row < min64(rows, (g + 1) * tokens); ++row) {
          finish_of(epilogue, row, out, count, sums + (row - g * tokens) * kPanel);
        }
      }
    }
  });
}

// The panels of a strip of the weight: as they lie in a packed one, else written to `buffer`.
template <Dtype kType, bool kPairs>
inline const float* strip_panels(const ApplyArgs& args, int64_t out, int64_t outputs,
                                 int64_t dwords, float* buffer) {
  const int64_t size = args.hidden_size;
  if constexpr (kType == Dtype::kBFloat16 || kType == Dtype::kFloat32) {
    if (args.packed) {
      const float* panels = static_cast<const float*>(args.weight) +
                            out / kPanel * packed_dwords<kType>(size) * kPanel;
      if (kInputsPerDword<kType> == 1) return panels;
      widen_strip(panels, (outputs + kPanel - 1) / kPanel, size, buffer);
      return buffer;
    }
  }
  pack_strip<kType, kPairs>(static_cast<const char*>(args.weight) + out * size * bytes_of(kType),
                            size, outputs, dwords, buffer);
  return buffer;
}

template <Dtype kType, bool kPairs>
inline void apply_many(const Epilogue& epilogue, const Inputs& x, int64_t threads) {
  const ApplyArgs& args = epilogue.args;
  const int64_t size = args.hidden_size;
  const int64_t dwords = kPairs ? (size + 1) / 2 : size;
  const int64_t strips = (size + kStripOutputs - 1) / kStripOutputs;
  // With few strips, tokens are shared out too; each share packs its own panels.
  const int64_t wanted = max64(1, (4 * threads + strips - 1) / strips);
  const int64_t shares = threads == 1 ? 1 : min64(wanted, max64(1, args.num_rows / 128));
  const int64_t share_rows = round_up((args.num_rows + shares - 1) / shares, kGemmRows);
  const int64_t panel_floats = kStripOutputs * dwords;
  const int64_t sum_floats = kGemmTokens * kStripOutputs;
  Scratch scratch(static_cast<size_t>(threads) *
                  Scratch::bytes_for<float>(round_up(panel_floats, kPanel) + sum_floats));
  const int64_t slot_floats = round_up(panel_floats, kPanel) + sum_floats;
  float* buffers = scratch.take<float>(threads * slot_floats);
  for_each_task(strips * shares, threads, [&](int64_t task, int64_t slot) {
    float* panels = buffers + slot * slot_floats;
    float* sums = panels + round_up(panel_floats, kPanel);
    const int64_t out = task % strips * kStripOutputs, outputs = min64(kStripOutputs, size - out);
    const int64_t begin = task / strips * share_rows;
    const int64_t end = min64(args.num_rows, begin + share_rows);
    if (begin >= end) return;
    const float* strip = strip_panels<kType, kPairs>(args, out, outputs, dwords, panels);
    for (int64_t row = begin; row < end; row += kGemmTokens) {
      const int64_t rows = min64(kGemmTokens, end - row);
      gemm_strip<kPairs>(x.data + row * x.stride, x.stride, rows, strip, outputs, dwords, sums);
      for (int64_t r = 0; r < rows; ++r) {
        finish_of(epilogue, row + r, out, outputs, sums + r * kStripOutputs);
      }
    }
  });
}

template <Dtype kType, bool kPairs>
inline void apply_typed(const Epilogue& epilogue, const Inputs& x, int64_t threads) {
  if (epilogue.args.num_rows > kDotTokens) {
    return apply_many<kType, kPairs>(epilogue, x, threads);
  }
  if constexpr (kType == Dtype::kBFloat16 || kType == Dtype::kFloat32) {
    if (epilogue.args.packed) return apply_few_packed<kType>(epilogue, x, threads);
  }
  apply_few<kType, kPairs>(epilogue, x, threads);
}

inline void ghost_apply(const ApplyArgs& args) {
  const int64_t size = args.hidden_size, rows = args.num_rows;
  if (size == 0 || rows == 0) return;
  const int64_t threads = max64(1, num_threads());
  const bool pairs = kHasPairs && args.dtype == Dtype::kBFloat16;
  const int64_t step = pairs ? 2 * kLanes : kLanes;
  const int64_t padded = round_up(size, step);
  const int64_t dwords = pairs ? padded / 2 : padded;
  // Several rows of x are read at once: at a distance of whole KiB they would fall into the same
  // cache sets.
  const bool spread = rows > 1 && dwords % 256 == 0;
  const int64_t stride = spread ? dwords + kPanel : dwords;
  // Rows that are whole steps of what the kernel reads are taken where they are.
  const bool in_place = !spread && padded == size && (pairs || args.dtype == Dtype::kFloat32);
  Scratch scratch(Scratch::bytes_for<float>(in_place ? 0 : rows * stride) +
                  3 * Scratch::bytes_for<float>(padded) + Scratch::bytes_for<float>(rows));
  Inputs x{static_cast<const float*>(args.x), stride};
  if (!in_place) {
    float* copy = scratch.take<float>(rows * stride);
    x.data = copy;
    const char* from = static_cast<const char*>(args.x);
    const int64_t row_bytes = size * bytes_of(args.dtype);
    for_each_task((rows + 63) / 64, threads, [&](int64_t task, int64_t) {
      for (int64_t row = task * 64; row < min64(rows, (task + 1) * 64); ++row) {
        float* to = copy + row * stride;
        if (pairs) {
          std::memset(to + dwords - kLanes, 0, kLanes * sizeof(float));
          std::memcpy(to, from + row * row_bytes, static_cast<size_t>(row_bytes));
        } else {
          row_to_float(from + row * row_bytes, args.dtype, size, padded, to);
        }
      }
    });
  }
  Epilogue epilogue{args};
  if (args.bias != nullptr) {
    float* bias = scratch.take<float>(padded);
    row_to_float(args.bias, args.bias_dtype, size, round_up(size, kLanes), bias);
    epilogue.bias = bias;
  }
  if (args.first_state != nullptr) {
    float* values = scratch.take<float>(padded);
    float* first_state = scratch.take<float>(padded);
    row_to_float(args.first_state, args.first_state_dtype, size, round_up(size, kLanes), values);
    for (int64_t c = 0; c < size; c += kLanes) {
      if (args.dtype == Dtype::kBFloat16) {
        store_rounded<Dtype::kBFloat16>(reinterpret_cast<uint16_t*>(first_state) + c,
                                        load(values + c));
      } else if (args.dtype == Dtype::kFloat16) {
        store_rounded<Dtype::kFloat16>(reinterpret_cast<uint16_t*>(first_state) + c,
                                       load(values + c));
      } else {
        store(first_state + c, load(values + c));
      }
    }
    epilogue.first_state = first_state;
  }
  if (args.normed) {
    float* factor = scratch.take<float>(rows);
    for_each_task((rows + 63) / 64, threads, [&](int64_t task, int64_t) {
      const char* from = static_cast<const char*>(args.x);
      for (int64_t row = task * 64; row < min64(rows, (task + 1) * 64); ++row) {
        const char* values = from + row * size * bytes_of(args.dtype);
        const double mean = sum_of_squares(values, args.dtype, size) / static_cast<double>(size);
        factor[row] = static_cast<float>(1.0 / std::sqrt(mean + args.norm_eps));
      }
    });
    epilogue.row_factor = factor;
  }
  if (pairs && args.weight_dtype == Dtype::kInt8) {
    apply_typed<Dtype::kInt8, kHasPairs>(epilogue, x, threads);
  } else if (pairs) {
    apply_typed<Dtype::kBFloat16, kHasPairs>(epilogue, x, threads);
  } else if (args.weight_dtype == Dtype::kInt8) {
    apply_typed<Dtype::kInt8, false>(epilogue, x, threads);
  } else if (args.weight_dtype == Dtype::kBFloat16) {
    apply_typed<Dtype::kBFloat16, false>(epilogue, x, threads);
  } else if (args.weight_dtype == Dtype::kFloat16) {
    apply_typed<Dtype::kFloat16, false>(epilogue, x, threads);
  } else {
    apply_typed<Dtype::kFloat32, false>(epilogue, x, threads);
  }
  if (args.normalized != nullptr) normalize_rows(args, threads);
}

}  // namespace
}  // namespace ghosted_fast
