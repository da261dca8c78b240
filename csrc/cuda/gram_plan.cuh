// How a call of gram_update is carried out: which sides of the products are cut into parts, in
// which order, with which factors, and how many tokens at a time.
#pragma once

#include <algorithm>
#include <cmath>

#include "gram_tiles.cuh"
#include "gram_tokens.cuh"

namespace ghosted_fast {

// Tokens whose operands are in the workspace at a time: a multiple of the flush, so that the sums
// do not depend on it, and at most about this many bytes.
constexpr int64_t kFlushTokens = int64_t{kFlushTiles} * kTileTokens;
constexpr int64_t kChunkTokens = 1 << 20;
#ifndef GHOSTED_FAST_GRAM_CHUNK_BYTES  // the tests make it small
#define GHOSTED_FAST_GRAM_CHUNK_BYTES (int64_t{256} << 20)
#endif
constexpr int64_t kChunkBytes = GHOSTED_FAST_GRAM_CHUNK_BYTES;
// Rows outside 2^-40 .. 2^40 are shifted by a power of two, as on the CPU: products and their parts
// stay in fp32's range.
constexpr int kSafeExponent = 40;
// Where fewer tokens make up half of a sum, it is compensated: the roundings of the additions after
// the first of them would be 2e-7 of the sum, and average out over many.
constexpr int64_t kOwners = 64;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

inline int safe_shift(int32_t biased_exponent) {
  if (biased_exponent == 0) return 0;
  const int exponent = biased_exponent - kExponentBias;
  return exponent > kSafeExponent || exponent < -kSafeExponent ? -exponent : 0;
}

// Whether few tokens make up half of the sum, by the sizes of their products.
inline bool is_owned_by_few(const int32_t* sizes) {
  double total = 0.0;
  for (int bucket = 0; bucket < kSizeBuckets; ++bucket) {
    total += std::ldexp(sizes[bucket], 2 * (bucket - kSizeBuckets / 2));
  }
  double part = 0.0;
  int64_t tokens = 0;
  for (int bucket = kSizeBuckets - 1; bucket >= 0 && part < 0.5 * total; --bucket) {
    part += std::ldexp(sizes[bucket], 2 * (bucket - kSizeBuckets / 2));
    tokens += sizes[bucket];
  }
  return tokens < kOwners;
}

inline bool has_scales(const GramArgs& args) { return args.token_weight != nullptr || args.normed; }

inline int parts_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return 1;
    case Dtype::kFloat16:
      return 2;
    default:
      return kMaxParts;
  }
}

// One side of a product: the caller's rows, or parts in the workspace.
struct Side {
  Rows rows;  // where num_parts is 0
  int num_parts = 0;
  OperandSource source;
  int64_t workspace_elements(int64_t tokens) const { return num_parts * tokens * source.columns; }
};

struct Plan {
  bool want_gram = false, want_cross = false;
  Dtype gram_type = Dtype::kBFloat16, cross_type = Dtype::kBFloat16;
  Side gram_left, gram_right, cross_left, cross_right;
  double gram_factor = 1.0, cross_factor = 1.0;
  // Sides that several sums share are in the workspace once.
  Side split_left, split_gram, split_cross;
  int64_t chunk = 0;
  bool compensated = true;

  int64_t workspace_elements(int64_t tokens) const {
    return split_left.workspace_elements(tokens) + split_gram.workspace_elements(tokens) +
           split_cross.workspace_elements(tokens);
  }
};

inline TokenScales scales_in(const GramArgs& args, const void* tokens) {
  if (!has_scales(args)) return {};
  const char* begin = static_cast<const char*>(tokens) + round_up(sizeof(GramTokenStatus), 16);
  double* scales = reinterpret_cast<double*>(const_cast<char*>(begin));
  return {scales, scales + args.num_tokens};
}

