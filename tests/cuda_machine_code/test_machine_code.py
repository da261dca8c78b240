"""What the compiler made of csrc/cuda, read from the machine code of three architectures."""

from __future__ import annotations

import re

import pytest
from cuda_machine_code.machine_code import Kernel, compile_kernels
from support.cuda_toolchain import missing_tools

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_tools()), reason=missing_tools()),
]
ARCHITECTURES = (80, 90, 100)
# By parts of the mangled names: the type of the elements, whether there are several products, and
# whether the sums are compensated.
TILE_KERNELS = {
    "bf16": "gram_tilesILNS_5DtypeE0ELb0ELb0E",
    "bf16 parts": "gram_tilesILNS_5DtypeE0ELb1ELb0E",
    "fp16": "gram_tilesILNS_5DtypeE1ELb0ELb0E",
    "bf16 compensated": "gram_tilesILNS_5DtypeE0ELb0ELb1E",
    "bf16 parts compensated": "gram_tilesILNS_5DtypeE0ELb1ELb1E",
    "fp16 compensated": "gram_tilesILNS_5DtypeE1ELb0ELb1E",
}
TOKEN_KERNELS = ("check_tokens", "split_operand", "add_moments")
SYSTEM_SHARED_BYTES = 1024


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda number: f"sm_{number}")
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Kernel]:
    found = compile_kernels(request.param, tmp_path_factory.mktemp("cubin"))
    assert len(found) == len(TILE_KERNELS) + len(TOKEN_KERNELS)
    return found


def kernel_named(kernels: dict[str, Kernel], part: str) -> Kernel:
    (kernel,) = (kernel for name, kernel in kernels.items() if part in name)
    return kernel


def test_nothing_is_spilled(kernels: dict[str, Kernel]) -> None:
    for name, kernel in kernels.items():
        assert kernel.stack_bytes == kernel.local_bytes == 0, name
        assert not kernel.names(r"LDL.*|STL.*"), name
        assert kernel.shared_bytes <= SYSTEM_SHARED_BYTES, name  # all shared memory is dynamic


def test_registers(kernels: dict[str, Kernel]) -> None:
    # A block of 256 threads is alone on its multiprocessor with 129 registers or with 255: for the
    # compensated sums, which are seldom wanted, the limit is that nothing is spilled.
    compensated = {part for kind, part in TILE_KERNELS.items() if "compensated" in kind}
    for name, kernel in kernels.items():
        limit = 255 if any(part in name for part in compensated) else 200
        assert kernel.registers <= limit, name


@pytest.mark.parametrize("kind", TILE_KERNELS)
def test_tensor_cores_and_matrix_loads(kernels: dict[str, Kernel], kind: str) -> None:
    kernel = kernel_named(kernels, TILE_KERNELS[kind])
    suffix = "" if "fp16" in kind else r"\.BF16"
    steps = 1 if "parts" in kind else 2  # of 16 tokens, unrolled
    assert kernel.count(rf"HMMA\.16816\.F32{suffix}") == 16 * steps
    assert kernel.count(r"LDSM\.16\.MT88\.4") == 6 * steps
    assert kernel.names("HMMA.*") == kernel.names(rf"HMMA\.16816\.F32{suffix}")
    assert kernel.names("LDSM.*") == {"LDSM.16.MT88.4"}


@pytest.mark.parametrize("kind", TILE_KERNELS)
def test_copies_to_shared_memory_are_asynchronous_and_wide(
    kernels: dict[str, Kernel], kind: str
) -> None:
    kernel = kernel_named(kernels, TILE_KERNELS[kind])
    assert kernel.count("LDGSTS.*") >= 4 * 3  # two rows of each side, three places in the code
    assert kernel.count("LDGSTS.*") == kernel.count(r"LDGSTS\..*\.128")
    assert not kernel.names("STS.*")
    # A predicate decides between a copy and zeros.
    assert all(re.search(r", !?P\d$", operands) for operands in kernel.operands("LDGSTS"))
    # Two groups before the loop and one in it, and a wait that leaves one under way.
    assert kernel.count("LDGDEPBAR.*") == 3
    assert set(kernel.operands(r"DEPBAR\.LE")) == {"SB0, 0x1"}
    assert kernel.count(r"BAR\.SYNC.*") == 1


@pytest.mark.parametrize("kind", TILE_KERNELS)
def test_sums_are_read_modified_and_written_in_fp64(kernels: dict[str, Kernel], kind: str) -> None:
    kernel = kernel_named(kernels, TILE_KERNELS[kind])
    pairs = 4 * 4 * 2  # of neighbouring sums per thread
    assert kernel.count(r"LDG\.E\.128.*") == kernel.count(r"STG\.E\.128.*") == pairs
    # 64-bit accesses are the ends of rows on the diagonal; the rest are whole pairs.
    assert kernel.names("STG.*") <= {"STG.E.128", "STG.E.64"}
    assert kernel.count("DADD.*|DFMA.*") >= 2 * pairs
    assert not kernel.names("(RED|ATOM).*")


def test_global_memory_is_never_touched_by_halves_of_a_word(kernels: dict[str, Kernel]) -> None:
    for name, kernel in kernels.items():
        narrow = kernel.names(r"(LDG|STG|LDGSTS|LD|ST)\..*[US](8|16)\b.*")
        assert not narrow, f"{name}: {narrow}"


def test_moments_ask_for_several_tokens_before_they_add_the_first(
    kernels: dict[str, Kernel],
) -> None:
    """Else each addition waits for memory: 256 times for 8192 tokens."""
    listing = kernel_named(kernels, "add_moments").listing
    longest = asked = 0
    for name in re.findall(r"\b(LDG\.E\.128|D(?:ADD|FMA|MUL))\b", listing):
        asked = asked + 1 if name.startswith("LDG") else 0
        longest = max(longest, asked)
    assert longest >= 4 * 2  # x and y; of fp32 rows the second half may come apart


def test_rows_are_read_and_parts_written_16_bytes_at_a_time(kernels: dict[str, Kernel]) -> None:
    split = kernel_named(kernels, "split_operand")
    assert split.names("STG.*") and not split.names(r"STG(?!.*\.128).*")
    for part in TOKEN_KERNELS:
        kernel = kernel_named(kernels, part)
        assert kernel.count(r"LDG\..*\.128.*") >= 3, part  # 16-bit rows, and fp32 rows in two
