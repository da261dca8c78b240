"""Tokens per second: what is run and in which order, not how fast this machine is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from ghosted_fast.errors import ArgumentError
from ghosted_fast.measure import speed
from ghosted_fast.measure.speed import Run, compare_throughput, throughput
from ghosted_fast.measure.throughput import SpeedSettings, Throughput, run_both_phases
from ghosted_fast.testing import tiny_model


class FakeRun:
    """A model whose seconds are known."""

    order: ClassVar[list[tuple[str, str]]] = []
    prefill_s, step_s = 2.0, 0.5

    def __init__(self, model: Any, settings: SpeedSettings, seed: int = 0) -> None:
        self.name, self.facts = model.name, speed.ModelFacts(weight_bytes=7)

    def warm_up(self) -> float:
        return self.step_s

    def prefill(self) -> float:
        FakeRun.order.append((self.name, "prefill"))
        return self.prefill_s / (2 if self.name == "b" else 1)

    def decode(self, steps: int) -> float:
        FakeRun.order.append((self.name, f"decode {steps}"))
        self.facts.step_seconds += [self.step_s] * steps
        return self.step_s / (4 if self.name == "b" else 1)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    models = {name: tiny_model("llama", 2) for name in "ab"}
    for name, model in models.items():
        model.name = name
    FakeRun.order = []
    monkeypatch.setattr(speed, "Run", FakeRun)
    yield models


def test_throughput_is_the_tokens_over_the_seconds(fakes: dict[str, Any]) -> None:
    found = compare_throughput(fakes, 16, 8, batch_size=3)
    assert found["a"].prefill_tokens_per_s.value == pytest.approx(3 * 16 / 2.0)
    assert found["a"].decode_tokens_per_s.value == pytest.approx(3 / 0.5)
    assert found["a"].first_token_ms.value == pytest.approx(2e3)
    assert found["b"].relative["a"]["prefill"].value == pytest.approx(2.0)
    assert found["b"].relative["a"]["decode"].value == pytest.approx(4.0)
    assert found["a"].relative["b"]["decode"].value == pytest.approx(0.25)
    assert found["a"].token_ms == {"p50": 500.0, "p95": 500.0, "p99": 500.0}
    assert (found["a"].ended, found["a"].weight_bytes) == ("precise", 7)
    record = json.loads(json.dumps(found["b"].to_dict()))
    assert Throughput.from_dict(record) == found["b"]


def test_both_phases_go_forwards_and_backwards(fakes: dict[str, Any]) -> None:
    """Two prefills of each, then pairs of samples out of the same caches, in mirrored orders."""
    compare_throughput(fakes, 16, 8)
    prefills = "".join(name for name, what in FakeRun.order[:4])
    assert prefills in ("abba", "baab") and {what for _, what in FakeRun.order[:4]} == {"prefill"}
    samples = list(itertools.takewhile(lambda item: item[1] != "prefill", FakeRun.order[4:]))
    assert {what for _, what in samples} == {"decode 2"}  # four samples of eight tokens
    assert len(samples) == 8
    for pair in (samples[:4], samples[4:]):
        assert "".join(name for name, _ in pair) in ("abba", "baab")


def test_a_phase_that_is_known_is_not_measured_on(
    fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here steps are noisy and prefills are not: after their last look these only fill caches."""
    noise = itertools.cycle([1.0, 1.5, 2.0, 1.2, 0.8])
    monkeypatch.setattr(FakeRun, "decode", lambda self, steps: next(noise))
    found = compare_throughput(fakes, 16, 2, seconds=0.5, precision=0.001)
    assert found["b"].ended == "time"
    assert found["b"].prefill_tokens_per_s.samples == 22  # two looks, at 8 and 11 pairs
    assert found["b"].decode_tokens_per_s.samples > 22


