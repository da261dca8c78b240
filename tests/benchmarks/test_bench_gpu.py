"""The GPU benchmark's cases, run on the processor: their gates pass, and stop at a wrong result."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from support.benchmark_module import load_benchmark


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("bench_gpu", monkeypatch)
    monkeypatch.setattr(module, "ROTATED_BYTES", 1 << 16)
    torch.manual_seed(0)
    return module


@pytest.mark.slow
def test_gates_pass_and_every_variant_runs(bench: ModuleType) -> None:
    import _harness

    for case in (
        bench.gram_case(64, 300, "cpu"),
        bench.apply_case(64, 3, "cpu"),
        bench.solve_case(48, "cpu"),
    ):
        _harness.check_gates(case)
        assert any(v.is_ours for v in case.variants) and not all(v.is_ours for v in case.variants)
        for variant in case.variants:
            if variant.name != "torch.compile":
                variant.run(0)


@pytest.mark.slow
def test_a_wrong_result_is_not_reported(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import _harness

    case = bench.apply_case(64, 3, "cpu")
    monkeypatch.setattr(bench, "ghost_apply", lambda x, *_: x)
    with pytest.raises(_harness.GateError, match="ghost_apply d=64 rows=3"):
        _harness.check_gates(case)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench_gpu"])
    with pytest.raises(SystemExit, match="expected a CUDA device"):
        bench.main_on_gpu("gpu", "", bench.make_cases)
