"""Builds the extension `ghosted_fast._C`; everything else is in pyproject.toml.

`GHOSTED_FAST_BUILD` chooses: `cpu` builds and fails where there is no compiler; `none` builds
nothing; `auto`, the default, builds for the CPU or warns; `cuda` builds for the CPU and for CUDA
and fails where there is no nvcc. It needs no GPU and no CUDA build of torch. nvcc is that of
$CUDACXX, $CUDA_HOME, $PATH or the packages of PyPI, in this order;
`GHOSTED_FAST_CUDA_ARCHITECTURES` ("80,90") chooses what it compiles for.

Of torch the headers and libraries are needed, and it is not imported: those of the environment that
is installed into serve, also where pip builds in isolation. Only where there are none, a front end
is asked to fetch torch for the build.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import setuptools
from setuptools.command.build_ext import build_ext

if TYPE_CHECKING:
    import ninja

CSRC = Path("csrc")
KERNELS = CSRC / "cpu" / "kernels"
CUDA_ARCHITECTURES = "80,90,100"
OLDEST_TORCH = "2.10"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_PATHS = {
    # The tile instructions are inline assembly, which needs no flags. Not -mavx512bf16: what is
    # not done in tiles is faster in fp32 on the processors that have them. Another false alarm.
    "amx": [*AVX512, "-mprefer-vector-width=512", "-Wno-uninitialized"],
    "avx512bf16": [*AVX512, "-mavx512bf16", "-mprefer-vector-width=512"],
    "avx512": [*AVX512, "-mprefer-vector-width=512"],
    "avx2": AVX2,
}
# Not armv8.6-a: Neoverse V1 has its products of bf16 and int8, and lacks other parts of it.
ARM_PATHS = {"neonbf16": ["-march=armv8.2-a+bf16+i8mm"], "neon": []}
# Every path is compiled on its own and chosen at run time: one wheel serves all processors.
PATH_FLAGS: dict[str, list[str]] = {
    **(X86_PATHS if IS_X86 else ARM_PATHS if IS_ARM else {}),
    "portable": [],
}
# No -ffast-math: NaN checks and the order of sums matter. No -march=native: wheels travel.
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno"]
FLAGS += ["-Wno-maybe-uninitialized"]  # false alarms inside GCC 12's own intrinsics


def _build_choice() -> str:
    choice = os.environ.get("GHOSTED_FAST_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"GHOSTED_FAST_BUILD: expected auto, cpu, cuda or none, got {choice!r}")
    return choice


class Torch(NamedTuple):
    """A torch to build for: where it is, and its version."""

    folder: Path
    version: str


def _torch() -> Torch | None:
    """Return the torch to build for: the one here, or that of the environment installed into.

    A front end that builds in isolation hides the environment's packages from Python, but says
    where they are.
    """
    here = importlib.util.find_spec("torch")
    there = PathFinder.find_spec("torch", [sysconfig.get_path("platlib")])
    for spec in (here, there):
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        said = re.search(
            r"^__version__ = '(.+)'", (folder / "version.py").read_text(), re.MULTILINE
        )
        if said and _release(said[1]) >= _release(OLDEST_TORCH):
            return Torch(folder, said[1])
    return None


def _release(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def _needed() -> list[str]:
    """Return what a front end shall fetch for the build, beside what pyproject.toml names."""
    if _build_choice() == "none" or _compiler_problem() or _torch():
        return []
    return [f"torch>={OLDEST_TORCH}"]


def _nvcc() -> Path:
    """Return the CUDA compiler to build with.

    Raises:
        SystemExit: There is none; says where it was looked for.
    """
    if chosen := os.environ.get("CUDACXX"):
        if found := shutil.which(chosen):
            return Path(found)
        raise SystemExit(f"GHOSTED_FAST_BUILD=cuda: CUDACXX={chosen} cannot be run; unset it")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    for folder in sys.path:
        candidates += sorted((Path(folder) / "nvidia").glob("cu*/bin/nvcc"), reverse=True)
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise SystemExit(
        "GHOSTED_FAST_BUILD=cuda: no nvcc in $CUDACXX, $CUDA_HOME, $PATH or the packages here; "
        "install the CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm "
        "nvidia-cuda-runtime nvidia-cuda-cccl`"
    )


def _cuda_architectures() -> list[str]:
    chosen = os.environ.get("GHOSTED_FAST_CUDA_ARCHITECTURES", CUDA_ARCHITECTURES)
    architectures = chosen.split(",")
    if not all(name.isdigit() and int(name) >= 80 for name in architectures):
        raise SystemExit(
            "GHOSTED_FAST_CUDA_ARCHITECTURES: expected numbers >= 80 such as "
            f"{CUDA_ARCHITECTURES}, got {chosen!r}"
        )
    return sorted(architectures, key=int)


def _nvcc_flags(architectures: list[str]) -> list[str]:
    """Return the flags for one binary per architecture, and PTX of the last for later ones."""
    flags = ["-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for name in architectures:
        flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
    return [
        *flags,
        "-gencode",
        f"arch=compute_{architectures[-1]},code=compute_{architectures[-1]}",
    ]


def _version_of(program: str) -> str:
    """Return the line of `program --version` that tells compilers apart."""
    done = subprocess.run(
        [*program.split(), "--version"], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines() or ["unknown"]
    return next((line for line in lines if "release" in line), lines[0])


def _compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"


def _compiler_problem() -> str:
    """Return why C++17 cannot be compiled here; empty if it can."""
    command = [*_compiler().split(), "-std=c++17", "-x", "c++", "-fsyntax-only", "-"]
    source = "#include <optional>\nstd::optional<int> value;\n"
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"no C++ compiler: {error}"
    return "" if done.returncode == 0 else f"{_compiler()} cannot compile C++17: {done.stderr}"


class BuildExtension(build_ext):
    """Compiles with ninja, each path with its own flags.

    Leaves `build.ninja` and the objects in the build's temporary folder, which is the same for
    editable installs and wheels, and `compile_commands.json` in the folder above, where clangd
    looks for it.
    """

    def build_extension(self, ext: setuptools.Extension) -> None:
        """Write the build file, let ninja run it, and copy what it made to its place."""
        if not ext.sources:
            raise SystemExit(
                f"expected torch {OLDEST_TORCH} or later to build for, got none: install it, or "
                "set GHOSTED_FAST_BUILD=none to build without the fast operators"
            )
        import ninja

        folder = Path(self.build_temp)
        if self.editable_mode:  # setuptools' own choice is gone after the build
            folder = Path("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        library = folder / target.name
        build_file = folder / "build.ninja"
        ext.include_dirs += self.include_dirs  # Python's own
        with build_file.open("w") as file:
            writer = ninja.Writer(file, width=sys.maxsize)  # type: ignore[arg-type]
            _write_build_file(writer, ext, library)
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(build_file)]
        commands = subprocess.run(
            [*command, "-t", "compdb", "cxx"], check=True, capture_output=True, text=True
        )
        (folder.parent / "compile_commands.json").write_text(commands.stdout)
        command += ["-j", str(_num_jobs())]
        command += ["-v"] if self.verbose > 1 else [] if self.verbose else ["--quiet"]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"ninja could not build {ext.name}: see the compiler's message above")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))


def _num_jobs() -> int:
    """Return how many compilers run at once: $MAX_JOBS, as for torch's extensions, or all cores."""
    jobs = os.environ.get("MAX_JOBS", "")
    return int(jobs) if jobs.isdigit() and int(jobs) else os.cpu_count() or 1