def test_both_phases_get_half_of_the_time(
    fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair of decoding rounds takes six times as long as one of prefills."""
    noise, phases = itertools.cycle([1.0, 1.5, 2.0, 1.2, 0.8]), []

    def seconds_of_pair(rounds: Any, sample: Any) -> float:
        rounds.run_pair(sample)
        phases.append(FakeRun.order[-1][1])
        if len(phases) == 100:
            raise KeyboardInterrupt
        return 1.0 if phases[-1] == "prefill" else 6.0

    def noisy(what: str) -> Any:
        return lambda self, *steps: FakeRun.order.append((self.name, what)) or next(noise)

    monkeypatch.setattr(speed, "_seconds_of_pair", seconds_of_pair)
    monkeypatch.setattr(FakeRun, "prefill", noisy("prefill"))
    monkeypatch.setattr(FakeRun, "decode", noisy("decode"))
    compare_throughput(fakes, 16, 8, precision=0.001)
    assert phases[:16] == ["prefill", *2 * ["decode"], *11 * ["prefill"], *2 * ["decode"]]
    assert 6 * phases.count("decode") == pytest.approx(phases.count("prefill"), abs=12)


def test_what_is_known_when_interrupted(
    fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def decode(self: FakeRun, steps: int) -> float:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(FakeRun, "decode", decode)
    found = compare_throughput(fakes, 16, 8)
    assert found["a"].ended == "interrupted"
    assert found["a"].decode_tokens_per_s.samples == 2
    calls = itertools.count(5)
    with pytest.raises(KeyboardInterrupt):  # nothing is known yet
        compare_throughput(fakes, 16, 8)
    calls = itertools.count()
    with pytest.raises(KeyboardInterrupt):
        compare_throughput(fakes, 16, 8, interruptible=False)


def test_engines_give_both_phases_at_once() -> None:
    clock = itertools.count()
    order: list[str] = []

    def sample(name: str) -> tuple[float, float]:
        order.append(name)
        return (4.0, 0.5) if name == "a" else (2.0, 0.1)

    prefill, decode, ended = run_both_phases(
        ["a", "b"], sample, SpeedSettings(8, 4), lambda: float(next(clock))
    )
    assert ended == "precise"
    assert prefill.speedup("b").value == pytest.approx(2.0)
    assert decode.speedup("b").value == pytest.approx(5.0)
    assert "".join(order[:4]) in ("abba", "baab")
    _, decode, ended = run_both_phases(
        ["a"], sample, SpeedSettings(8, 4, seconds=2.0), lambda: float(next(clock))
    )
    assert (ended, decode.pairs) == ("time", 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_decoding_is_greedy_with_a_cache(family: str) -> None:
    """The calls: the whole prompt at once, then one token at a time, each the likeliest."""
    model = tiny_model(family, 2).eval()
    run = Run(model, SpeedSettings(10, 6, batch_size=2))
    with torch.inference_mode():
        run.prefill()
        calls: list[torch.Tensor] = []

        def record(_: Any, __: Any, keywords: dict[str, Any]) -> None:
            calls.append(keywords["input_ids"])

        model.register_forward_pre_hook(record, with_kwargs=True)
        run.prefill()
        for _ in range(2):
            assert run.decode(3) > 0
    prompt, *steps = calls
    assert list(prompt.shape) == [2, 10]
    assert [list(step.shape) for step in steps] == [[2, 1]] * 6
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(torch.cat(steps, 1), generated[:, 10:])
    assert len(run.facts.step_seconds) == 6


def test_bytes_of_weights_and_cache() -> None:
    model = tiny_model("llama", 2).eval()
    run = Run(model, SpeedSettings(10, 6, batch_size=2))
    with torch.inference_mode():
        run.prefill()
        run.decode(4)
    config = model.config
    row = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    assert run.facts.cache_bytes == 2 * 2 * (10 + 4) * row * 4
    weights = {p.data_ptr(): p.nbytes for p in (*model.parameters(), *model.buffers())}
    assert run.facts.weight_bytes == sum(weights.values())


def test_joules_are_shared_by_the_tokens_of_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading is 3 J above the last; a counter that began anew counts for nothing."""
    readings = iter([10.0, 13.0, 16.0, 19.0, 22.0, 1.0])
    monkeypatch.setattr(speed, "joules", lambda device: next(readings))
    run = Run(tiny_model("llama", 2).eval(), SpeedSettings(4, 6, batch_size=2))
    with torch.inference_mode():
        run.prefill()
        for _ in range(3):
            run.decode(2)
    assert (run.facts.joules, run.facts.joule_tokens) == (6.0, 2 * 2 * 2)


def test_short_samples_leave_no_step_out() -> None:
    """From four steps on the first is a warm-up."""
    run = Run(tiny_model("llama", 2).eval(), SpeedSettings(4, 8))
    with torch.inference_mode():
        run.warm_up()
        for steps, timed in ((1, 1), (3, 4), (4, 7), (6, 12)):
            run.decode(steps)
            assert len(run.facts.step_seconds) == timed


@pytest.mark.parametrize(
    ("step", "new_tokens", "wanted"),
    [(1.0, 64, (32, 2)), (0.022, 64, (10, 6)), (1e-4, 64, (2, 32)), (1.0, 2, (2, 1))],
)
def test_samples_of_a_cache(step: float, new_tokens: int, wanted: tuple[int, int]) -> None:
    assert speed._samples_of_a_cache(step, new_tokens) == wanted


def test_models_keep_their_mode() -> None:
    model = tiny_model("llama", 2)
    model.train()
    throughput(model, 4, 2, seconds=0.05)
    assert model.training


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("prompt_length", 0, ">= 1"), ("new_tokens", 1, ">= 2"), ("batch_size", 0, ">= 1"),
     ("precision", 0, "above 0"), ("seconds", -1, "above 0")],
)  # fmt: skip
def test_numbers_that_are_too_small(name: str, value: int, least: str) -> None:
    with pytest.raises(ArgumentError, match=f"expected {name} {least}, got {value}"):
        throughput(tiny_model("llama", 2), **{name: value})


def test_too_many_positions() -> None:
    with pytest.raises(ArgumentError, match=r"<= 128, the positions of model, got 100 \+ 40"):
        throughput(tiny_model("llama", 2), 100, 40)


def test_no_model() -> None:
    with pytest.raises(ArgumentError, match="expected a model to measure, got none"):
        compare_throughput({})
