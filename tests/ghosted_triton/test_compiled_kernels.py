"""The kernels compiled for GPUs that are not here: registers, memory, instructions.

Every configuration of the tuning tables is compiled at hidden size 4096, with and without what a
ghost may carry. A budget that is exceeded costs speed on every GPU of that architecture, and no
test of values would see it.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from ghosted_triton.checkout import use_kernels_of_this_checkout
from ghosted_triton.compiled_kernels import Launch, MachineCode, compiled, launches_of

use_kernels_of_this_checkout()

from ghosted_fast.kernels import _tuning
from ghosted_fast.kernels import ghost_apply as ghost
from ghosted_fast.kernels import gram_update as gram

pytestmark = pytest.mark.slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP64 = torch.int8, torch.float64
SIZE = 4096
CAPABILITIES = (80, 90, 100)
# Bytes of shared memory a program may have.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
TENSOR_CORE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "triton_cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))


def ghost_call(
    capability: int,
    num_tokens: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    normed: bool,
    everything: bool,
    size: int = SIZE,
) -> list[Launch]:
    x = torch.empty(num_tokens, size, dtype=dtype)
    weight = torch.empty(size, size, dtype=weight_dtype)
    scale = torch.empty(size) if weight.element_size() == 1 else None
    config = _tuning.apply_config(
        _tuning.table_key(capability), num_tokens, size, weight.element_size(), normed
    )
    extras = (None, None)
    if everything:
        extras = (torch.empty(size, dtype=dtype), torch.zeros(num_tokens, dtype=torch.bool))
    call = partial(
        ghost.ghost_apply,
        x,
        weight,
        torch.empty(size, dtype=dtype) if everything else None,
        scale,
        1e-6 if normed else None,
        *extras,
        config=config,
    )
    return launches_of(call)


def assert_frugal(code: MachineCode, capability: int, registers: int, name: str) -> None:
    assert code.spills == 0 and code.stack == 0, f"{name}: {code.spills} spills, {code.stack} stack"
    assert code.registers <= registers, f"{name}: {code.registers} registers"
    assert code.shared <= SHARED[capability], f"{name}: {code.shared} bytes of shared memory"


def assert_wide(code: MachineCode, name: str, narrower: str = "") -> None:
    """All accesses of global memory are of 128 bits, but for loads that match `narrower`."""
    pattern = r"(LDG|STG|LDGSTS)\b(?!.*\.128)"
    rest = {op: n for op, n in code.opcodes.items() if re.match(pattern, op)}
    rest = {op: n for op, n in rest.items() if not (narrower and re.match(narrower, op))}
    assert not rest, f"{name}: {rest}"
    assert code.count(r"(LDG|LDGSTS)\b.*\.128") and code.count(r"STG\b.*\.128"), name


# x, weight, normed, with bias and first state. The first has nothing but wide accesses.
GHOSTS = [
    (BF16, BF16, False, False),
    (FP16, FP16, True, True),
    (BF16, INT8, True, True),
    (BF16, INT8, True, False),
]


@pytest.mark.parametrize(
    ("capability", "num_tokens"),
    [(capability, rows) for capability in CAPABILITIES for rows in (1, 16, 512)] + [(80, 48)],
)
def test_ghost_apply(capability: int, num_tokens: int) -> None:
    for x, w, normed, everything in GHOSTS if num_tokens in (1, 512) else GHOSTS[::3]:
        launches = ghost_call(capability, num_tokens, x, w, normed, everything)
        # What follows the product does not depend on the weight: twice is enough.
        for launch in launches if w == x else launches[:1]:
            code = compiled(launch, capability)
            name = f"{launch.name} {x} {w} normed={normed} everything={everything}"
            is_product = launch.name in ("ghost_partials_kernel", "ghost_gemm_kernel")
            decode = num_tokens <= 16
            assert_frugal(code, capability, 128 if decode else 200, name)
            if is_product:
                core = "HMMA" if decode else TENSOR_CORE[capability]
                assert code.count(core), f"{name}: no {core} in {code.opcodes}"
            if not (everything or normed or w == INT8):
                assert_wide(code, name)
            # What is 8 bits wide in memory is the mark of first tokens, one byte per row.
            narrow = set(code.narrow_accesses())
            allowed = {"LDG.E.U8"} if everything else set()
            assert narrow <= allowed, f"{name}: {narrow}"


GRAMS = [
    (BF16, BF16, False, False),
    (BF16, BF16, True, False),
    (BF16, FP32, True, True),
    (FP16, FP16, True, True),
    (FP32, FP32, True, True),
]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("x", "y", "weighted", "delta"), GRAMS, ids=str)
def test_gram_update(
    capability: int, x: torch.dtype, y: torch.dtype, weighted: bool, delta: bool
) -> None:
    rows, targets = torch.empty(1024, SIZE, dtype=x), torch.empty(1024, SIZE, dtype=y)
    sums, factor = torch.empty(SIZE, SIZE, dtype=FP64), torch.empty(1024) if weighted else None
    table = _tuning.table_key(capability)
    gram_exact = x != FP32 and (not weighted or x == BF16)
    cross_exact = gram_exact and x == y and not delta
    # A weight that is a power of two, and one that is not.
    for g, c in {(gram_exact, cross_exact), (False, False)} if weighted else {(True, True)}:
        config = _tuning.gram_config(table, g and c, gram._X_PARTS[x])
        call = partial(
            gram.launch_gram_update,
            rows,
            targets,
            factor,
            factor,
            torch.empty(4, dtype=torch.int32),
            delta,
            sums,
            sums,
            g,
            c,
            config,
        )
        (launch,) = launches_of(call)
        elements = launch.grid[0] * config.block_rows * config.block_columns
        assert elements <= 0.77 * 2 * SIZE * SIZE
        code = compiled(launch, capability)
        name = f"{launch.name} {x} {y} exact={g, c} {config}"
        assert_frugal(code, capability, 200, name)
        assert code.count(TENSOR_CORE[capability]), f"{name}: {code.opcodes}"
        # The tokens' factors and the three problems are single words.
        assert_wide(code, name, r"(LDG|LDGSTS)\.E(\.64)?$" if weighted else r"LDG\.E$")


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("table", _tuning.ARCHITECTURES)
def test_grid_of_the_triangle(table: int, exact: bool) -> None:
    """G alone: at most 0.53 of the elements of a whole product."""
    x, sums = torch.empty(16, SIZE, dtype=BF16), torch.empty(SIZE, SIZE, dtype=FP64)
    config = _tuning.gram_config(table, exact, 1)
    problems = torch.empty(4, dtype=torch.int32)
    rest = (None, None, None, problems, False, sums, None, exact, exact, config)
    (launch,) = launches_of(partial(gram.launch_gram_update, x, *rest))
    elements = launch.grid[0] * config.block_rows * config.block_columns
    assert 0.5 * SIZE * SIZE < elements <= 0.53 * SIZE * SIZE


def test_small_shared_memory() -> None:
    """sm_86 and sm_89 have 99 KB: their table must fit."""
    for num_tokens in (1, 48, 512):
        for x, w, normed, everything in GHOSTS[:1] if num_tokens < 512 else GHOSTS[:3:2]:
            launch = ghost_call(86, num_tokens, x, w, normed, everything)[0]
            assert_frugal(compiled(launch, 86), 86, 200, f"{launch.name} {x} {w}")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rows_of_gram_update(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels around the tiles: no spills either, and whole rows in 128 bits."""
    monkeypatch.setattr(gram, "_reads_back", lambda x: False)
    x, moments = torch.empty(64, SIZE, dtype=BF16), torch.empty(3, SIZE, dtype=FP64)
    call = partial(gram.gram_update, x, x, torch.ones(64), 1e-6, True, None, None, moments)
    inspect, sums = launches_of(call)
    for launch in (inspect, sums):
        code = compiled(launch, capability)
        assert_frugal(code, capability, 200, launch.name)
        assert not code.narrow_accesses()
    assert compiled(inspect, capability).count(r"LDG\b.*\.128")


