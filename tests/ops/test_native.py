"""Finding the extension, choosing a path, and falling back."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from ghosted_fast.errors import BackendError
from ghosted_fast.ops import backend_status, compiled, ghost_apply
from ghosted_fast.ops.backends import triton

needs_extension = pytest.mark.skipif(
    compiled.extension() is None, reason=f"the extension is absent: {compiled.absence_reason()}"
)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@needs_extension
def test_build_info_and_paths() -> None:
    module = compiled.extension()
    assert module is not None
    assert set(module.build_info()) == {"kind", "compiler", "torch", "paths", "cuda"}
    paths = module.cpu_paths()
    assert paths[-1] == "portable" and set(paths) <= set(module.build_info()["paths"].split())
    for path in paths:
        module.set_cpu_path(path)
        assert module.cpu_path() == path
    module.set_cpu_path("auto")
    assert module.cpu_path() == paths[0]
    with pytest.raises(ValueError, match=r"expected one of auto, .*, got sse9"):
        module.set_cpu_path("sse9")


# Has the kernel refuse arch_prctl(ARCH_REQ_XCOMP_PERM), as an old one or a container's filter does.
REFUSE_TILES = """
import ctypes, struct, sys
instructions = [
    (0x20, 0, 0, 0), (0x15, 0, 3, 158),  # the system call's number is arch_prctl's
    (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023),  # its first argument
    (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000),  # EPERM; allowed
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 6, ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.addressof(program), 0, 0):
    print("no filter")
    sys.exit()
"""


@needs_extension
@pytest.mark.slow
def test_a_kernel_that_refuses_tiles_leaves_the_other_paths() -> None:
    module = compiled.extension()
    assert module is not None
    if "amx" not in module.cpu_paths():
        pytest.skip("this processor cannot run the path amx")
    output = run_python(
        REFUSE_TILES + "from ghosted_fast.ops import compiled, backend_status\n"
        "import torch; from ghosted_fast.ops import ghost_apply\n"
        "print(compiled.extension().cpu_paths())\n"
        "print(ghost_apply(torch.ones(1, 4).bfloat16(), torch.eye(4).bfloat16()).sum())\n"
        "print(dict((name, text) for name, _, text in backend_status())['native'])\n"
    )
    if "no filter" in output:
        pytest.skip("this system lets no process filter its calls")
    assert str([path for path in module.cpu_paths() if path != "amx"]) in output
    assert "tensor(8., dtype=torch.bfloat16)" in output
    reason = "the kernel refuses the memory for its tiles: Operation not permitted"
    assert f"path {module.cpu_paths()[1]} of " in output
    assert f"; the processor's AMX is not used: {reason}" in output


class ArmExtension:
    """Answers as the extension does on an Arm processor without bf16 products."""

    @staticmethod
    def cpu_path() -> str:
        return "neon"

    @staticmethod
    def cpu_paths() -> list[str]:
        return ["neon", "portable"]

    @staticmethod
    def amx_problem() -> str:
        return ""

    @staticmethod
    def neonbf16_problem() -> str:
        return "the processor or the system has no bf16 products (FEAT_BF16)"

    @staticmethod
    def build_info() -> dict[str, str]:
        return {"kind": "cpu"}


def test_an_arm_path_that_is_not_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "extension", ArmExtension)
    (text,) = (text for name, _, text in backend_status() if name == "native")
    assert text == (
        "C++ for the CPU, path neon of neon, portable; the path neonbf16 is not used: "
        "the processor or the system has no bf16 products (FEAT_BF16)"
    )


def test_status_names_every_backend() -> None:
    status = {name: (available, text) for name, available, text in backend_status()}
    assert set(status) == {"native", "reference", "triton"}
    assert status["native"][0] == (compiled.extension() is not None)
    assert status["reference"][0]
    assert status["triton"][0] == (not triton.absence_reason())
    assert all(text for _, text in status.values())


def test_importing_the_package_loads_no_extension() -> None:
    code = "import sys, ghosted_fast; print('ghosted_fast._C' in sys.modules)"
    assert run_python(code).strip().endswith("False")


APPLY = (
    "import torch; from ghosted_fast.ops import *\n"
    "x = torch.ones(1, 4)\n"
    "for _ in range(3): print(ghost_apply(x, torch.eye(4)).sum())\n"
)


@pytest.mark.slow
def test_switched_off_runs_plain_torch_without_a_warning() -> None:
    output = run_python(APPLY, GHOSTED_FAST_NATIVE="0")
    assert output.count("tensor(8.)") == 3 and "RuntimeWarning" not in output


@pytest.mark.slow
def test_absent_extension_is_warned_about_once_with_the_reason() -> None:
    # None in sys.modules makes the import fail as it does where nothing was built.
    output = run_python(
        "import sys; sys.modules['ghosted_fast._C'] = None\n" + APPLY, GHOSTED_FAST_NATIVE="1"
    )
    assert output.count("tensor(8.)") == 3
    assert output.count("RuntimeWarning: ghosted_fast runs on plain torch: ") == 1
    assert "pip install --no-build-isolation" in output


@pytest.mark.slow
def test_named_backend_never_falls_back() -> None:
    code = (
        "import torch; from ghosted_fast.ops import ghost_apply\n"
        "from ghosted_fast.errors import BackendError\n"
        "try: ghost_apply(torch.ones(1, 4), torch.eye(4), backend='native')\n"
        "except BackendError as error: print(error)\n"
    )
    assert "backend 'native': GHOSTED_FAST_NATIVE=0 is set" in run_python(
        code, GHOSTED_FAST_NATIVE="0"
    )


@needs_extension
def test_native_refuses_what_it_cannot_do() -> None:
    x, weight = torch.ones(1, 4), torch.eye(4)
    with pytest.raises(BackendError, match="expected tensors on the CPU, got meta"):
        ghost_apply(x.to("meta"), weight.to("meta"), backend="native")
    with pytest.raises(BackendError, match="expected inputs without gradients"):
        ghost_apply(x, weight.requires_grad_(), backend="native")


@needs_extension
@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("ghost_apply", (torch.ones(1, 4), torch.ones(3, 4), *[None] * 5), "weight of shape"),
        ("ghost_solve", (torch.eye(4), torch.ones(4, 1), 0.1), "gram in Double, got Float"),
        ("gram_update", (torch.ones(4), *[None] * 3, False, *[None] * 3), "x of shape"),
    ],
)
def test_the_compiled_operator_checks_for_itself(
    operator: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"{operator}: expected {message}"):
        getattr(torch.ops.ghosted_fast, operator).default(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_other_devices_run_plain_torch() -> None:
    x, weight = torch.randn(3, 16, device="cuda"), torch.randn(16, 16, device="cuda")
    y = ghost_apply(x, weight)
    assert torch.allclose(y, x + x @ weight.mT, rtol=1e-4, atol=1e-4)
