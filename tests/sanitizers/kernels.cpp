// Runs the kernels of one path on buffers that end where the data ends, for AddressSanitizer and
// UBSan: tails, strides, odd sizes. Values are compared with plain loops in fp64.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../arguments.h"
#include "stand_ins.h"

namespace ghosted_fast {

extern const KernelTable PATH_TABLE;

}  // namespace ghosted_fast

using namespace ghosted_fast;

namespace {

std::mt19937 generator(0);
int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("wrong: %s\n", what.c_str());
  ++failures;
}

float bits(uint32_t value) {
  float result;
  std::memcpy(&result, &value, 4);
  return result;
}

// Numbers that every dtype holds exactly: k / 8, |k| <= 32; with a shift, which fp32 alone has.
struct Buffer {
  Dtype dtype;
  int64_t bytes;
  std::unique_ptr<char[]> data;
  std::vector<double> values;

  Buffer(Dtype dtype, int64_t count, float shift = 0.0f)
      : dtype(dtype), values(static_cast<size_t>(count)) {
    const int64_t size = dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kInt8 ? 1 : 2;
    bytes = size * count;
    data.reset(new char[bytes > 0 ? bytes : 1]);
    for (int64_t i = 0; i < count; ++i) {
      const int k = static_cast<int>(generator() % 65) - 32;
      store(i, dtype == Dtype::kInt8 ? static_cast<float>(k) : static_cast<float>(k) / 8 + shift);
    }
  }

  void store(int64_t i, float value) {
    values[i] = value;
    uint32_t raw;
    std::memcpy(&raw, &value, 4);
    if (dtype == Dtype::kFloat32) {
      std::memcpy(data.get() + 4 * i, &raw, 4);
    } else if (dtype == Dtype::kInt8) {
      data[i] = static_cast<char>(static_cast<int8_t>(value));
    } else {
      uint16_t half = static_cast<uint16_t>(raw >> 16);
      if (dtype == Dtype::kFloat16) {
        const uint32_t exponent = (raw >> 23) & 0xff;
        const uint32_t sign = (raw >> 16) & 0x8000;
        half = static_cast<uint16_t>(
            exponent == 0 ? sign : sign | ((exponent - 112) << 10) | ((raw >> 13) & 0x3ff));
      }
      std::memcpy(data.get() + 2 * i, &half, 2);
    }
  }

  double load(int64_t i) const {
    if (dtype == Dtype::kFloat32) {
      float value;
      std::memcpy(&value, data.get() + 4 * i, 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, data.get() + 2 * i, 2);
    if (dtype == Dtype::kBFloat16) return bits(static_cast<uint32_t>(half) << 16);
    const uint32_t exponent = (half >> 10) & 0x1f, sign = (half & 0x8000u) << 16;
    if (exponent == 0) return (sign ? -1.0 : 1.0) * (half & 0x3ff) * std::ldexp(1.0, -24);
    return bits(sign | ((exponent + 112) << 23) | ((half & 0x3ffu) << 13));
  }
};

std::string name_of(const char* op, std::vector<int64_t> numbers) {
  std::string name = op;
  for (int64_t number : numbers) name += " " + std::to_string(number);
  return name;
}

void check_gram(Dtype dtype, int64_t tokens, int64_t size, int64_t outputs, int64_t gap,
                bool weighted, bool normed) {
  const int64_t x_stride = size + gap, y_stride = outputs + gap;
  const Buffer x(dtype, tokens == 0 ? 0 : (tokens - 1) * x_stride + size);
  const Buffer y(dtype, tokens == 0 ? 0 : (tokens - 1) * y_stride + outputs);
  std::vector<float> weight(tokens);
  for (int64_t t = 0; t < tokens; ++t) weight[t] = t % 3 == 0 ? 0.0f : 0.25f * (t % 5 + 1);
  std::vector<double> gram(size * size), cross(size * outputs), exact_gram(size * size),
      exact_cross(size * outputs), moments(3 * size);
  GramArgs args;
  args.x = {x.data.get(), dtype, x_stride};
  args.y = {y.data.get(), dtype, y_stride};
  args.num_tokens = tokens;
  args.hidden_size = size;
  args.num_outputs = outputs;
  args.token_weight = weighted ? weight.data() : nullptr;
  args.normed = normed;
  args.norm_eps = 1e-5;
  args.delta = size == outputs;
  args.gram = gram.data();
  args.cross = cross.data();
  args.moments = size == outputs ? moments.data() : nullptr;
  const GramStatus status = PATH_TABLE.gram_update(args);
  expect(status.problem == GramProblem::kNone, name_of("gram status", {tokens, size, outputs}));
  for (int64_t t = 0; t < tokens; ++t) {
    const double* row = x.values.data() + t * x_stride;
    const double* target = y.values.data() + t * y_stride;
    double squares = 0;
    for (int64_t i = 0; i < size; ++i) squares += row[i] * row[i];
    const double inverse = normed ? 1 / std::sqrt(squares / size + 1e-5) : 1.0;
    const double w = weighted ? weight[t] : 1.0;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        exact_gram[i * size + j] += w * inverse * inverse * row[i] * row[j];
      }
      for (int64_t j = 0; j < outputs; ++j) {
        const double change = target[j] - (args.delta ? row[j] : 0.0);
        exact_cross[i * outputs + j] += w * inverse * row[i] * change;
      }
    }
  }
  double error = 0, total = 0;
  for (size_t i = 0; i < gram.size(); ++i) {
    error += (gram[i] - exact_gram[i]) * (gram[i] - exact_gram[i]);
    total += exact_gram[i] * exact_gram[i];
  }
  for (size_t i = 0; i < cross.size(); ++i) {
    error += (cross[i] - exact_cross[i]) * (cross[i] - exact_cross[i]);
    total += exact_cross[i] * exact_cross[i];
  }
  expect(error <= 1e-12 * total, name_of("gram", {tokens, size, outputs, gap, weighted, normed}));
}

