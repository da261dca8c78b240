"""Operands whose memory is not what their shape says, or is somebody else's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError
from ghosted_fast.ops import ghost_apply, ghost_solve, gram_update
from ghosted_fast.ops.compiled import extension
from ghosted_fast.ops.operands import GramOperands

SIZE = 32


def emptied(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def halved(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(tensor.nbytes // 2)
    return tensor


def operands(name: str) -> dict[str, Tensor]:
    square, rows = torch.ones(SIZE, SIZE), torch.ones(4, SIZE)
    double = torch.eye(SIZE, dtype=torch.float64)
    first = {"first_state": torch.ones(SIZE), "is_first": torch.zeros(4, dtype=torch.bool)}
    return {
        "apply": {"x": rows, "weight": square, "bias": torch.ones(SIZE), **first},
        "apply int8": {"x": rows, "weight": square.to(torch.int8), "scale": torch.ones(SIZE)},
        "solve": {"gram": double, "cross": torch.ones(SIZE, SIZE, dtype=torch.float64)},
        "gram": {
            "x": rows,
            "y": rows.clone(),
            "token_weight": torch.ones(4),
            "gram": double.clone(),
            "cross": double.clone(),
            "moments": torch.zeros(3, SIZE, dtype=torch.float64),
        },
    }[name]


CASES = [
    (kind, name) for kind in ("apply", "apply int8", "solve", "gram") for name in operands(kind)
]


def run(kind: str, given: dict[str, Any]) -> None:
    if kind == "solve":
        ghost_solve(**given, damping=0.0)
    elif kind == "gram":
        gram_update(**given)
    else:
        ghost_apply(**given)


@pytest.mark.parametrize("damage", [emptied, halved])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_tensors_without_all_of_their_memory(kind: str, name: str, damage: Any) -> None:
    given = operands(kind)
    run(kind, given)
    given[name] = damage(given[name])
    with pytest.raises(ArgumentError, match=rf"expected {name} with all of its numbers in memory"):
        run(kind, given)


@pytest.mark.skipif(extension() is None, reason="the extension is not built")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_compiled_operators_look_themselves(kind: str, name: str) -> None:
    given = operands(kind)
    given[name] = emptied(given[name])
    operator = {"solve": "ghost_solve", "gram": "gram_update"}.get(kind, "ghost_apply")
    call = getattr(torch.ops.ghosted_fast, operator)
    names = ("x", "weight", "bias", "scale", None, "first_state", "is_first")
    arguments = [given.get(str(part)) for part in names]
    if kind == "solve":
        arguments = [given["gram"], given["cross"], 0.0]
    elif kind == "gram":
        sums = [given[part] for part in ("gram", "cross", "moments")]
        arguments = [given["x"], given["y"], given["token_weight"], None, False, *sums]
    with pytest.raises(RuntimeError, match=rf"expected {name} with all of its numbers in memory"):
        call(*arguments)


def test_strides_that_reach_too_far() -> None:
    x = torch.ones(64)
    for strides in ((1 << 62, 1), (33, 1)):
        far = torch.empty(0).set_(x.untyped_storage(), 0, (1, 32), strides)
        gram_update(far, gram=torch.zeros(32, 32, dtype=torch.float64))
        x.untyped_storage().resize_(x.nbytes)
    bad = torch.ones(4, 32)
    bad.untyped_storage().resize_(4 * 32 * 4 - 4)
    with pytest.raises(ArgumentError, match="a storage of 508 bytes"):
        gram_update(bad, gram=torch.zeros(32, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        (lambda x, memory: {"gram": memory[:1024].view(32, 32),
                            "cross": memory[1000:2024].view(32, 32)}, "cross .* that of gram"),
        (lambda x, memory: {"gram": memory[:1024].view(32, 32),
                            "moments": memory[:96].view(3, 32)}, "moments .* that of gram"),
        (lambda x, memory: {"gram": x.view(torch.float64).flatten()[:1024].view(32, 32)},
         "gram .* that of x"),
    ],
)  # fmt: skip
def test_sums_in_memory_that_is_not_their_own(sums: Any, message: str) -> None:
    memory = torch.zeros(4096, dtype=torch.float64)
    x = torch.ones(64, 32)
    given = {"x": x, "y": x.clone(), **sums(x, memory)}
    with pytest.raises(ArgumentError, match=rf"expected {message}"):
        gram_update(**given)
    with pytest.raises(ArgumentError, match=rf"expected {message}"):
        GramOperands(**given).check()
