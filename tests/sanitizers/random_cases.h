// Random bf16 rows that end where their memory ends, through the kernels of one path: compared with
// plain loops in fp64, and on one and on three threads. A line of each case has a hash of all bits
// of its results. To be included after the kernels' own file.
#pragma once

#include <cmath>
#include <cstdio>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "stand_ins.h"

namespace ghosted_fast {
namespace {

std::mt19937 generator(0);
int failures = 0;

void expect(bool holds, const std::string& name, const std::string& what) {
  if (holds) return;
  std::printf("wrong: %s: %s\n", name.c_str(), what.c_str());
  ++failures;
}

void print(const std::string& name, const void* data, size_t bytes) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (size_t i = 0; i < bytes; ++i) {
    hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
  }
  std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
}

std::string name_of(const char* op, std::vector<int64_t> numbers) {
  std::string name = op;
  for (int64_t number : numbers) name += " " + std::to_string(number);
  return name;
}

float widen(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

// Memory of exactly the given size that starts at a cache line, as tensors do.
constexpr std::align_val_t kAlignment{64};
struct Release {
  void operator()(uint16_t* data) const { ::operator delete[](data, kAlignment); }
};
typedef std::unique_ptr<uint16_t[], Release> Halves;

Halves make_halves(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(uint16_t);
  return Halves(static_cast<uint16_t*>(::operator new[](bytes, kAlignment)));
}

Halves random_rows(int64_t count, float size = 1.0f) {
  std::normal_distribution<float> normal;
  Halves values = make_halves(count);
  for (int64_t i = 0; i < count; ++i) values[i] = float_to_bfloat16(size * normal(generator));
  return values;
}

struct GramCase {
  int64_t tokens, size, outputs, gap;
  bool weighted, normed, delta;
  float large = 1.0f;     // what a token in the middle is multiplied with
  bool positive = false;  // all activations
};

struct GramData {
  Halves x, y;
  std::vector<float> weight;
};

GramData random_data(const GramCase& c) {
  const int64_t x_stride = c.size + c.gap, y_stride = c.outputs + c.gap;
  const int64_t x_count = (c.tokens - 1) * x_stride + c.size;
  const int64_t y_count = (c.tokens - 1) * y_stride + c.outputs;
  GramData data{random_rows(x_count), random_rows(y_count), {}};
  for (int64_t i = 0; c.positive && i < x_count; ++i) data.x[i] &= 0x7fff;
  for (int64_t i = 0; c.positive && i < y_count; ++i) data.y[i] &= 0x7fff;
  for (int64_t t = 0; t < c.tokens; ++t) {
    data.weight.push_back(t % 7 == 3 ? 0.0f : 0.1f + 0.01f * static_cast<float>(t % 97));
    for (int64_t i = 0; t == c.tokens / 2 && i < c.size; ++i) {
      data.x[t * x_stride + i] = float_to_bfloat16(c.large * widen(data.x[t * x_stride + i]));
    }
  }
  return data;
}

// G [size, size] and behind it C [size, outputs].
std::vector<double> gram_sums(const KernelTable& table, const GramCase& c, const GramData& data,
                              const std::string& name) {
  GramArgs args;
  std::vector<double> sums(c.size * c.size + c.size * c.outputs);
  args.x = {data.x.get(), Dtype::kBFloat16, c.size + c.gap};
  args.y = {data.y.get(), Dtype::kBFloat16, c.outputs + c.gap};
  args.num_tokens = c.tokens;
  args.hidden_size = c.size;
  args.num_outputs = c.outputs;
  args.token_weight = c.weighted ? data.weight.data() : nullptr;
  args.normed = c.normed;
  args.norm_eps = 1e-5;
  args.delta = c.delta;
  args.gram = sums.data();
  args.cross = sums.data() + c.size * c.size;
  expect(table.gram_update(args).problem == GramProblem::kNone, name, "status");
  return sums;
}

struct ExactGram {
  std::vector<double> sums, sizes;        // sizes: of the products that were added up
  std::vector<double> features, targets;  // square roots of the diagonals
};

ExactGram exact_gram(const GramCase& c, const GramData& data) {
  const size_t count = c.size * c.size + c.size * c.outputs;
  ExactGram exact{std::vector<double>(count), std::vector<double>(count, 1e-30),
                  std::vector<double>(c.size), std::vector<double>(c.outputs)};
  for (int64_t t = 0; t < c.tokens; ++t) {
    const uint16_t* x = data.x.get() + t * (c.size + c.gap);
    const uint16_t* y = data.y.get() + t * (c.outputs + c.gap);
    double squares = 0;
    for (int64_t i = 0; i < c.size; ++i) squares += std::pow(widen(x[i]), 2);
    const double root = c.weighted ? std::sqrt(data.weight[t]) : 1.0;
    const double inverse = c.normed ? 1 / std::sqrt(squares / c.size + 1e-5) : 1.0;
    std::vector<double> feature(c.size), target(c.outputs);
    for (int64_t i = 0; i < c.size; ++i) feature[i] = root * inverse * widen(x[i]);
    for (int64_t j = 0; j < c.outputs; ++j) {
      target[j] = root * (widen(y[j]) - (c.delta ? widen(x[j]) : 0.0f));
    }
    const auto add = [&](int64_t at, double product) {
      exact.sums[at] += product;
      exact.sizes[at] += std::fabs(product);
    };
    for (int64_t i = 0; i < c.size; ++i) {
      for (int64_t j = 0; j <= i; ++j) add(i * c.size + j, feature[i] * feature[j]);
      for (int64_t j = 0; j < c.outputs; ++j) {
        add(c.size * c.size + i * c.outputs + j, feature[i] * target[j]);
      }
      exact.features[i] += feature[i] * feature[i];
    }
    for (int64_t j = 0; j < c.outputs; ++j) exact.targets[j] += target[j] * target[j];
  }
  for (double& value : exact.features) value = std::sqrt(value) + 1e-30;
  for (double& value : exact.targets) value = std::sqrt(value) + 1e-30;
  return exact;
}

// The promises of docs/numerics.md, and a bound for each number.
void check_errors(const GramCase& c, const std::vector<double>& sums, const ExactGram& exact,
                  const std::string& name) {
  double worst = 0, error = 0, total = 0, scaled = 0, count = 0;
  for (size_t i = 0; i < sums.size(); ++i) {  // with the upper triangle, which stays zero
    worst = std::fmax(worst, std::fabs(sums[i] - exact.sums[i]) / exact.sizes[i]);
  }
  const auto look_at = [&](int64_t at, double scale) {
    const double difference = sums[at] - exact.sums[at];
    error += difference * difference;
    total += scale * scale;
    scaled += difference * difference / (scale * scale);
    ++count;
  };
  for (int64_t i = 0; i < c.size; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      look_at(i * c.size + j, exact.features[i] * exact.features[j]);
    }
    for (int64_t j = 0; j < c.outputs; ++j) {
      look_at(c.size * c.size + i * c.outputs + j, exact.features[i] * exact.targets[j]);
    }
  }
  scaled = std::sqrt(scaled / count);
  // Three rounded fp32 factors and two sums; parts of 16 bits would be at 4e-6.
  expect(worst < 6e-7, name, "1e-6 times " + std::to_string(worst * 1e6) + " of one number");
  expect(scaled <= 1e-7, name, "1e-7 times " + std::to_string(scaled * 1e7) + " scaled");
  expect(error <= 1e-12 * total, name, "in Frobenius norm");
}

void check_gram(const KernelTable& table, const GramCase& c) {
  const std::string name =
      name_of("gram", {c.tokens, c.size, c.outputs, c.gap, c.weighted, c.normed, c.delta,
                       static_cast<int64_t>(c.large), c.positive});
  const GramData data = random_data(c);
  pretended_threads = 1;
  const std::vector<double> sums = gram_sums(table, c, data, name);
  print(name, sums.data(), sums.size() * sizeof(double));
  pretended_threads = 3;
  expect(sums == gram_sums(table, c, data, name), name, "other bits on three threads");
  check_errors(c, sums, exact_gram(c, data), name);
}

enum class Form { kPacked, kPlain, kInt8 };

Halves packed(const uint16_t* weight, int64_t size) {
  const int64_t dwords = (size + 1) / 2, count = (size + 15) / 16 * dwords * 32;
  Halves panels = make_halves(count);
  std::memset(panels.get(), 0, static_cast<size_t>(count) * sizeof(uint16_t));
  for (int64_t out = 0; out < size; ++out) {
    for (int64_t in = 0; in < size; ++in) {
      panels[((out / 16 * dwords + in / 2) * 16 + out % 16) * 2 + in % 2] = weight[out * size + in];
    }
  }
  return panels;
}

void check_apply(const KernelTable& table, Form form, int64_t rows, int64_t size, bool extras) {
  const std::string name = name_of("apply", {int(form), rows, size, extras});
  const auto x = random_rows(rows * size), y = random_rows(rows * size);
  const auto weight = random_rows(size * size, 1.0f / std::sqrt(static_cast<float>(size)));
  const auto panels = packed(weight.get(), size);
  const std::unique_ptr<int8_t[]> integers(new int8_t[size * size]);
  for (int64_t i = 0; i < size * size; ++i) {
    integers[i] = static_cast<int8_t>(static_cast<int>(generator() % 255) - 127);
  }
  const auto state = random_rows(size);
  const std::unique_ptr<float[]> bias(new float[size]), scale(new float[size]);
  for (int64_t i = 0; i < size; ++i) {
    bias[i] = 0.01f * static_cast<float>(i % 50);
    scale[i] = 0.01f / std::sqrt(static_cast<float>(size)) * static_cast<float>(1 + i % 3);
  }
  const std::unique_ptr<bool[]> is_first(new bool[rows]);
  for (int64_t r = 0; r < rows; ++r) is_first[r] = r % 5 == 1;
  ApplyArgs args;
  args.x = x.get();
  args.dtype = args.weight_dtype = Dtype::kBFloat16;
  args.num_rows = rows;
  args.hidden_size = size;
  args.packed = form == Form::kPacked;
  args.weight = args.packed ? panels.get() : weight.get();
  args.y = y.get();
  if (form == Form::kInt8) {
    args.weight = integers.get();
    args.weight_dtype = Dtype::kInt8;
    args.scale = scale.get();
  }
  if (extras) {
    args.bias = bias.get();
    args.normed = true;
    args.norm_eps = 1e-5;
    args.first_state = state.get();
    args.first_state_dtype = Dtype::kBFloat16;
    args.is_first = is_first.get();
  }
  pretended_threads = 1;
  table.ghost_apply(args);
  print(name, y.get(), static_cast<size_t>(rows * size) * 2);
  const std::vector<uint16_t> first(y.get(), y.get() + rows * size);
  pretended_threads = 3;
  table.ghost_apply(args);
  expect(std::memcmp(first.data(), y.get(), first.size() * 2) == 0, name,
         "other bits on three threads");
  double worst = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* row = x.get() + r * size;
    double squares = 0;
    for (int64_t k = 0; k < size; ++k) squares += std::pow(widen(row[k]), 2);
    const double factor = extras ? 1 / std::sqrt(squares / size + 1e-5) : 1.0;
    for (int64_t o = 0; o < size; ++o) {
      double exact = 0, total = 1e-30;
      for (int64_t k = 0; k < size; ++k) {
        const double w = form == Form::kInt8
                             ? static_cast<double>(scale[o]) * integers[o * size + k]
                             : widen(weight[o * size + k]);
        exact += factor * widen(row[k]) * w;
        total += std::fabs(factor * widen(row[k]) * w);
      }
      exact += widen(row[o]) + (extras ? bias[o] : 0.0f);
      if (extras && is_first[r]) exact = widen(state[o]);
      // One rounding to bf16, and fp32 sums.
      const double allowed = std::fabs(exact) / 256 + 1e-6 * total;
      worst = std::fmax(worst, std::fabs(widen(y[r * size + o]) - exact) / allowed);
    }
  }
  expect(worst <= 1.0, name, std::to_string(worst) + " of what is allowed");
}

}  // namespace
}  // namespace ghosted_fast