// A weight in the order [panel of 16 outputs][in / n][16][n], n numbers to a dword.
std::vector<char> packed(const Buffer& weight, int64_t size) {
  const int64_t width = weight.dtype == Dtype::kBFloat16 ? 2 : 4, numbers = 4 / width;
  const int64_t dwords = (size + numbers - 1) / numbers;
  std::vector<char> panels((size + 15) / 16 * dwords * 64);
  for (int64_t out = 0; out < size; ++out) {
    for (int64_t in = 0; in < size; ++in) {
      const int64_t dword = (out / 16 * dwords + in / numbers) * 16 + out % 16;
      std::memcpy(panels.data() + dword * 4 + in % numbers * width,
                  static_cast<const char*>(weight.data.get()) + (out * size + in) * width, width);
    }
  }
  return panels;
}

enum class Form { kPlain, kInt8, kPacked };

void check_apply(Dtype dtype, Form form, int64_t rows, int64_t size, bool extras) {
  const bool int8 = form == Form::kInt8;
  const Buffer x(dtype, rows * size), weight(int8 ? Dtype::kInt8 : dtype, size * size);
  const std::vector<char> panels =
      form == Form::kPacked ? packed(weight, size) : std::vector<char>();
  const Buffer bias(dtype, size), state(dtype, size);
  Buffer y(dtype, rows * size);
  std::vector<float> scale(size, 0.125f);
  const std::unique_ptr<bool[]> is_first(new bool[rows > 0 ? rows : 1]);
  for (int64_t r = 0; r < rows; ++r) is_first[r] = r % 3 == 1;
  ApplyArgs args;
  args.x = x.data.get();
  args.dtype = dtype;
  args.num_rows = rows;
  args.hidden_size = size;
  args.packed = form == Form::kPacked;
  args.weight = args.packed ? panels.data() : weight.data.get();
  args.weight_dtype = weight.dtype;
  args.scale = int8 ? scale.data() : nullptr;
  args.y = y.data.get();
  if (extras) {
    args.bias = bias.data.get();
    args.bias_dtype = dtype;
    args.normed = true;
    args.norm_eps = 1e-5;
    args.first_state = state.data.get();
    args.first_state_dtype = dtype;
    args.is_first = is_first.get();
  }
  PATH_TABLE.ghost_apply(args);
  double error = 0, total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const double* row = x.values.data() + r * size;
    double squares = 0;
    for (int64_t k = 0; k < size; ++k) squares += row[k] * row[k];
    const double factor =
        (extras ? 1 / std::sqrt(squares / size + 1e-5) : 1.0) * (int8 ? 0.125 : 1.0);
    for (int64_t o = 0; o < size; ++o) {
      double sum = 0;
      for (int64_t k = 0; k < size; ++k) sum += row[k] * weight.values[o * size + k];
      double wanted = row[o] + factor * sum + (extras ? bias.values[o] : 0.0);
      if (extras && is_first[r]) wanted = state.values[o];
      const double difference = y.load(r * size + o) - wanted;
      error += difference * difference;
      total += wanted * wanted;
    }
  }
  const double bound = dtype == Dtype::kFloat32 ? 1e-6 : dtype == Dtype::kFloat16 ? 1e-3 : 4e-3;
  expect(error <= bound * bound * total,
         name_of("apply", {int(dtype), int(form), rows, size, extras}));
}

