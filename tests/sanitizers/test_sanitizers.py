"""The kernels of every path under AddressSanitizer and UBSan: tails, strides, odd sizes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.cpu_paths import ROOT, TABLES, import_setup

from ghosted_fast.measure.system import cpu_features

pytestmark = pytest.mark.slow

COMPILER = os.environ.get("CXX") or shutil.which("g++") or "c++"
FLAGS = ["-g", "-O1", "-std=c++17", "-fno-math-errno", "-Wno-psabi"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EMULATION = ["-DGHOSTED_FAST_EMULATED_TILES", f"-I{ROOT / 'tests' / 'amx_emulation'}"]
NEEDED = {
    "amx": set(),  # its tiles are emulated, the rest is compiled for what there is
    "avx512bf16": {"avx512_bf16", "avx512bw"},
    "avx512": {"avx512f", "avx512bw"},
    "avx2": {"avx2", "fma", "f16c"},
    "neonbf16": {"bf16"},
    "neon": set(),
    "portable": set(),
}


@pytest.fixture(scope="module")
def path_flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    source = tmp_path_factory.mktemp("probe") / "probe.cpp"
    source.write_text("int main() {}\n")
    command = [*COMPILER.split(), *FLAGS, str(source), "-o", str(source.with_suffix(""))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no C++ compiler: {error}")
    if done.returncode:
        pytest.skip(f"the compiler has no sanitizers: {done.stderr}")
    flags: dict[str, list[str]] = import_setup().PATH_FLAGS
    return flags


@pytest.mark.parametrize("path", TABLES)
def test_kernels(path: str, path_flags: dict[str, list[str]], tmp_path: Path) -> None:
    if path not in path_flags or not NEEDED[path] <= set(cpu_features()):
        pytest.skip(f"this processor cannot run the path {path}")
    program = tmp_path / path
    kernels = ROOT / "csrc" / "cpu"
    with_avx512 = path != "amx" or NEEDED["avx512"] <= set(cpu_features())
    flags = path_flags[path] if with_avx512 else path_flags["portable"]
    command = [*COMPILER.split(), *FLAGS, *flags, f"-DPATH_TABLE={TABLES[path]}"]
    if path == "amx":
        command += EMULATION
    command += [f"-I{kernels}", str(Path(__file__).with_name("kernels.cpp"))]
    command += [str(kernels / "kernels" / f"path_{path}.cpp")]
    command += [str(kernels / "token_order.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"path_{path}.cpp does not compile: {done.stderr}"
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout == f"{path}: 0 failures\n"