def _write_build_file(writer: ninja.Writer, ext: setuptools.Extension, library: Path) -> None:
    """Describe the build: one rule per compiler, and for each source what it is made of."""
    folder = library.parent
    writer.variable("builddir", _escape(str(folder)))
    dependencies = "-MD -MF $out.d -c $in -o $out"
    cxx = f"{_compiler()} {_shell(_cxx_flags(ext))} $path_flags {dependencies}"
    writer.rule("cxx", cxx, description="C++ $in", depfile="$out.d", deps="gcc")
    with_cuda = any(source.endswith(".cu") for source in ext.sources)
    if with_cuda:
        nvcc = f"{_shell(_nvcc_command())} {_shell(_nvcc_flags(_cuda_architectures()))}"
        nvcc = f"{nvcc} {dependencies}"
        writer.rule("nvcc", nvcc, description="CUDA $in", depfile="$out.d", deps="gcc")
    folders = _shell([f"-L{name}" for name in ext.library_dirs])
    linker = f"{_linker(with_cuda)} $in {folders} -o $out"
    writer.rule("link", linker, description="link $out")
    objects = []
    for source in map(Path, ext.sources):
        objects.append(str(folder / source.with_suffix(".o")))
        variables = {}
        if source.parent == KERNELS:
            variables["path_flags"] = _shell(PATH_FLAGS[source.stem.removeprefix("path_")])
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        writer.build([objects[-1]], rule, [str(source)], variables=variables)
    writer.build([str(library)], "link", objects)