void check_solve(int64_t size, int64_t outputs) {
  const Buffer tokens(Dtype::kFloat32, (2 * size + 3) * size),
      right(Dtype::kFloat32, size * outputs);
  std::vector<double> gram(size * size), cross(right.values), solution(size * outputs);
  for (int64_t t = 0; t < 2 * size + 3; ++t) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        gram[i * size + j] += tokens.values[t * size + i] * tokens.values[t * size + j];
      }
    }
  }
  SolveArgs args{gram.data(), cross.data(), size, outputs, 0.5, solution.data()};
  const SolveInfo info = PATH_TABLE.ghost_solve(args);
  expect(info.failing_pivot == 0, name_of("solve pivot", {size, outputs}));
  double error = 0, total = 0;
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t c = 0; c < outputs; ++c) {
      double sum = 0.5 * solution[i * outputs + c];
      for (int64_t j = 0; j < size; ++j) sum += gram[i * size + j] * solution[j * outputs + c];
      error += (sum - cross[i * outputs + c]) * (sum - cross[i * outputs + c]);
      total += cross[i * outputs + c] * cross[i * outputs + c];
    }
  }
  expect(error <= 1e-20 * total, name_of("solve", {size, outputs}));
}

// Logits; those of fp32 lie far below zero, beside which what is not there would be the largest.
Buffer logits(Dtype dtype, int64_t count) {
  return Buffer(dtype, count, dtype == Dtype::kFloat32 ? -512.0f : 0.0f);
}

// A row's divergence, slopes and curvature, as the kernel orders them.
std::vector<double> exact_divergence(const double* p, const double* q,
                                     const std::vector<const double*>& moved, int64_t words,
                                     std::vector<double>* gradient) {
  double p_sum = 0, q_sum = 0;
  for (int64_t i = 0; i < words; ++i) {
    p_sum += std::exp(p[i]);
    q_sum += std::exp(q[i]);
  }
  const size_t count = moved.size();
  std::vector<double> found(1 + count + count * (count + 1) / 2), mean(count);
  for (int64_t i = 0; i < words; ++i) {
    const double here = std::exp(p[i]) / p_sum, there = std::exp(q[i]) / q_sum;
    found[0] += here * std::log(here / there);
    gradient->push_back(there - here);
    size_t pair = 1 + count;
    for (size_t k = 0; k < count; ++k) {
      const double change = moved[k][i] - q[i];
      mean[k] += there * change;
      found[1 + k] += (there - here) * change;
      for (size_t j = 0; j <= k; ++j) found[pair++] += there * change * (moved[j][i] - q[i]);
    }
  }
  size_t pair = 1 + count;
  for (size_t k = 0; k < count; ++k) {
    for (size_t j = 0; j <= k; ++j) found[pair++] -= mean[k] * mean[j];
  }
  return found;
}

