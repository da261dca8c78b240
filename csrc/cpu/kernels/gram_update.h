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

// How the sums are cut into blocks, and the tokens into chunks.
struct GramPlan {
  bool want_gram, want_cross, gram_pairs, cross_pairs, need_pairs, need_floats;
  int64_t row_panels, output_panels;
  int64_t chunk = 0, block_panels = kBlockPanels, max_blocks = 0, sums_size = 0;

  GramPlan(const GramArgs& args, const Tokens& tokens, int64_t threads)
      : want_gram(args.gram != nullptr), want_cross(args.cross != nullptr) {
    const bool exact =
        kHasPairs && args.x.dtype == Dtype::kBFloat16 && tokens.feature_scales_are_exact;
    gram_pairs = exact;
    cross_pairs =
        exact && args.y.dtype == Dtype::kBFloat16 && !args.delta && tokens.target_scales_are_exact;
    need_pairs = (want_gram && gram_pairs) || (want_cross && cross_pairs);
    need_floats = (want_gram && !gram_pairs) || (want_cross && !cross_pairs);
    row_panels = (args.hidden_size + kPanel - 1) / kPanel;
    output_panels = want_cross ? (args.num_outputs + kPanel - 1) / kPanel : 0;
    chunk = min64(kChunkTokens, round_up(tokens.count, 2 * kSlabDwords));
    while (chunk > 2 * kSlabDwords && chunk_floats() * 4 > kChunkBytes) {
      chunk = round_up(chunk / 2, 2 * kSlabDwords);
    }
    if (threads > 1 && block_count() < 4 * threads) block_panels /= 2;
    max_blocks = block_count();
    sums_size = block_panels * block_panels * kPanel * kPanel + kTileSize;
  }

  int64_t chunk_floats() const {
    return (need_pairs ? panel_floats(chunk, true, row_panels) : 0) +
           (need_floats ? panel_floats(chunk, false, row_panels) : 0) +
           (want_cross ? panel_floats(chunk, cross_pairs, output_panels) : 0);
  }

  int64_t block_count() const {
    const int64_t rows = (row_panels + block_panels - 1) / block_panels;
    const int64_t columns = (output_panels + block_panels - 1) / block_panels;
    return rows * columns + (want_gram ? rows * (rows + 1) / 2 : 0);
  }
};

inline void add_products(const GramArgs& args, const Tokens& tokens, int64_t threads) {
  const GramPlan plan(args, tokens, threads);
  Scratch scratch(Scratch::bytes_for<float>(plan.chunk_floats()) + 3 * 64 +
                  Scratch::bytes_for<Block>(plan.max_blocks) +
                  static_cast<size_t>(threads) * Scratch::bytes_for<double>(plan.sums_size));
  Panels pairs{nullptr, plan.row_panels, true}, floats{nullptr, plan.row_panels, false};
  Panels targets{nullptr, plan.output_panels, plan.cross_pairs};
  const auto take = [&](Panels& panels) {
    panels.data = scratch.take<float>(panel_floats(plan.chunk, panels.pairs, panels.count));
  };
  if (plan.need_pairs) take(pairs);
  if (plan.need_floats) take(floats);
  if (plan.want_cross) take(targets);
  Block* blocks = scratch.take<Block>(plan.max_blocks);
  double* sums = scratch.take<double>(threads * plan.sums_size);
  const int64_t num_blocks =
      list_blocks(args, plan.row_panels, plan.output_panels, plan.block_panels, blocks);

  const Panels& gram_panels = plan.gram_pairs ? pairs : floats;
  const Panels& cross_panels = plan.cross_pairs ? pairs : floats;
  const Sums gram{args.gram, args.hidden_size, args.hidden_size,
                  std::ldexp(1.0, -2 * tokens.feature_shift)};
  const Sums cross{args.cross, args.hidden_size, args.num_outputs,
                   std::ldexp(1.0, -tokens.feature_shift - tokens.target_shift)};
  const PackSource features{args.x, nullptr, args.hidden_size, tokens.feature_scale};
  const PackSource outputs{args.y, args.delta ? &args.x : nullptr, args.num_outputs,
                           tokens.target_scale};
  for (int64_t begin = 0; begin < tokens.count; begin += plan.chunk) {
    const int64_t end = min64(tokens.count, begin + plan.chunk);
    if (plan.need_pairs) pack(features, tokens, begin, end, threads, pairs);
    if (plan.need_floats) pack(features, tokens, begin, end, threads, floats);
    if (plan.want_cross) pack(outputs, tokens, begin, end, threads, targets);
    for_each_task(num_blocks, threads, [&](int64_t task, int64_t slot) {
      const Block& block = blocks[task];
      double* block_sums = sums + slot * plan.sums_size;
      if (block.is_gram) {
        gram_block(block, gram_panels, gram_panels, end - begin, plan.block_panels, block_sums,
                   gram);
      } else {
        gram_block(block, cross_panels, targets, end - begin, plan.block_panels, block_sums, cross);
      }
    });
  }
}

// `add` adds the products of tokens that were found good.
template <class Add>
inline GramStatus gram_update_by(const GramArgs& args, Add&& add) {
  const int64_t threads = max64(1, num_threads());
  Scratch token_scratch(Tokens::bytes(args.num_tokens));
  Tokens tokens;
  const GramStatus status = prepare_tokens(args, threads, token_scratch, tokens);
  if (status.problem != GramProblem::kNone || tokens.count == 0) return status;
  if (args.moments != nullptr) add_moments(args, tokens, threads);
  if (args.gram != nullptr || args.cross != nullptr) add(args, tokens, threads);
  return status;
}

inline GramStatus gram_update(const GramArgs& args) { return gram_update_by(args, &add_products); }

}  // namespace
}  // namespace ghosted_fast