def _shell(words: list[str]) -> str:
    """Return the words as a shell reads them, in a value of a build file."""
    return _escape(shlex.join(words))


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def _cxx_flags(ext: setuptools.Extension) -> list[str]:
    defines = [f"-D{name}={value}" for name, value in ext.define_macros]
    includes = [part for folder in ext.include_dirs for part in ("-isystem", folder)]
    return [*FLAGS, "-fPIC", *defines, *includes]


def _nvcc_command() -> list[str]:
    return [str(_nvcc()), "-ccbin", _compiler().split()[0]]


def _linker(with_cuda: bool) -> str:
    torch = "--no-as-needed,-ltorch_cpu"
    if not with_cuda:
        return f"{_compiler()} -shared -Wl,{torch}"
    # nvcc knows where its runtime is; that of PyPI's packages is beside it. Hidden, so that
    # the runtime of torch's own build is not mistaken for it.
    beside = _nvcc().resolve().parent.parent / "lib"
    command = _shell([*_nvcc_command(), "-shared", "-cudart", "static", f"-L{beside}"])
    return f"{command} -Xlinker --exclude-libs,ALL,{torch}"


def _extensions() -> list[setuptools.Extension]:
    choice = _build_choice()
    if choice == "none":
        return []
    if problem := _compiler_problem():
        if choice in ("cpu", "cuda"):
            raise SystemExit(f"GHOSTED_FAST_BUILD={choice}: {problem}; install a C++17 compiler")
        warnings.warn(f"{problem}; ghosted_fast will run on plain torch, slowly", stacklevel=2)
        return []
    torch = _torch()
    if torch is None:  # a front end may still be asking what is needed
        return [setuptools.Extension("ghosted_fast._C", [])]
    with_cuda = choice == "cuda"
    cuda_build = (
        f"{_version_of(str(_nvcc()))}, sm_{' sm_'.join(_cuda_architectures())}"
        if with_cuda
        else "none"
    )
    import pybind11

    def quoted(text: str) -> str:
        return '"' + text.replace('"', "'") + '"'

    sources = [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    sources += [KERNELS / f"path_{name}.cpp" for name in PATH_FLAGS]
    if with_cuda:
        sources += [*sorted((CSRC / "cuda").glob("*.cpp")), *sorted((CSRC / "cuda").glob("*.cu"))]
    return [
        setuptools.Extension(
            "ghosted_fast._C",
            [str(source) for source in sources],
            include_dirs=[pybind11.get_include(), *map(str, _headers(torch))],
            library_dirs=[str(torch.folder / "lib")],
            define_macros=[
                *([("GHOSTED_FAST_X86", "1")] if IS_X86 else []),
                *([("GHOSTED_FAST_ARM", "1")] if IS_ARM else []),
                *([("GHOSTED_FAST_CUDA", "1")] if with_cuda else []),
                ("GHOSTED_FAST_BUILD_KIND", quoted("cuda" if with_cuda else "cpu")),
                ("GHOSTED_FAST_CUDA_BUILD", quoted(cuda_build)),
                ("GHOSTED_FAST_COMPILER", quoted(_version_of(_compiler()))),
                ("GHOSTED_FAST_TORCH_VERSION", quoted(torch.version)),
                ("GHOSTED_FAST_COMPILED_PATHS", quoted(" ".join(PATH_FLAGS))),
            ],
        )
    ]


def _headers(torch: Torch) -> list[Path]:
    include = torch.folder / "include"
    return [include, include / "torch" / "csrc" / "api" / "include"]


if __name__ == "__main__":
    setuptools.setup(
        setup_requires=_needed(),
        ext_modules=_extensions(),
        cmdclass={"build_ext": BuildExtension},
    )
