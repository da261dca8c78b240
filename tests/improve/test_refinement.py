"""Refinement: it helps, repeats itself, goes on after it was killed, and keeps the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ghosted_fast.errors import ArgumentError, CalibrationError, CheckpointError
from ghosted_fast.facts import RefinementFacts
from ghosted_fast.improve import refinement
from ghosted_fast.improve.divergence import Divergence
from ghosted_fast.improve.refinement import RefinementOptions, refine_ghosts
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model
from ghosted_fast.text.batches import iterate_batches


def text(count: int = 12) -> list[torch.Tensor]:
    return [random_tokens(8, 24, seed) for seed in range(count)]


def fitted(dense: Any, **options: Any) -> Any:
    return ghost_model(
        dense,
        text(),
        removed=[1, 3],
        options=GhostOptions(**options),
        run=RunOptions(corrections=0),
    )[0]


def weights(model: Any) -> list[torch.Tensor]:
    found = [m for m in model.modules() if isinstance(m, GhostLinear)]
    return [p.detach().clone() for ghost in found for p in ghost.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refine(ghosted: Any, dense: Any, **options: Any) -> RefinementFacts:
    steps, state = options.pop("steps", 24), options.pop("state", None)
    given = RefinementOptions(**{"tokens": 480, "step_size": 0.02, **options})
    return refine_ghosts(ghosted, dense, text(), steps, options=given, state=state)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"bias": True, "first_state": "on"}])
def test_ghosts_become_better_and_nothing_else_changes(options: dict[str, Any]) -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense, **options)
    others = {k: v.clone() for k, v in ghosted.state_dict().items() if "ghost" not in k}
    states = [p for p in weights(ghosted) if p.dim() == 1][-1:] if options else []
    facts = refine(ghosted, dense)
    assert facts.after < 0.99 * facts.before and facts.steps == 24 and facts.best_step > 0
    found = ghosted.state_dict()
    assert all(torch.equal(found[name], value) for name, value in others.items())
    if options:
        assert same(states, [p for p in weights(ghosted) if p.dim() == 1][-1:])


@pytest.mark.slow
def test_operators_of_any_origin_can_be_refined() -> None:
    dense = tiny_model("gpt2")
    patch = GhostLinear(32)
    with torch.no_grad():
        patch.weight.copy_(torch.diag(torch.linspace(-0.2, 0.2, 32)))
    facts = refine(remove_layers(dense, [2, 3], [patch]), dense)
    assert facts.after < 0.99 * facts.before


def test_first_step_is_adam_in_white_coordinates() -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense)
    divergence = Divergence(ghosted, dense)
    slopes = divergence.gradients(iterate_batches(text(1)))
    run = refinement._start("", divergence, 0.0)
    refinement._take_step(run, slopes, 0.5)
    for slope, old, new in zip(slopes, divergence.parameters64(), run.point, strict=True):
        gram = slope.equations().gram
        gram = (gram.tril() + gram.tril(-1).mT) / slope.num_tokens
        gram += 0.1 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
        root = torch.linalg.cholesky(gram) * 32**0.5
        white = slope.gradient(192)[0] @ torch.linalg.inv(root).mT
        assert relative_rms((old - new) @ root, 0.5 * white.sign()) < 1e-6
    # A step of 1 in all coordinates changes the output by its own rms, but for the damping.
    (slope, *_), change = slopes, (run.point[0] - divergence.parameters64()[0]) / 0.5
    share = (slope.relative_energy(change, None) / slope.num_tokens) ** 0.5
    assert 0.3 < share <= 1.0


@pytest.mark.slow
def test_same_seed_same_bits_other_seed_others() -> None:
    dense = tiny_model("llama")
    found = []
    for seed in (0, 0, 1):
        ghosted = fitted(dense)
        refine(ghosted, dense, seed=seed)
        found.append(weights(ghosted))
    assert same(found[0], found[1]) and not same(found[0], found[2])


@pytest.mark.slow
def test_killed_run_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, path = tiny_model("llama"), tmp_path / "new" / "state"
    whole = fitted(dense)
    expected = refine(whole, dense)
    real, calls = refinement._take_step, [0]

    def step(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 11:
            raise KeyboardInterrupt
        real(*arguments)

    ghosted = fitted(dense)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(refinement, "_take_step", step)
        refine(ghosted, dense, state=path)
    assert [item.name for item in path.parent.iterdir()] == ["state"]
    resumed = fitted(dense)
    taken: list[int] = []
    monkeypatch.setattr(
        refinement, "_take_step", lambda run, *rest: (taken.append(run.step), real(run, *rest))
    )
    facts = refine(resumed, dense, state=path)
    assert taken == list(range(8, 24))
    assert same(weights(whole), weights(resumed))
    assert facts.after == expected.after and facts.best_step == expected.best_step
    again = fitted(dense)
    refine(again, dense, state=path)
    assert len(taken) == 16 and same(weights(whole), weights(again))


def test_text_comes_in_random_order_epoch_after_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    train = [next(iterate_batches([torch.tensor([[number]])])) for number in range(10)]

    def numbers(start: int, count: int, seed: int = 0) -> list[int]:
        chosen = refinement._sequences(train, start, count, seed)
        return [int(batch.input_ids) for batch in chosen]

    first, second = numbers(0, 10), numbers(10, 10)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert numbers(7, 6) == [*first[7:], *second[:3]]
    assert numbers(0, 10, seed=1) != first
    real, starts = refinement._sequences, []
    monkeypatch.setattr(
        refinement, "_sequences", lambda text, *rest: (starts.append(rest), real(text, *rest))[1]
    )
    dense = tiny_model("llama")
    refine(fitted(dense), dense, steps=3, seed=5)
    assert starts == [(0, 20, 5), (20, 20, 5), (40, 20, 5)]


@pytest.mark.slow
def test_worse_steps_are_not_kept_and_end_the_run() -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense)
    old = weights(ghosted)
    facts = refine(ghosted, dense, step_size=30.0, steps=64)
    assert facts.steps == 16 and facts.best_step == 0 and facts.after == facts.before
    assert same(old, weights(ghosted))


@pytest.mark.slow
def test_state_of_another_run(tmp_path: Path) -> None:
    dense, path = tiny_model("llama"), tmp_path / "state"
    refine(fitted(dense), dense, steps=8, state=path)
    with pytest.raises(ArgumentError, match="holds another refinement"):
        refine(fitted(dense), dense, steps=16, state=path)
    with pytest.raises(ArgumentError, match="holds another refinement"):
        refine(fitted(dense, bias=True), dense, steps=8, state=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not the state of a refinement"):
        refine(fitted(dense), dense, steps=8, state=path)


def test_arguments() -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense)
    with pytest.raises(ArgumentError, match="step_size > 0"):
        refine(ghosted, dense, step_size=0.0)
    with pytest.raises(ArgumentError, match="expected steps"):
        refine(ghosted, dense, steps=0)
    with pytest.raises(CalibrationError, match="held-out tokens"):
        refine_ghosts(ghosted, dense, text(1))


@pytest.mark.slow
def test_pipeline_refines_after_the_corrections(tmp_path: Path) -> None:
    dense, path = tiny_model("llama"), tmp_path / "state"
    _, report = ghost_model(
        dense, text(), removed=[1, 3], run=RunOptions(corrections=1, refine=8, refine_state=path)
    )
    assert report.refinement is not None and path.is_file()
    assert report.refinement.before == report.corrections[-1].after
    assert report.to_dict()["refinement"]["steps"] == 8
    assert report.seconds["refine"] > 0
