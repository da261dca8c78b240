"""Builds the extension `ghosted_fast._C`; everything else is in pyproject.toml.

`GHOSTED_FAST_BUILD` chooses: `cpu` builds and fails where there is no compiler; `none` builds
nothing; `auto`, the default, builds or warns; `cuda` is not part of this version.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
KERNELS = CSRC / "cpu" / "kernels"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Every path is compiled on its own and chosen at run time: one wheel serves all processors.
PATH_FLAGS: dict[str, list[str]] = {"portable": []}
if IS_X86:
    PATH_FLAGS = {
        "avx512bf16": [*AVX512, "-mavx512bf16", "-mprefer-vector-width=512"],
        "avx512": [*AVX512, "-mprefer-vector-width=512"],
        "avx2": AVX2,
        **PATH_FLAGS,
    }
# No -ffast-math: NaN checks and the order of sums matter. No -march=native: wheels travel.
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno"]
FLAGS += ["-Wno-maybe-uninitialized"]  # false alarms inside GCC 12's own intrinsics


def _build_choice() -> str:
    choice = os.environ.get("GHOSTED_FAST_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"GHOSTED_FAST_BUILD: expected auto, cpu, cuda or none, got {choice!r}")
    if choice == "cuda":
        raise SystemExit(
            "GHOSTED_FAST_BUILD=cuda: this version has no CUDA kernels; use auto, cpu or none"
        )
    return choice


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


def _compiler_version() -> str:
    done = subprocess.run(
        [*_compiler().split(), "--version"], capture_output=True, text=True, check=False
    )
    return (done.stdout.splitlines() or ["unknown"])[0]


class BuildExtension(build_ext):
    """Compiles the sources side by side, each path with its own flags."""

    def build_extension(self, ext: setuptools.Extension) -> None:
        headers = [path.stat().st_mtime for path in CSRC.rglob("*.h")]
        newest = max([*headers, Path(__file__).stat().st_mtime])

        def compile_source(source: str) -> str:
            target = Path(self.build_temp) / Path(source).with_suffix(".o")
            if target.exists() and target.stat().st_mtime > max(
                newest, Path(source).stat().st_mtime
            ):
                return str(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            path = Path(source).stem.removeprefix("path_")
            is_path = source.startswith(str(KERNELS))
            flags = [*FLAGS, "-fPIC", *(PATH_FLAGS[path] if is_path else [])]
            defines = [f"-D{name}={value}" for name, value in ext.define_macros]
            folders = [*ext.include_dirs, *self.include_dirs]
            includes = [part for folder in folders for part in ("-isystem", folder)]
            command = [*_compiler().split(), *flags, *defines, *includes]
            self.announce(" ".join([*command, source]), level=2)
            subprocess.run([*command, "-c", source, "-o", str(target)], check=True)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_source, ext.sources))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        folders = [f"-L{folder}" for folder in ext.library_dirs]
        link = ["-shared", *objects, *folders, "-Wl,--no-as-needed", "-ltorch_cpu"]
        subprocess.run([*_compiler().split(), *link, "-o", str(library)], check=True)


def _extensions() -> list[setuptools.Extension]:
    choice = _build_choice()
    if choice == "none":
        return []
    if problem := _compiler_problem():
        if choice == "cpu":
            raise SystemExit(f"GHOSTED_FAST_BUILD=cpu: {problem}; install a C++17 compiler")
        warnings.warn(f"{problem}; ghosted_fast will run on plain torch, slowly", stacklevel=2)
        return []
    import pybind11
    import torch
    from torch.utils import cpp_extension

    def quoted(text: str) -> str:
        return '"' + text.replace('"', "'") + '"'

    sources = [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    sources += [KERNELS / f"path_{name}.cpp" for name in PATH_FLAGS]
    return [
        setuptools.Extension(
            "ghosted_fast._C",
            [str(source) for source in sources],
            include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
            library_dirs=cpp_extension.library_paths(),
            define_macros=[
                *([("GHOSTED_FAST_X86", "1")] if IS_X86 else []),
                ("GHOSTED_FAST_BUILD_KIND", quoted("cpu")),
                ("GHOSTED_FAST_COMPILER", quoted(_compiler_version())),
                ("GHOSTED_FAST_TORCH_VERSION", quoted(torch.__version__)),
                ("GHOSTED_FAST_COMPILED_PATHS", quoted(" ".join(PATH_FLAGS))),
            ],
        )
    ]


if __name__ == "__main__":
    setuptools.setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildExtension})
