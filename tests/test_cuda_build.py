"""A CUDA build on a machine without a GPU: it builds, loads, and serves CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cuda_toolchain import find_nvcc

ROOT = Path(__file__).parents[1]
# Kept between runs: the objects are only compiled again where their sources changed.
FOLDER = ROOT / "build" / "cuda_build_test"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_nvcc(), reason="no nvcc; `make cuda` installs that of PyPI"),
]

LOAD = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("ghosted_fast._C", {library!r})
sys.modules["ghosted_fast._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from ghosted_fast.ops import backend_status, compiled, gram_update
assert compiled.extension() is module
"""


def run(*command: str, **environment: str) -> str:
    hidden = {
        "CUDA_VISIBLE_DEVICES": "",
        "CUDACXX": find_nvcc(),
        "GHOSTED_FAST_NATIVE": "1",
    }
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **hidden, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library() -> Path:
    """The extension, built for CUDA with no GPU in sight."""
    folders = ["--build-temp", str(FOLDER / "temp"), "--build-lib", str(FOLDER / "lib")]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *folders]
    run(*command, GHOSTED_FAST_BUILD="cuda")
    (found,) = (FOLDER / "lib" / "ghosted_fast").glob("_C.*")
    return found


def run_with(library: Path, code: str) -> str:
    return run(sys.executable, "-c", LOAD.format(library=str(library)) + code)


def test_tells_how_it_was_built(library: Path) -> None:
    code = """
print(module.build_info())
print([text for name, _, text in backend_status() if name == "native"])
"""
    text = run_with(library, code)
    assert "'kind': 'cuda'" in text
    assert "sm_80 sm_90 sm_100" in text and "release" in text
    assert "CUDA C++ for gram_update, but torch finds no CUDA device" in text


def test_cpu_tensors_take_the_cpu_path(library: Path) -> None:
    code = """
x, y = torch.randn(50, 24), torch.randn(50, 24)
sums = torch.zeros(2, 24, 24, dtype=torch.float64)
gram_update(x, y, gram=sums[0], cross=sums[1], backend="native")
exact = torch.stack([(x.double().mT @ x.double()).tril(), x.double().mT @ y.double()])
print(float((sums - exact).norm() / exact.norm()))
"""
    assert float(run_with(library, code)) < 1e-6


def test_the_cuda_kernel_is_registered(library: Path) -> None:
    code = """
for key in ("CPU", "CUDA"):
    print(torch._C._dispatch_has_kernel_for_dispatch_key("ghosted_fast::gram_update", key))
print(torch._C._dispatch_has_kernel_for_dispatch_key("ghosted_fast::ghost_solve", "CUDA"))
"""
    assert run_with(library, code).split() == ["True", "True", "False"]


def test_machine_code_of_every_architecture_is_inside(library: Path) -> None:
    content = library.read_bytes()
    assert b"gram_tiles" in content
    # The runtime is linked in: nothing of CUDA is needed to load the extension.
    needed = run("readelf", "-d", str(library))
    assert "libtorch_cpu" in needed and "libcuda" not in needed


def test_doctor_shows_the_build(library: Path) -> None:
    code = """
from ghosted_fast.cli.doctor import doctor
result = doctor()
print(result.data["build"]["kind"], result.data["build"]["cuda"])
"""
    assert run_with(library, code).startswith("cuda Cuda compilation tools")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_runs_on_a_gpu(library: Path) -> None:
    code = """
x = torch.randn(300, 136, device="cuda", dtype=torch.bfloat16)
gram = torch.zeros(136, 136, device="cuda", dtype=torch.float64)
gram_update(x, gram=gram, backend="native")
exact = (x.double().mT @ x.double()).tril()
print(float((gram - exact).norm() / exact.norm()))
"""
    text = run(
        sys.executable,
        "-c",
        LOAD.format(library=str(library)) + code,
        CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    )
    assert float(text) < 1e-6