def test_a_call_launches_what_a_capture_after_it_will(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_can_be_captured", lambda x: True)
    monkeypatch.setattr(gram, "_prepared", set())
    x, sums = torch.empty(64, 128, dtype=BF16), torch.empty(2, 128, 128, dtype=FP64)
    call = partial(gram.gram_update, x, x, torch.ones(64), None, False, *sums, None)

    def constants(launch: Launch) -> tuple[object, ...]:
        parameters = {item.name for item in launch.kernel.params if item.is_constexpr}
        chosen = {name: launch.arguments[name] for name in parameters}
        return launch.name, sorted(chosen.items()), sorted(launch.options.items())

    first, again = launches_of(call), launches_of(call)
    monkeypatch.setattr(gram, "_reads_back", lambda x: False)
    in_capture = launches_of(call)
    assert [launch.name for launch in first] == [
        "gram_inspect_kernel",
        "gram_tiles_kernel",
        "gram_tiles_kernel",
    ]
    assert len(again) == len(in_capture) == 2
    assert [constants(launch) for launch in in_capture] == [
        constants(first[0]),
        constants(first[2]),
    ]
    assert constants(first[1]) != constants(first[2])
    assert not first[2].arguments["problems"].any()  # token 0 is bad: nothing is added
    # Triton compiles a kernel of its own for weights that begin between multiples of 16 bytes.
    monkeypatch.setattr(gram, "_reads_back", lambda x: True)
    apart = partial(gram.gram_update, x, x, torch.ones(65)[1:], None, False, *sums, None)
    assert [len(launches_of(apart)) for _ in range(2)] == [3, 2]


def test_the_reading_finds_what_it_looks_for() -> None:
    """A kernel that must spill and load bytes, so that the zeros above mean something."""
    x, weight = torch.empty(512, SIZE, dtype=FP16), torch.empty(SIZE, SIZE, dtype=FP16)
    config = _tuning.ApplyConfig(128, 256, 64, 4, 2)
    (launch,) = launches_of(partial(ghost.ghost_apply, x, weight, config=config))
    assert compiled(launch, 80).spills > 0
    # Rows that begin one element off a multiple of 16 bytes.
    odd = torch.empty(512 * SIZE + 1, dtype=FP16)[1:].view(512, SIZE)
    (launch,) = launches_of(partial(ghost.ghost_apply, odd, weight, config=config))
    assert compiled(launch, 80).narrow_accesses()
