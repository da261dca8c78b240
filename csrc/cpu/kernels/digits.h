// Rows of bf16 as digits, for products with an int8 weight in int8: a fixed-point number of 22 bits
// below the row's largest magnitude is three signed digits of 8 bits. The products of the digits
// are exact.
#pragma once

#include <limits>

#include "rows.h"

namespace ghosted_fast {
namespace {

constexpr int64_t kDigits = 3;
constexpr int kFixedBits = 22;
// Of a row's largest magnitude; rows below have fewer bits.
constexpr int kSmallestExponent = -100;
// Inputs up to which no sum of products of two int8 leaves int32.
constexpr int64_t kMaxByteInputs = (int64_t{1} << 31) / (128 * 128);

typedef int8_t VecB __attribute__((vector_size(kLanes)));

// Calls put(k, digit, bytes) with a digit of each of the inputs k .. k + kLanes - 1; digit 0 is the
// highest. Returns what a last digit of 1 stands for; NaN for a row that is not finite, as every
// output will be.
template <class Put>
inline float for_digits(const ApplyArgs& args, int64_t row, Put&& put) {
  const int64_t size = args.hidden_size;
  const uint16_t* x = static_cast<const uint16_t*>(args.x) + row * size;
  const float largest = largest_magnitude(x, Dtype::kBFloat16, size);
  if (!std::isfinite(largest)) return std::numeric_limits<float>::quiet_NaN();
  int exponent = 0;  // the largest magnitude is below 2^exponent
  std::frexp(largest, &exponent);
  exponent = exponent > kSmallestExponent ? exponent : kSmallestExponent;
  const VecF inverse = broadcast(std::ldexp(1.0f, kFixedBits - exponent));
  for (int64_t k = 0; k < size; k += kLanes) {
    // To the nearest integer: the lowest bits of a sum with 1.5 * 2^23.
    const VecF value = load_as_float<Dtype::kBFloat16>(x + k, size - k);
    VecI fixed = (VecI)(value * inverse + broadcast(12582912.0f)) - 0x4b400000;
    for (int64_t digit = kDigits - 1; digit >= 0; --digit) {
      const VecI low = (fixed << 24) >> 24;
      put(k, digit, __builtin_convertvector(low, VecB));
      fixed = (fixed - low) >> 8;
    }
  }
  return std::ldexp(1.0f, exponent - kFixedBits);
}

}  // namespace
}  // namespace ghosted_fast
