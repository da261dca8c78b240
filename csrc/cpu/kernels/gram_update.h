// gram_update on one path: the order of the work. See gram_kernel.h for the design.
#pragma once

#include "gram_pack.h"

namespace ghosted_fast {
namespace {

// The blocks of one chunk: the whole ones of C first, the half ones on G's diagonal last.
inline int64_t list_blocks(const GramArgs& args, int64_t row_panels, int64_t output_panels,
                           int64_t block_panels, Block* blocks) {
  int64_t count = 0;
  if (args.cross != nullptr) {
    for (int64_t j = 0; j < output_panels; j += block_panels) {
      for (int64_t i = 0; i < row_panels; i += block_panels) blocks[count++] = {false, i, j};
    }
  }
  if (args.gram != nullptr) {
    for (int64_t j = 0; j < row_panels; j += block_panels) {
      for (int64_t i = j + block_panels; i < row_panels; i += block_panels) {
        blocks[count++] = {true, i, j};
      }
    }
    for (int64_t j = 0; j < row_panels; j += block_panels) blocks[count++] = {true, j, j};
  }
  return count;
}

inline int64_t panel_floats(int64_t tokens, bool pairs, int64_t panels) {
  const int64_t slab_tokens = pairs ? 2 * kSlabDwords : kSlabDwords;
  return (tokens + slab_tokens - 1) / slab_tokens * panels * kPanelStride;
}

inline GramStatus gram_update(const GramArgs& args) {
  const int64_t threads = max64(1, num_threads());
  Scratch token_scratch(Tokens::bytes(args.num_tokens));
  Tokens tokens;
  const GramStatus status = prepare_tokens(args, threads, token_scratch, tokens);
  if (status.problem != GramProblem::kNone || tokens.count == 0) return status;
  if (args.moments != nullptr) add_moments(args, tokens, threads);
  const bool want_gram = args.gram != nullptr, want_cross = args.cross != nullptr;
  if (!want_gram && !want_cross) return status;

  const bool exact =
      kHasPairs && args.x.dtype == Dtype::kBFloat16 && tokens.feature_scales_are_exact;
  const bool gram_pairs = exact;
  const bool cross_pairs =
      exact && args.y.dtype == Dtype::kBFloat16 && !args.delta && tokens.target_scales_are_exact;
  const bool need_pairs = (want_gram && gram_pairs) || (want_cross && cross_pairs);
  const bool need_floats = (want_gram && !gram_pairs) || (want_cross && !cross_pairs);

  const int64_t row_panels = (args.hidden_size + kPanel - 1) / kPanel;
  const int64_t output_panels = want_cross ? (args.num_outputs + kPanel - 1) / kPanel : 0;
  auto floats_for = [&](int64_t chunk) {
    return (need_pairs ? panel_floats(chunk, true, row_panels) : 0) +
           (need_floats ? panel_floats(chunk, false, row_panels) : 0) +
           (want_cross ? panel_floats(chunk, cross_pairs, output_panels) : 0);
  };
  int64_t chunk = min64(kChunkTokens, round_up(tokens.count, 2 * kSlabDwords));
  while (chunk > 2 * kSlabDwords && floats_for(chunk) * 4 > kChunkBytes) {
    chunk = round_up(chunk / 2, 2 * kSlabDwords);
  }

  auto block_count = [&](int64_t panels) {
    const int64_t rows = (row_panels + panels - 1) / panels;
    return rows * ((output_panels + panels - 1) / panels) + (want_gram ? rows * (rows + 1) / 2 : 0);
  };
  int64_t block_panels = kBlockPanels;
  if (threads > 1 && block_count(block_panels) < 4 * threads) block_panels /= 2;
  const int64_t max_blocks = block_count(block_panels);
  const int64_t sums_size = block_panels * block_panels * kPanel * kPanel + kTileSize;
  Scratch scratch(Scratch::bytes_for<float>(floats_for(chunk)) + 3 * 64 +
                  Scratch::bytes_for<Block>(max_blocks) +
                  static_cast<size_t>(threads) * Scratch::bytes_for<double>(sums_size));
  Panels pairs{nullptr, row_panels, true}, floats{nullptr, row_panels, false};
  Panels targets{nullptr, output_panels, cross_pairs};
  if (need_pairs) pairs.data = scratch.take<float>(panel_floats(chunk, true, row_panels));
  if (need_floats) floats.data = scratch.take<float>(panel_floats(chunk, false, row_panels));
  if (want_cross) {
    targets.data = scratch.take<float>(panel_floats(chunk, cross_pairs, output_panels));
  }
  Block* blocks = scratch.take<Block>(max_blocks);
  double* sums = scratch.take<double>(threads * sums_size);
  const int64_t num_blocks = list_blocks(args, row_panels, output_panels, block_panels, blocks);

  const Panels& gram_panels = gram_pairs ? pairs : floats;
  const Panels& cross_panels = cross_pairs ? pairs : floats;
  const double gram_factor = std::ldexp(1.0, -2 * tokens.feature_shift);
  const double cross_factor = std::ldexp(1.0, -tokens.feature_shift - tokens.target_shift);
  const PackSource features{args.x, nullptr, args.hidden_size, tokens.feature_scale};
  const PackSource outputs{args.y, args.delta ? &args.x : nullptr, args.num_outputs,
                           tokens.target_scale};
  for (int64_t begin = 0; begin < tokens.count; begin += chunk) {
    const int64_t end = min64(tokens.count, begin + chunk);
    if (need_pairs) pack(features, tokens, begin, end, threads, pairs);
    if (need_floats) pack(features, tokens, begin, end, threads, floats);
    if (want_cross) pack(outputs, tokens, begin, end, threads, targets);
    for_each_task(num_blocks, threads, [&](int64_t task, int64_t slot) {
      const Block& block = blocks[task];
      double* block_sums = sums + slot * sums_size;
      if (block.is_gram) {
        gram_block(block, gram_panels, gram_panels, end - begin, args.hidden_size, args.hidden_size,
                   gram_factor, block_panels, block_sums, args.gram);
      } else {
        gram_block(block, cross_panels, targets, end - begin, args.hidden_size, args.num_outputs,
                   cross_factor, block_panels, block_sums, args.cross);
      }
    });
  }
  return status;
}

}  // namespace
}  // namespace ghosted_fast