inline Side split(const Rows& rows, const Rows* minus, int64_t columns, int num_parts,
                  const GramArgs& args, const double* scale, int shift) {
  Side side;
  side.num_parts = num_parts;
  side.source.rows = rows;
  if (minus != nullptr) side.source.minus = *minus;
  side.source.scale = scale;
  side.source.factor = std::ldexp(1.0, shift);
  side.source.token_weight = args.token_weight;
  side.source.columns = columns;
  side.source.num_parts = num_parts;
  return side;
}

inline Side direct(const Rows& rows) {
  Side side;
  side.rows = rows;
  return side;
}

inline Plan plan_for(const GramArgs& args, const GramTokenStatus* status, const void* tokens) {
  const TokenScales scales = scales_in(args, tokens);
  const bool scaled = has_scales(args);
  const bool gram_inexact = scaled && (status == nullptr || status->gram_is_inexact != 0);
  const bool cross_inexact = scaled && (status == nullptr || status->cross_is_inexact != 0);
  const int x_shift = status == nullptr ? 0 : safe_shift(status->x_exponent);
  const int gram_shift = status == nullptr ? 0 : safe_shift(status->gram_exponent);
  const int cross_shift = status == nullptr ? 0 : safe_shift(status->cross_exponent);
  const bool x_is_narrow = args.x.dtype != Dtype::kFloat32;

  Plan plan;
  plan.want_gram = args.gram != nullptr;
  plan.want_cross = args.cross != nullptr;
  plan.compensated = status == nullptr || (plan.want_gram && is_owned_by_few(status->gram_sizes)) ||
                     (plan.want_cross && is_owned_by_few(status->cross_sizes));
  const bool gram_direct = x_is_narrow && !scaled && x_shift == 0;
  const bool cross_direct =
      gram_direct && args.y.dtype == args.x.dtype && !args.delta && cross_shift == 0;
  const bool left_direct = args.x.dtype == Dtype::kBFloat16 && x_shift == 0;
  const Side split_left =
      split(args.x, nullptr, args.hidden_size, parts_of(args.x.dtype), args, nullptr, x_shift);
  const bool need_left =
      !left_direct && ((plan.want_gram && !gram_direct) || (plan.want_cross && !cross_direct));
  if (need_left) plan.split_left = split_left;
  if (gram_direct) {
    plan.gram_type = args.x.dtype;
    plan.gram_left = plan.gram_right = direct(args.x);
  } else if (plan.want_gram) {
    plan.gram_left = left_direct ? direct(args.x) : split_left;
    // Without scales both sides are the same; a shift of x alone never leaves a bf16 side direct.
    plan.gram_right = plan.gram_left;
    plan.gram_factor = std::ldexp(1.0, -2 * x_shift);
    if (scaled) {
      plan.gram_right =
          split(args.x, nullptr, args.hidden_size,
                gram_inexact ? kMaxParts : parts_of(args.x.dtype), args, scales.gram, gram_shift);
      plan.split_gram = plan.gram_right;
      plan.gram_factor = std::ldexp(1.0, -x_shift - gram_shift);
    }
  }
  if (cross_direct) {
    plan.cross_type = args.x.dtype;
    plan.cross_left = direct(args.x);
    plan.cross_right = direct(args.y);
  } else if (plan.want_cross) {
    plan.cross_left = left_direct ? direct(args.x) : split_left;
    const int num_parts = cross_inexact || args.delta ? kMaxParts : parts_of(args.y.dtype);
    plan.cross_right = split(args.y, args.delta ? &args.x : nullptr, args.num_outputs, num_parts,
                             args, scales.cross, cross_shift);
    plan.split_cross = plan.cross_right;
    plan.cross_factor = std::ldexp(1.0, -x_shift - cross_shift);
  }
  plan.chunk = std::min(kChunkTokens, round_up(args.num_tokens, kFlushTokens));
  while (plan.chunk > kFlushTokens && plan.workspace_elements(plan.chunk) * 2 > kChunkBytes) {
    plan.chunk = round_up(plan.chunk / 2, kFlushTokens);
  }
  plan.chunk = std::min(plan.chunk, args.num_tokens);
  return plan;
}

}  // namespace ghosted_fast
