// Runs the kernels of csrc/cpu/kernels/amx on bf16 rows that end where their memory ends, compares
// them with plain loops in fp64, and prints a line of each case with a hash of all bits of its
// results: the emulated tiles and those of a processor must print the same.
#include <cmath>
#include <cstdio>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kernels/path_amx.cpp"
#include "stand_ins.h"
#ifndef GHOSTED_FAST_EMULATED_TILES
#include "amx_support.h"
#endif

using namespace ghosted_fast;

namespace {

std::mt19937 generator(0);
int failures = 0;

void expect(bool holds, const std::string& name, const char* what) {
  if (holds) return;
  std::printf("wrong: %s: %s\n", name.c_str(), what);
  ++failures;
}

void check_release() {
#ifdef GHOSTED_FAST_EMULATED_TILES
  const bool in_use = tiles_in_use();
#else
  uint32_t low, high;  // XINUSE: what of the extended state is not in its first state
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  const bool in_use = (low & (3u << 17)) != 0;
#endif
  expect(!in_use, "a task", "it ended with tiles in use");
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

// One instruction on numbers of very different sizes, denormals among them.
void check_instructions() {
  for (int turn = 0; turn < 40; ++turn) {
    uint32_t a[kAmxDwords], b[kAmxDwords];
    float sums[kAmxDwords];
    int32_t counts[kAmxDwords];
    const int shift = turn < 20 ? 8 : 125;
    for (int64_t i = 0; i < kAmxDwords; ++i) {
      const auto number = [&] {
        const int exponent = static_cast<int>(generator() % (2 * shift)) - shift;
        const float value =
            std::ldexp(1.0f + (generator() % 128) / 128.0f, exponent / 2 - shift / 2);
        return static_cast<uint32_t>(float_to_bfloat16(generator() % 2 == 0 ? value : -value));
      };
      a[i] = number() | number() << 16;
      b[i] = number() | number() << 16;
      sums[i] = std::ldexp(static_cast<float>(generator() % 1000) - 500.0f, turn < 20 ? -12 : -140);
      counts[i] = static_cast<int32_t>(generator() % 100000);
    }
    const Tiles tiles(whole_tiles());
    tile_load<0>(sums, kAmxRowBytes);
    tile_load<3>(counts, kAmxRowBytes);
    tile_load<1>(a, kAmxRowBytes);
    tile_load_past_l1<2>(b, kAmxRowBytes);
    tile_dot<0, 1, 2>();
    tile_dot_int8<3, 1, 2>();
    tile_store<0>(sums, kAmxRowBytes);
    tile_store<3>(counts, kAmxRowBytes);
    print(name_of("tdpbf16ps", {turn}), sums, sizeof(sums));
    print(name_of("tdpbssd", {turn}), counts, sizeof(counts));
  }
}

struct GramCase {
  int64_t tokens, size, outputs, gap;
  bool weighted, normed, delta;
  float large = 1.0f;  // what a token in the middle is multiplied with
};

struct GramData {
  Halves x, y;
  std::vector<float> weight;
};

std::vector<double> gram_sums(const GramCase& c, const GramData& data, std::string name) {
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
  expect(kAmxKernels.gram_update(args).problem == GramProblem::kNone, name, "status");
  return sums;
}

void check_gram(const GramCase& c) {
  const std::string name = name_of("gram", {c.tokens, c.size, c.outputs, c.gap, c.weighted,
                                            c.normed, c.delta, static_cast<int64_t>(c.large)});
  const int64_t x_stride = c.size + c.gap, y_stride = c.outputs + c.gap;
  GramData data{random_rows((c.tokens - 1) * x_stride + c.size),
                random_rows((c.tokens - 1) * y_stride + c.outputs),
                {}};
  for (int64_t t = 0; t < c.tokens; ++t) {
    data.weight.push_back(t % 7 == 3 ? 0.0f : 0.1f + 0.01f * static_cast<float>(t % 97));
    for (int64_t i = 0; t == c.tokens / 2 && i < c.size; ++i) {
      data.x[t * x_stride + i] = float_to_bfloat16(c.large * widen(data.x[t * x_stride + i]));
    }
  }
  pretended_threads = 1;
  const std::vector<double> sums = gram_sums(c, data, name);
  print(name, sums.data(), sums.size() * sizeof(double));
  pretended_threads = 3;
  expect(sums == gram_sums(c, data, name), name, "other bits on three threads");
  std::vector<double> exact(sums.size()), size(sums.size(), 1e-30);
  for (int64_t t = 0; t < c.tokens; ++t) {
    const uint16_t *x = data.x.get() + t * x_stride, *y = data.y.get() + t * y_stride;
    double squares = 0;
    for (int64_t i = 0; i < c.size; ++i) squares += std::pow(widen(x[i]), 2);
    const double w = c.weighted ? data.weight[t] : 1.0;
    const double inverse = c.normed ? 1 / std::sqrt(squares / c.size + 1e-5) : 1.0;
    for (int64_t i = 0; i < c.size; ++i) {
      const auto add = [&](int64_t at, double product) {
        exact[at] += product;
        size[at] += std::fabs(product);
      };
      for (int64_t j = 0; j <= i; ++j) {
        add(i * c.size + j, w * inverse * inverse * widen(x[i]) * widen(x[j]));
      }
      for (int64_t j = 0; j < c.outputs; ++j) {
        const double target = widen(y[j]) - (c.delta ? widen(x[j]) : 0.0f);
        add(c.size * c.size + i * c.outputs + j, w * inverse * widen(x[i]) * target);
      }
    }
  }
  double worst = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    worst = std::fmax(worst, std::fabs(sums[i] - exact[i]) / size[i]);
  }
  // Three rounded fp32 factors and two sums; parts of 16 bits would be at 4e-6.
  expect(worst < 6e-7, name, std::to_string(worst * 1e6).c_str());
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

void check_apply(Form form, int64_t rows, int64_t size, bool extras) {
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
  kAmxKernels.ghost_apply(args);
  print(name, y.get(), static_cast<size_t>(rows * size) * 2);
  const std::vector<uint16_t> first(y.get(), y.get() + rows * size);
  pretended_threads = 3;
  kAmxKernels.ghost_apply(args);
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
  expect(worst <= 1.0, name, std::to_string(worst).c_str());
}

}  // namespace

int main() {
#ifndef GHOSTED_FAST_EMULATED_TILES
  if (!has_amx() || !amx_problem().empty()) return std::puts("no AMX here"), 2;
#endif
  after_task = &check_release;
  check_instructions();
  for (const GramCase& c : {
           GramCase{1, 1, 1, 0, false, false, false},
           GramCase{33, 31, 33, 3, false, false, false},
           GramCase{70, 64, 64, 0, true, true, true},
           GramCase{300, 100, 103, 1, true, false, false},
           GramCase{515, 40, 40, 0, true, true, true, 1000.0f},
           GramCase{600, 290, 20, 0, false, false, false},
           GramCase{65, 300, 300, 0, false, true, true},
           GramCase{2120, 33, 31, 0, true, false, false},
           GramCase{2120, 20, 40, 2, false, false, false, 300.0f},
       }) {
    check_gram(c);
  }
  for (Form form : {Form::kPacked, Form::kPlain, Form::kInt8}) {
    for (int64_t rows : {1, 3, 16, 17, 40, 70}) {
      for (int64_t size : {1, 31, 32, 66, 100}) check_apply(form, rows, size, size % 2 == 0);
    }
    check_apply(form, 16, 290, true);
    check_apply(form, 33, 290, true);
    check_apply(form, 65, 641, true);   // two passes over the inputs, three blocks of outputs
    check_apply(form, 550, 33, false);  // two blocks of rows
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
