// Random rows through the kernels of one path of Arm: rounding, threads, memory.
#include PATH_FILE
#include "random_cases.h"

using namespace ghosted_fast;

namespace {

void check_solve(int64_t size, int64_t outputs) {
  const std::string name = name_of("solve", {size, outputs});
  const auto rows = random_rows(2 * size * size), right = random_rows(size * outputs);
  std::vector<double> gram(size * size), cross(size * outputs), solution(size * outputs);
  for (int64_t t = 0; t < 2 * size; ++t) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        gram[i * size + j] +=
            static_cast<double>(widen(rows[t * size + i])) * widen(rows[t * size + j]);
      }
    }
  }
  for (int64_t i = 0; i < size * outputs; ++i) cross[i] = widen(right[i]);
  SolveArgs args{gram.data(), cross.data(), size, outputs, 0.5, solution.data()};
  pretended_threads = 1;
  const SolveInfo info = PATH_TABLE.ghost_solve(args);
  print(name, solution.data(), solution.size() * sizeof(double));
  expect(info.failing_pivot == 0 && info.residual <= 1e-10, name, std::to_string(info.residual));
  const std::vector<double> first = solution;
  pretended_threads = 3;
  PATH_TABLE.ghost_solve(args);
  expect(first == solution, name, "other bits on three threads");
}

}  // namespace

int main() {
  for (const GramCase& c : {
           GramCase{1, 1, 1, 0, false, false, false},
           GramCase{33, 31, 33, 3, false, false, false},
           GramCase{70, 64, 64, 0, true, true, true},
           GramCase{300, 100, 103, 1, true, false, false},
           GramCase{301, 200, 20, 0, false, false, false},
           GramCase{515, 40, 40, 0, false, false, false, 1000.0f},
           GramCase{2120, 20, 40, 2, false, false, false, 300.0f},
           GramCase{2120, 33, 31, 0, false, false, false, 1.0f, true},
           GramCase{600, 40, 40, 0, true, true, true, 1.0f, true},
           GramCase{256, 40, 40, 0, false, false, false, 1.0f, true},
       }) {
    check_gram(PATH_TABLE, c);
  }
  for (Form form : {Form::kPacked, Form::kPlain, Form::kInt8}) {
    for (int64_t rows : {1, 3, 16, 17, 21, 40}) {
      for (int64_t size : {1, 31, 32, 66, 100}) {
        check_apply(PATH_TABLE, form, rows, size, size % 2 == 0);
      }
    }
    check_apply(PATH_TABLE, form, 18, 290, true);   // four strips, two passes over the inputs
    check_apply(PATH_TABLE, form, 550, 33, false);  // two passes of rows
  }
  check_solve(7, 5);
  check_solve(130, 60);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
