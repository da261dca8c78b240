// gram_update on the path of AMX: bf16 x in tiles, everything else as on the path avx512.
#pragma once

#include "gram_rows.h"

namespace ghosted_fast {
namespace {

// Tokens that are summed in fp32, 512 at a time, before they are promoted.
constexpr int64_t kTiledChunk = 2048;

// One product: what meets the left side, and where it goes.
struct TiledProduct {
  bool is_gram = false;
  PackSource right;
  bool is_exact = false;  // whether the right side is bf16
  Sums into;

  int64_t parts() const { return is_exact ? 1 : kSplitParts; }
  int64_t pairs() const { return (into.columns + kPairFeatures - 1) / kPairFeatures; }
  int64_t row_pairs() const { return (into.rows + kPairFeatures - 1) / kPairFeatures; }
};

// C first, if both are wanted: its groups are larger. Returns how many.
inline int64_t list_products(const GramArgs& args, const Tokens& tokens, const TileScales& scales,
                             TiledProduct* products) {
  int64_t count = 0;
  if (args.cross != nullptr) {
    TiledProduct& product = products[count++];
    product.right = {args.y, args.delta ? &args.x : nullptr, args.num_outputs, scales.cross};
    product.is_exact = args.y.dtype == Dtype::kBFloat16 && !args.delta &&
                       tokens.feature_scales_are_exact && tokens.target_scales_are_exact;
    product.into = {args.cross, args.hidden_size, args.num_outputs,
                    std::ldexp(1.0, -tokens.feature_shift - tokens.target_shift)};
  }
  if (args.gram != nullptr) {
    TiledProduct& product = products[count++];
    product.is_gram = true;
    product.right = {args.x, nullptr, args.hidden_size, scales.gram};
    product.is_exact = tokens.feature_scales_are_exact;
    product.into = {args.gram, args.hidden_size, args.hidden_size,
                    std::ldexp(1.0, -2 * tokens.feature_shift)};
  }
  return count;
}

// How a product is cut into tasks: groups of right pairs, and for several threads shares of rows.
struct GroupPlan {
  int64_t width, groups, shares;

  GroupPlan(const TiledProduct& product, int64_t threads) {
    const int64_t most = product.is_exact ? kGroupPairs : kSplitGroupPairs;
    groups = (product.pairs() + most - 1) / most;
    width = (product.pairs() + groups - 1) / groups;
    shares = threads == 1 ? 1 : max64(1, min64(4 * threads / groups, product.row_pairs() / 4));
  }
  int64_t tasks() const { return groups * shares; }

  Group group_of(const TiledProduct& product, int64_t task) const {
    Group group;
    group.is_gram = product.is_gram;
    group.first = task / shares * width;
    group.last = min64(product.pairs(), group.first + width);
    const int64_t begin = product.is_gram ? group.first : 0, rows = product.row_pairs() - begin;
    group.row_begin = begin + task % shares * rows / shares;
    group.row_end = begin + (task % shares + 1) * rows / shares;
    return group;
  }
};

template <int kParts>
inline void add_group(const TiledProduct& product, const Group& group, const int64_t* index,
                      const Slabs& slabs, const float* left, float* memory) {
  if (group.row_begin == group.row_end) return;
  float* right = memory + GroupRows<kParts>::kFloats;
  pack_right<kParts>(product.right, index, slabs, group.first, group.last, right);
  GroupRows<kParts>(group, product.into, slabs, left, right, memory).run();
}

inline void add_tiled_products(const GramArgs& args, const Tokens& tokens, int64_t threads) {
  const int64_t slabs = (min64(kTiledChunk, tokens.count) + kTiledTokens - 1) / kTiledTokens;
  const int64_t pairs = (args.hidden_size + kPairFeatures - 1) / kPairFeatures;
  const int64_t left_size = pairs * slabs * 2 * kHalfDwords;
  const int64_t right_size =
      max64(kGroupPairs, kSplitParts * kSplitGroupPairs) * slabs * 2 * kHalfDwords;
  const int64_t slot_size = GroupRows<1>::kFloats + right_size;
  Scratch scratch(TileScales::bytes(tokens.count) + Scratch::bytes_for<float>(left_size) +
                  Scratch::bytes_for<float>(threads * slot_size));
  const TileScales scales(tokens, scratch);
  float* left = scratch.take<float>(left_size);
  float* memory = scratch.take<float>(threads * slot_size);
  const PackSource features{args.x, nullptr, args.hidden_size, scales.left};
  TiledProduct products[2];
  const int64_t num_products = list_products(args, tokens, scales, products);
  for (int64_t begin = 0; begin < tokens.count; begin += kTiledChunk) {
    const Slabs chunk{begin, min64(tokens.count, begin + kTiledChunk)};
    pack_left(features, tokens.index, chunk, threads, left);
    for (int64_t p = 0; p < num_products; ++p) {
      const TiledProduct& product = products[p];
      const GroupPlan plan(product, threads);
      for_each_task(plan.tasks(), threads, [&](int64_t task, int64_t slot) {
        const auto add = product.is_exact ? &add_group<1> : &add_group<kSplitParts>;
        add(product, plan.group_of(product, task), tokens.index, chunk, left,
            memory + slot * slot_size);
      });
    }
  }
}

inline GramStatus amx_gram_update(const GramArgs& args) {
  if (args.x.dtype != Dtype::kBFloat16) return gram_update(args);
  return gram_update_by(args, &add_tiled_products);
}

}  // namespace
}  // namespace ghosted_fast
