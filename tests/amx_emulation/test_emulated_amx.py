"""The kernels of the path "amx" on emulated tiles, under the sanitizers, and on real ones.

The program `driver.cpp` compares with fp64 and looks whether tasks release their tiles. It is
compiled twice where the processor has AMX: both must print the same hashes of all results.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from ghosted_fast.measure.system import cpu_features

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
CPU = ROOT / "csrc" / "cpu"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "c++"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-math-errno", "-Wno-psabi", "-DGHOSTED_FAST_X86=1"]
INCLUDES = [f"-I{CPU}", f"-I{ROOT / 'tests' / 'sanitizers'}", f"-I{HERE}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


def has_avx512() -> bool:
    return {"avx512f", "avx512bw"} <= set(cpu_features())


def build(name: str, flags: list[str]) -> Path:
    """Return the compiled program, made once for the same sources and flags."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"the path amx is for x86-64, this is {platform.machine()}")
    if shutil.which(COMPILER.split()[0]) is None:
        pytest.skip("no C++ compiler")
    sources = [HERE / "driver.cpp", CPU / "token_order.cpp", CPU / "amx_support.cpp"]
    digest = hashlib.sha256(repr((COMPILER, flags)).encode())
    headers = [*CPU.parent.glob("*.h"), *CPU.rglob("*.h"), *CPU.rglob("path_amx.cpp")]
    headers += [*HERE.glob("*.h"), *(ROOT / "tests" / "sanitizers").glob("*.h")]
    for path in sorted([*sources, *headers, Path(__file__)]):
        digest.update(path.read_bytes())
    made = ROOT / "build" / "amx_emulation" / digest.hexdigest()[:16] / name
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        command = [*COMPILER.split(), *FLAGS, *flags, *(AVX512 if has_avx512() else [])]
        command += [*INCLUDES, *map(str, sources), "-o", f"{folder}/{name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"driver.cpp does not compile: {done.stderr}"
        (Path(folder) / name).replace(made)
    return made


@pytest.fixture(scope="module")
def emulated() -> str:
    """What the program prints with emulated tiles."""
    program = build("emulated", ["-DGHOSTED_FAST_EMULATED_TILES", *SANITIZERS])
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_values_and_memory(emulated: str) -> None:
    lines = emulated.splitlines()
    assert lines[-1] == "0 failures"
    kinds = {line.split()[0] for line in lines[:-1]}
    assert kinds == {"tdpbf16ps", "tdpbssd", "gram", "apply"}


def test_the_processor_gives_the_same_bits(emulated: str) -> None:
    if not {"amx_tile", "amx_bf16", "amx_int8"} <= set(cpu_features()) or not has_avx512():
        pytest.skip("this processor has no AMX")
    done = subprocess.run([build("real", [])], capture_output=True, text=True, check=False)
    if done.stdout == "no AMX here\n":
        pytest.skip("this process may not use the tiles")
    assert done.returncode == 0, done.stdout
    assert done.stdout == emulated
