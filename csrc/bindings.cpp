// Registers the operators' kernels with torch's stable ABI, and builds the module
// ghosted_fast._C, which only tells how it was built and which path is in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/amx_support.h"
#include "cpu/arm_support.h"
#include "cpu/dispatch.h"
#include "cpu/operators.h"
#include "cpu/parallel.h"
#ifdef GHOSTED_FAST_CUDA
#include "cuda/operators.h"
#endif

// The schemas are defined in ghosted_fast/ops, in the file of each operator.
STABLE_TORCH_LIBRARY_IMPL(ghosted_fast, CPU, m) {
  m.impl("gram_update", TORCH_BOX(&ghosted_fast::gram_update_cpu));
  m.impl("ghost_apply", TORCH_BOX(&ghosted_fast::ghost_apply_cpu));
  m.impl("ghost_solve", TORCH_BOX(&ghosted_fast::ghost_solve_cpu));
  m.impl("divergence", TORCH_BOX(&ghosted_fast::divergence_cpu));
}

#ifdef GHOSTED_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(ghosted_fast, CUDA, m) {
  m.impl("gram_update", TORCH_BOX(&ghosted_fast::gram_update_cuda));
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of ghosted_fast; loading this registers them with torch.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["kind"] = GHOSTED_FAST_BUILD_KIND;
        info["compiler"] = GHOSTED_FAST_COMPILER;
        info["torch"] = GHOSTED_FAST_TORCH_VERSION;
        info["paths"] = GHOSTED_FAST_COMPILED_PATHS;
        info["cuda"] = GHOSTED_FAST_CUDA_BUILD;
        return info;
      },
      "Return how the extension was built: kind, compiler, torch version, compiled paths, CUDA "
      "compiler and architectures.");
  m.def("cpu_paths", &ghosted_fast::cpu_paths,
        "Return the instruction-set paths that this processor can run, the best first.");
  m.def(
      "cpu_path", [] { return std::string(ghosted_fast::kernel_table().name); },
      "Return the path in use.");
  m.def("amx_problem", &ghosted_fast::amx_problem,
        "Return why the AMX that the processor has cannot be used; empty if it can, or has none.");
  m.def("neonbf16_problem", &ghosted_fast::neonbf16_problem,
        "Return why the path neonbf16 cannot be used on this Arm processor; empty if it can, or on "
        "others.");
  m.def("advise_huge_pages", &ghosted_fast::advise_huge_pages, pybind11::arg("address"),
        pybind11::arg("num_bytes"),
        "Ask the system to back memory, whole huge pages of it, by huge pages.");
  m.def(
      "set_cpu_path",
      [](const std::string& name) {
        if (!ghosted_fast::set_cpu_path(name)) {
          std::string known = "auto";
          for (const std::string& path : ghosted_fast::cpu_paths()) known += ", " + path;
          throw pybind11::value_error("expected one of " + known + ", got " + name);
        }
      },
      pybind11::arg("name"), "Use a path from now on; \"auto\" for the best.");
}
