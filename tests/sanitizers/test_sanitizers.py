"""The kernels of every path under AddressSanitizer and UBSan: tails, strides, odd sizes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from ghosted_fast.measure.system import cpu_features

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "c++"
FLAGS = ["-g", "-O1", "-std=c++17", "-fno-math-errno", "-Wno-psabi"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TABLES = {
    "amx": "kAmxKernels",
    "avx512bf16": "kAvx512Bf16Kernels",
    "avx512": "kAvx512Kernels",
    "avx2": "kAvx2Kernels",
    "neonbf16": "kNeonBf16Kernels",
    "neon": "kNeonKernels",
    "portable": "kPortableKernels",
}
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


def import_setup() -> ModuleType:
    """Import setup.py, which knows the flags of each path, without building."""
    spec = importlib.util.spec_from_file_location("ghosted_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout == f"{path}: 0 failures\n"
