"""The cases: right results pass their gates, wrong ones end the run, and the work is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ghosted_fast import ops
from ghosted_fast.bench_ops import divergence, ghost_apply, ghost_solve, gram_update, runner
from ghosted_fast.bench_ops.cases import OURS, Case, Plan, Setting, Variant
from ghosted_fast.bench_ops.rotation import InTurn, bytes_past_the_cache
from ghosted_fast.errors import ArgumentError, BackendError, GateError
from ghosted_fast.ops import packing
from ghosted_fast.ops.backends import native
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics import gram
from ghosted_fast.statistics.interval import new_statistics, update_statistics
from ghosted_fast.statistics.sample import Sample
from ghosted_fast.text.batches import Batch

CPU = torch.device("cpu")
SMALL = Setting(CPU, rotated_bytes=1 << 16, compiled=False)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def all_plans() -> Iterator[Plan]:
    for dtype in (BF16, FP16, FP32):
        yield from gram_update.plans(64, 300, dtype)
        yield from divergence.plans(200, 5, dtype)
        for rows in (1, 40):
            yield from ghost_apply.plans(72, rows, dtype)
    yield from ghost_apply.plans(72, 1, BF16, cached=True)
    yield from ghost_solve.plans(48)


@pytest.mark.parametrize("plan", list(all_plans()), ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gates_pass_and_every_variant_runs(plan: Plan, backend: str) -> None:
    torch.manual_seed(0)
    setting = dataclasses.replace(SMALL, backend=backend)
    case = plan.make(setting)
    errors, left_out = runner.check_gates(plan, case, threads=2)
    assert set(errors) == {variant.name for variant in case.variants} and not left_out
    assert case.variants[0].name == OURS and case.variants[0].is_ours
    assert not all(variant.is_ours for variant in case.variants)
    for variant in case.variants:
        variant.run()


def divergence_with_gradient(dtype: torch.dtype) -> Iterator[Plan]:
    plans = divergence.plans(48, 3, dtype)
    return (plan for plan in plans if plan.shape.startswith("KL+gradient"))


def slightly_off(*logits: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    value, gradient = ops.divergence(*logits, gradient=True)
    assert gradient is not None
    return 1.00001 * value, gradient


def with_a_rough_gradient(*logits: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    value, gradient = ops.divergence(*logits, gradient=True)
    assert gradient is not None
    return value, gradient.bfloat16().float()


@pytest.mark.parametrize(
    ("module", "name", "fault", "plan"),
    [
        (ghost_apply, "ghost_apply", lambda x, *_, **__: x.clone(), ghost_apply.plans(64, 3, BF16)),
        (
            gram_update,
            "gram_update",
            lambda x, *_, gram, **__: gram.add_(1.0001 * (x.double().mT @ x.double()).tril()),
            gram_update.plans(64, 30, BF16),
        ),
        (
            ghost_solve,
            "ghost_solve",
            lambda gram, cross, *_, **__: (torch.linalg.solve(gram, cross).float().double(), [0]),
            ghost_solve.plans(48),
        ),
        (
            divergence,
            "divergence",
            lambda p, q, **_: (1.0001 * torch.ones(len(p), dtype=torch.float64), None),
            divergence.plans(48, 3, BF16),
        ),
        (divergence, "divergence", slightly_off, divergence_with_gradient(BF16)),
        (divergence, "divergence", with_a_rough_gradient, divergence_with_gradient(FP32)),
    ],
    ids=["ghost_apply", "gram_update", "ghost_solve", "divergence", "its value", "its gradient"],
)
def test_a_wrong_result_of_ours_ends_the_run(
    module: Any,
    name: str,
    fault: Callable[..., Any],
    plan: Iterator[Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(GateError, match=rf"{name} .*{OURS}: expected the result of fp64, got"):
        runner.run_plans([next(plan)], SMALL, runner.Effort(seconds=0.01))


def test_a_wrong_result_of_a_rival_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_update, "_product", lambda a, b: 1.001 * (a.mT @ b))
    with pytest.raises(GateError, match=r"torch fp32: expected the result of fp64"):
        runner.run_plans(list(gram_update.plans(64, 30, FP32)), SMALL, runner.Effort(seconds=0.01))


def plan_of(*variants: Variant) -> Plan:
    case = Case(1e6, {"fp32": 1e6}, list(variants))
    return Plan("op", "s", 8, 1, FP32, lambda _: case, lambda _: "", lambda _: 0)


def test_a_fault_that_one_thread_alone_has_is_found() -> None:
    def error() -> float:
        return 5.0 if torch.get_num_threads() == 1 else 0.5

    torch.set_num_threads(2)
    plan = plan_of(Variant(OURS, lambda: None, error, is_ours=True))
    with pytest.raises(GateError, match="one thread: expected"):
        runner.check_gates(plan, plan.make(SMALL), threads=2)


def test_nan_is_no_right_result() -> None:
    plan = plan_of(Variant(OURS, lambda: None, lambda: float("nan"), is_ours=True))
    with pytest.raises(GateError):
        runner.check_gates(plan, plan.make(SMALL))


def test_a_rival_that_does_not_run_here_is_left_out_and_ours_is_not() -> None:
    def absent() -> float:
        raise NotImplementedError("no such product\nand more")

    ours = Variant(OURS, lambda: None, lambda: 0.1, is_ours=True)
    plan = plan_of(ours, Variant("rival", lambda: None, absent))
    errors, left_out = runner.check_gates(plan, plan.make(SMALL))
    assert errors == {OURS: 0.1} and left_out == {"rival": "no such product"}
    plan = plan_of(Variant(OURS, lambda: None, absent, is_ours=True))
    with pytest.raises(NotImplementedError):
        runner.check_gates(plan, plan.make(SMALL))


@pytest.mark.parametrize("in_tiles", [False, True])
def test_bytes_and_flops(in_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_update, "_multiplies_in_tiles", lambda: in_tiles)
    forms = list(gram_update.plans(64, 300, BF16))
    found = [plan.make(SMALL) for plan in forms]
    rows, square = 300 * 64 * 2.0, 64 * 64
    assert [case.num_bytes for case in found] == [
        rows + 8 * square,
        2 * rows + 16 * square,
        2 * rows + 24 * square,
        2 * rows + 24 * square,
    ]
    work = 300.0 * square
    assert [case.flops for case in found] == [
        {"bf16": work},
        {"bf16": 2 * work},
        {"bf16": 3 * work},
        {"bf16": 7 * work} if in_tiles else {"bf16": work, "fp32": 2 * work},
    ]
    (plan,) = ghost_apply.plans(64, 3, FP32)
    case = plan.make(SMALL)
    assert (case.num_bytes, case.flops) == (4 * square + 8 * 3 * 64, {"fp32": 6.0 * square})
    int8 = next(variant for variant in case.variants if variant.name == f"{OURS} int8")
    assert int8.num_bytes == square + 8 * 3 * 64


def test_the_form_of_the_fit_is_what_calibration_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.Tensor, ...]] = []
    settings: list[dict[str, Any]] = []

    def note(x: torch.Tensor, y: torch.Tensor, token_weight: torch.Tensor, **given: Any) -> None:
        calls.append((x, y, token_weight))
        settings.append({name: given[name] for name in ("norm_eps", "delta")})
        assert given["gram"] is not None and given["cross"] is not None

    for module in (gram_update, gram):
        monkeypatch.setattr(module, "gram_update", note)
    *_, plan = gram_update.plans(64, 300, BF16)
    plan.make(SMALL).variants[0].run()
    x, y = calls[0][0][None], calls[0][1][None]
    # Without the floor of capped weights, which only makes some of them smaller.
    options = GhostOptions(token_weight="inverse_energy", first_state="off")
    item = new_statistics((1, 2), options, 64, settings[0]["norm_eps"])
    batch = Batch(*torch.ones(2, 1, 300, dtype=torch.int64))
    update_statistics(item, Sample((1, 2), x, y, batch, 0, 0), options)
    assert settings[0] == settings[1] and len(calls) == 2
    assert all(torch.equal(one, other) for one, other in zip(*calls, strict=True))


def test_on_cuda_every_product_of_parts_counts() -> None:
    cuda = torch.device("cuda")
    for dtype, normed, products in ((BF16, False, 1), (BF16, True, 3), (FP16, True, 5)):
        assert gram_update._products(dtype, normed, cuda) == products
    assert gram_update._products(FP32, False, cuda) == gram_update._products(FP32, True, cuda) == 6
    assert gram_update._products(FP32, True, CPU) is None
    work = 300.0 * 64**2
    assert gram_update._flops(64, 300, FP16, "G+C", True, 5) == {"bf16": 5 * 3 * work}
    assert gram_update._flops(64, 300, BF16, "G+C", True, 3) == {"bf16": (1 + 3 * 2) * work}


def test_weights_of_few_rows_leave_the_cache_and_those_of_many_need_not() -> None:
    def copies(rows: int, cached: bool = False) -> set[int]:
        (plan,) = ghost_apply.plans(64, rows, FP32, cached)
        return {variant.copies for variant in plan.make(SMALL).variants if variant.copies > 1}

    assert copies(1) == copies(96) == {5, 17}  # of 16 KiB in fp32, of 4 KiB in int8
    assert copies(97) == copies(1, cached=True) == set()


@pytest.mark.parametrize(("total", "count"), [(1, 1), (4096, 1), (4097, 5), (5 * 4096, 5)])
def test_weights_come_in_turn(total: int, count: int) -> None:
    turn = InTurn(torch.zeros(1024), total)
    assert turn.count == count
    pages = [turn().data_ptr() for _ in range(2 * count)]
    assert len(set(pages)) == count and pages[:count] == pages[count:]


def test_a_packed_weight_is_timed_where_ghosts_pack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(setting: Setting, dtype: torch.dtype = BF16) -> list[str]:
        (plan,) = ghost_apply.plans(64, 1, dtype)
        return [variant.name for variant in plan.make(setting).variants]

    packed = f"{OURS} not packed"
    if packing.extension() is not None:
        assert packed in names(SMALL)
        with monkeypatch.context() as patch:
            patch.setattr(ghost_apply, "is_faster_packed", lambda *_: False)
            assert packed not in names(SMALL) and f"{OURS} packed" in names(SMALL)
    assert packed not in names(SMALL, FP16)
    assert packed not in names(dataclasses.replace(SMALL, backend="reference"))
    monkeypatch.setattr(ghost_apply, "extension", lambda: None)
    assert packed not in names(SMALL)


def test_each_variant_says_what_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(plan: Plan, setting: Setting = SMALL) -> dict[str, str]:
        variants = plan.make(setting).variants
        assert {item.backend for item in variants if not item.is_ours} == {"torch"}
        return {item.name: item.backend for item in variants if item.is_ours}

    is_there = packing.extension() is not None
    for plan in all_plans():
        assert set(named(plan).values()) == {"native" if is_there else "torch"}
        reference = dataclasses.replace(SMALL, backend="reference")
        assert set(named(plan, reference).values()) == {"reference"}
    if is_there:
        monkeypatch.setattr(native.crossings, "is_left_to_torch", lambda x, w, others: w.dim() == 2)
        (plan,) = ghost_apply.plans(64, 3, BF16)
        assert named(plan)[OURS] == "native" and named(plan)[f"{OURS} not packed"] == "torch"


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"backend": "nonsense"}, BackendError, "expected a backend of auto, native"),
        ({"backend": "triton"}, BackendError, "backend 'triton': "),
        ({"device": torch.device("cuda")}, ArgumentError, "expected a CUDA device"),
        ({"rotated_bytes": 1 << 60}, ArgumentError, "GiB of free memory"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_cannot_run_is_refused_before_the_work(
    setting: dict[str, Any], error: type[Exception], message: str
) -> None:
    plans = list(ghost_apply.plans(64, 1, BF16))
    with pytest.raises(error, match=message):
        runner.check_plans(plans, dataclasses.replace(SMALL, **setting))


def test_a_case_that_the_backend_does_not_serve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = runner.BACKENDS["reference"]
    monkeypatch.setattr(reference, "refusal", lambda operator, operands: f"no {operator}")
    plans = [*ghost_solve.plans(64), *gram_update.plans(64, 8, BF16)]
    for plan in plans:
        with pytest.raises(
            BackendError, match=f"does not serve {plan.operator} .*no {plan.operator}"
        ):
            runner.check_plans([plan], dataclasses.replace(SMALL, backend="reference"))


def test_no_case_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="expected a case at least"):
        runner.check_plans([], SMALL)


def test_bytes_that_do_not_fit_a_cache() -> None:
    assert 64 << 20 <= bytes_past_the_cache(CPU) <= 256 << 20
    assert bytes_past_the_cache(torch.device("meta")) == 256 << 20