// Rows of p and q, of which every third does not count, beside rows to which q moves.
void compare_divergence(const Buffer& p, const Buffer& q, const std::vector<Buffer>& ways,
                        int64_t rows) {
  const int64_t words = static_cast<int64_t>(p.values.size()) / rows, moved = ways.size();
  const std::string name = name_of("divergence", {int(p.dtype), rows, words, moved});
  const Buffer gradient(p.dtype, rows * words);
  const std::unique_ptr<bool[]> counted(new bool[rows]);
  for (int64_t r = 0; r < rows; ++r) counted[r] = r % 3 != 1;
  const int64_t found = 1 + moved + moved * (moved + 1) / 2;
  std::vector<double> sums(rows * found, -1.0);
  DivergenceArgs args{p.data.get(), q.data.get(), p.dtype, rows, words, counted.get(), {}, moved};
  for (int64_t k = 0; k < moved; ++k) args.moved[k] = ways[k].data.get();
  args.sums = sums.data();
  args.gradient = gradient.data.get();
  PATH_TABLE.divergence(args);
  const std::vector<double> first = sums;
  pretended_threads = 3;
  PATH_TABLE.divergence(args);
  pretended_threads = 2;
  expect(first == sums, name + " on three threads");
  const double bound = p.dtype == Dtype::kFloat32 ? 1e-6 : p.dtype == Dtype::kFloat16 ? 1e-3 : 4e-3;
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<const double*> places;
    for (const Buffer& way : ways) places.push_back(&way.values[r * words]);
    std::vector<double> slope;
    std::vector<double> exact =
        exact_divergence(&p.values[r * words], &q.values[r * words], places, words, &slope);
    if (!counted[r]) {
      exact.assign(exact.size(), 0.0);
      slope.assign(slope.size(), 0.0);
    }
    bool is_close = true;  // not by std::fmax, which is silent about NaN
    for (int64_t i = 0; i < words; ++i) {
      is_close = is_close && std::fabs(gradient.load(r * words + i) - slope[i]) <= bound;
    }
    expect(is_close, name + " gradient");
    for (int64_t i = 0; i < found; ++i) {
      const double allowed = i == 0 ? 2e-6 * exact[i] + 1e-6 : 1e-5;
      expect(std::fabs(sums[r * found + i] - exact[i]) <= allowed,
             name_of((name + " number").c_str(), {r, i}));
    }
  }
}

void check_divergence(Dtype dtype, int64_t rows, int64_t words, int64_t moved) {
  const Buffer p = logits(dtype, rows * words), q = logits(dtype, rows * words);
  std::vector<Buffer> ways;
  for (int64_t k = 0; k < moved; ++k) ways.push_back(logits(dtype, rows * words));
  compare_divergence(p, q, ways, rows);
}

// Equal numbers: added up in fp32 to the end, each addition would err to the same side.
void check_long_divergence(Dtype dtype) {
  constexpr int64_t kWords = 60000;
  Buffer p(dtype, kWords), q(dtype, kWords);
  for (int64_t i = 0; i < kWords; ++i) {
    p.store(i, i % 2 == 0 ? 0.0f : -1.125f);
    q.store(i, i % 2 == 0 ? -1.375f : 0.0f);
  }
  compare_divergence(p, q, {}, 1);
}

}  // namespace

int main() {
  const Dtype dtypes[] = {Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat32};
  for (Dtype dtype : dtypes) {
    for (int64_t tokens : {0, 1, 2, 7, 65, 129, 257, 300}) {
      for (int64_t size : {1, 8, 15, 17, 49}) {
        check_gram(dtype, tokens, size, size, 0, true, true);
        check_gram(dtype, tokens, size, size + 3, 5, false, false);
      }
    }
    check_gram(dtype, 70, 193, 195, 1, true, false);
    for (int64_t words : {1, 3, 15, 16, 17, 255, 300}) {
      for (int64_t moved : {0, 1, 2, 3}) check_divergence(dtype, 3, words, moved);
    }
    check_long_divergence(dtype);
    for (Form form : {Form::kPlain, Form::kInt8, Form::kPacked}) {
      if (form == Form::kPacked && dtype == Dtype::kFloat16) continue;  // is not packed
      for (int64_t rows : {0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33}) {
        for (int64_t size : {1, 3, 16, 31, 33, 65, 100}) {
          check_apply(dtype, form, rows, size, false);
          check_apply(dtype, form, rows, size, true);
        }
      }
      // More than one pass over a row, the last one odd.
      check_apply(dtype, form, 7, 1059, true);
      check_apply(dtype, form, 13, 1059, true);
      check_apply(dtype, form, 40, 333, true);
      // Rows so long that several of them are read at once.
      for (int64_t rows : {1, 3, 4}) check_apply(dtype, form, rows, 2083, true);
    }
  }
  for (int64_t size : {1, 2, 7, 8, 9, 95, 97, 200}) {
    for (int64_t outputs : {1, 23, 25, 60}) check_solve(size, outputs);
  }
  std::printf("%s: %d failures\n", PATH_TABLE.name, failures);
  return failures == 0 ? 0 : 1;
}
