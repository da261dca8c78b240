// ghost_apply on one path: y = x + f(x) W^T (+ bias).
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

// Calls body(begin, end) for runs of the `count` pieces of a weight of so many bytes: long ones
// keep the stream unbroken, several for each thread even out their speeds.
template <class Body>
inline void for_each_run(int64_t count, int64_t bytes, int64_t threads, Body&& body) {
  constexpr int64_t kRunsPerThread = 4;
  const int64_t used = min64(threads, max64(1, bytes / kBytesPerThread));
  const int64_t runs = used == 1 ? 1 : min64(count, kRunsPerThread * used);
  for_each_task(runs, used,
                [&](int64_t run, int64_t) { body(run * count / runs, (run + 1) * count / runs); });
}

// What turns sums into outputs.
struct Epilogue {
  const ApplyArgs& args;
  const float* bias = nullptr;        // fp32, padded
  const float* row_factor = nullptr;  // 1 / rms(x), or null
  const void* first_state = nullptr;  // in x's dtype
};

// y[row][column, column + count) from the sums of x W^T; `sums` may be read to a whole vector. With
// kCount the compiler knows the count.
template <Dtype kType, int64_t kCount = 0>
inline void finish(const Epilogue& epilogue, int64_t row, int64_t column, int64_t given_count,
                   const float* sums) {
  const int64_t count = kCount > 0 ? kCount : given_count;
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
  with_dtype(epilogue.args.dtype,
             [&](auto tag) { finish<decltype(tag)::kDtype>(epilogue, row, column, count, sums); });
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
  for_each_run(panels, bytes, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kPanelTokens * kPanel];
    for (int64_t p = begin; p < end; ++p) {
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
      const int64_t count = (outputs + kPanel - 1) / kPanel;
#if defined(GHOSTED_FAST_NEON)
      if constexpr (kPairs) {
        const int64_t from = packed_dwords<kType>(size);
        for (int64_t panel = 0; panel < count; ++panel) {
          put_in_quads(panels + panel * from * kPanel, from, dwords,
                       buffer + panel * dwords * kPanel);
        }
        return buffer;
      }
#endif
      if (kInputsPerDword<kType> == 1) return panels;
      widen_strip(panels, count, size, buffer);
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
  const int64_t dwords = kPairs ? round_up((size + 1) / 2, kPairDwords) : size;
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

// How rows of x are laid out for the kernels.
struct Layout {
  int64_t padded = 0;  // numbers of a row, with the zeros after them
  int64_t stride = 0;  // dwords from one row to the next
  bool in_place = false;
  bool grouped = false;  // kGemmRows rows side by side
};

inline Layout layout_of(const ApplyArgs& args, bool pairs) {
  Layout layout;
  layout.padded = round_up(args.hidden_size, pairs ? 2 * kLanes : kLanes);
  const int64_t dwords = pairs ? layout.padded / 2 : layout.padded;
  layout.grouped = kHasNeon && args.num_rows > kDotTokens;
  if (layout.grouped) {
    layout.stride = dwords;
    return layout;
  }
  // Several rows of x are read at once: at a distance of whole KiB they would fall into the same
  // cache sets.
  const bool spread = args.num_rows > 1 && dwords % 256 == 0;
  layout.stride = spread ? dwords + kPanel : dwords;
  // Rows that are whole steps of what the kernel reads are taken where they are.
  layout.in_place =
      !spread && layout.padded == args.hidden_size && (pairs || args.dtype == Dtype::kFloat32);
  return layout;
}

template <class Body>
inline void for_each_row(const ApplyArgs& args, int64_t threads, Body&& body) {
  constexpr int64_t kRowsPerTask = 64;
  const int64_t row_bytes = args.hidden_size * bytes_of(args.dtype);
  for_each_task((args.num_rows + kRowsPerTask - 1) / kRowsPerTask, threads,
                [&](int64_t task, int64_t) {
                  const int64_t end = min64(args.num_rows, (task + 1) * kRowsPerTask);
                  for (int64_t row = task * kRowsPerTask; row < end; ++row) {
                    body(row, static_cast<const char*>(args.x) + row * row_bytes);
                  }
                });
}

inline void copy_rows(const ApplyArgs& args, bool pairs, const Layout& layout, int64_t threads,
                      float* copy) {
  const int64_t dwords = layout.padded / 2;
  for_each_row(args, threads, [&](int64_t row, const char* from) {
    float* to = copy + row * layout.stride;
    if (pairs) {
      std::memset(to + dwords - kLanes, 0, kLanes * sizeof(float));
      std::memcpy(to, from, static_cast<size_t>(args.hidden_size * bytes_of(args.dtype)));
    } else {
      row_to_float(from, args.dtype, args.hidden_size, layout.padded, to);
    }
  });
}

#if defined(GHOSTED_FAST_NEON)
template <Dtype kType, bool kPairs>
inline void group_rows_typed(const ApplyArgs& args, const Layout& layout, int64_t threads,
                             float* copy) {
  typedef WeightSource<kType, kPairs> Source;
  const StorageOf<kType>* x = static_cast<const StorageOf<kType>*>(args.x);
  const int64_t size = args.hidden_size, groups = (args.num_rows + kGemmRows - 1) / kGemmRows;
  for_each_task(groups, threads, [&](int64_t group, int64_t) {
    const auto load_step = [&](int64_t r, int64_t k) {
      const int64_t row = group * kGemmRows + r, element = kPairs ? 2 * k : k;
      if (row >= args.num_rows) return VecF{};
      const StorageOf<kType>* from = x + row * size + element;
      const int64_t count = size - element;
      return count >= Source::kStep ? Source::load_step(from) : Source::load_step(from, count);
    };
    put_side_by_side<kPairs, kGemmRows>(layout.stride, load_step,
                                        copy + group * kGemmRows * layout.stride);
  });
}

inline void group_rows(const ApplyArgs& args, bool pairs, const Layout& layout, int64_t threads,
                       float* copy) {
  if (pairs) return group_rows_typed<Dtype::kBFloat16, kHasPairs>(args, layout, threads, copy);
  with_dtype(args.dtype, [&](auto tag) {
    group_rows_typed<decltype(tag)::kDtype, false>(args, layout, threads, copy);
  });
}
#else
inline void group_rows(const ApplyArgs&, bool, const Layout&, int64_t, float*) {}  // never called
#endif

// The first state in x's dtype, rounded once; `values` is scratch.
inline void round_first_state(const ApplyArgs& args, float* values, void* rounded) {
  const int64_t size = args.hidden_size;
  row_to_float(args.first_state, args.first_state_dtype, size, round_up(size, kLanes), values);
  with_dtype(args.dtype, [&](auto tag) {
    constexpr Dtype kType = decltype(tag)::kDtype;
    StorageOf<kType>* to = static_cast<StorageOf<kType>*>(rounded);
    for (int64_t c = 0; c < size; c += kLanes) store_rounded<kType>(to + c, load(values + c));
  });
}

// Bytes of scratch memory that make_epilogue takes; `padded` holds a row in whole vectors.
inline size_t epilogue_bytes(const ApplyArgs& args, int64_t padded) {
  return 3 * Scratch::bytes_for<float>(padded) + Scratch::bytes_for<float>(args.num_rows);
}

inline Epilogue make_epilogue(const ApplyArgs& args, int64_t padded, int64_t threads,
                              Scratch& scratch) {
  const int64_t size = args.hidden_size;
  Epilogue epilogue{args};
  if (args.bias != nullptr) {
    float* bias = scratch.take<float>(padded);
    row_to_float(args.bias, args.bias_dtype, size, round_up(size, kLanes), bias);
    epilogue.bias = bias;
  }
  if (args.first_state != nullptr) {
    float* values = scratch.take<float>(padded);
    float* first_state = scratch.take<float>(padded);
    round_first_state(args, values, first_state);
    epilogue.first_state = first_state;
  }
  if (args.normed) {
    float* factor = scratch.take<float>(args.num_rows);
    for_each_row(args, threads, [&](int64_t row, const char* from) {
      const double mean = sum_of_squares(from, args.dtype, size) / static_cast<double>(size);
      factor[row] = static_cast<float>(1.0 / std::sqrt(mean + args.norm_eps));
    });
    epilogue.row_factor = factor;
  }
  return epilogue;
}

inline void ghost_apply(const ApplyArgs& args) {
  const int64_t size = args.hidden_size, rows = args.num_rows;
  if (size == 0 || rows == 0) return;
  const int64_t threads = max64(1, num_threads());
  const bool pairs = kHasPairs && args.dtype == Dtype::kBFloat16;
  const Layout layout = layout_of(args, pairs);
  const int64_t held = layout.grouped ? round_up(rows, kGemmRows) : layout.in_place ? 0 : rows;
  Scratch scratch(Scratch::bytes_for<float>(held * layout.stride) +
                  epilogue_bytes(args, layout.padded));
  Inputs x{static_cast<const float*>(args.x), layout.stride};
  if (!layout.in_place) {
    float* copy = scratch.take<float>(held * layout.stride);
    (layout.grouped ? group_rows : copy_rows)(args, pairs, layout, threads, copy);
    x.data = copy;
  }
  const Epilogue epilogue = make_epilogue(args, layout.padded, threads, scratch);
  const auto apply = [&](auto tag) {
    constexpr Dtype kType = decltype(tag)::kDtype;
    if constexpr (kType == Dtype::kBFloat16 || kType == Dtype::kInt8) {
      if (pairs) return apply_typed<kType, kHasPairs>(epilogue, x, threads);
    }
    apply_typed<kType, false>(epilogue, x, threads);
  };
  if (args.weight_dtype == Dtype::kInt8) return apply(DtypeTag<Dtype::kInt8>{});
  with_dtype(args.weight_dtype, apply);
}

}  // namespace
}  // namespace ghosted_fast
