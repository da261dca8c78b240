// Runs the kernels of csrc/cpu/kernels/amx on bf16 rows that end where their memory ends, compares
// them with plain loops in fp64, and prints a line of each case with a hash of all bits of its
// results: the emulated tiles and those of a processor must print the same.
#include "kernels/path_amx.cpp"
#include "random_cases.h"
#ifndef GHOSTED_FAST_EMULATED_TILES
#include "amx_support.h"
#endif

using namespace ghosted_fast;

namespace {

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
    check_gram(kAmxKernels, c);
  }
  for (Form form : {Form::kPacked, Form::kPlain, Form::kInt8}) {
    for (int64_t rows : {1, 3, 16, 17, 40, 64, 70, 96}) {
      for (int64_t size : {1, 31, 32, 66, 100})
        check_apply(kAmxKernels, form, rows, size, size % 2 == 0);
    }
    check_apply(kAmxKernels, form, 16, 290, true);
    check_apply(kAmxKernels, form, 33, 290, true);
    // Two passes over the inputs, three blocks of outputs: for a weight as it lies from 97 rows on.
    check_apply(kAmxKernels, form, form == Form::kPacked ? 65 : 97, 641, true);
    check_apply(kAmxKernels, form, 550, 33, false);  // two blocks of rows
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
