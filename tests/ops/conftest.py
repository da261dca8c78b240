"""The operators under test: the compiled one on every path of this processor, and the reference."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch

from ghosted_fast.ops import compiled

ARM_PATHS = ("neonbf16", "neon")
X86_PATHS = ("amx", "avx512bf16", "avx512", "avx2")
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
PATHS = (*(ARM_PATHS if IS_ARM else X86_PATHS), "portable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for every test, in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture(params=[*PATHS, "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend; for "native", with one path of the processor in use."""
    if request.param == "reference":
        yield "reference"
        return
    module = compiled.extension()
    if module is None:
        pytest.skip(f"the extension is absent: {compiled.absence_reason()}")
    if request.param not in module.cpu_paths():
        pytest.skip(f"this processor cannot run the path {request.param}")
    module.set_cpu_path(request.param)
    yield "native"
    module.set_cpu_path("auto")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch on two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Tensors that are allocated through torch hold NaN until they are written."""
    with torch.random.fork_rng(devices=[]):
        torch.use_deterministic_algorithms(True)
        before = torch.utils.deterministic.fill_uninitialized_memory
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)
