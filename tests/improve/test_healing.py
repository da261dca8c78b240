"""Healing: it helps, repeats itself, goes on after it was killed, keeps the best and the dense."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_models import tiny_causal
from support.healed_models import SMALL, fitted, healed, same, text, visible, weights
from torch import Tensor, nn

from ghosted_fast.errors import (
    ArgumentError,
    CheckpointError,
    UnsupportedModelError,
)
from ghosted_fast.improve import healing
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.structure import share_copy
from ghosted_fast.options import HealOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import random_tokens, tiny_model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(random_tokens(2, 12, 77)).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_predictions_become_better_and_the_dense_model_stays(family: str) -> None:
    dense = visible(tiny_model(family))
    before, smaller = weights(dense), fitted(dense)
    old = weights(smaller)
    facts = healed(smaller, dense)
    assert facts.after < 0.97 * facts.before and facts.best_tokens > 0
    assert facts.ended == "tokens" and facts.maps > 0 and facts.ghosts == 1
    assert facts.curve[0].divergence == facts.before and facts.curve[0].tokens == 0
    assert facts.curve[-1].tokens == facts.tokens == 40 * 8 * 24 - 768
    assert same(before, weights(dense))
    # What is no linear map of a layer and no ghost is as it was.
    new = weights(smaller)
    changed = {name for name in new if not torch.equal(old[name], new[name])}
    assert changed and all(new[name].dim() == 2 for name in changed if "ghost" not in name)
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in changed)
    # The report's figure is that of the model as it is now.
    again = healed(smaller, dense, learning_rate=1e-12, tokens=400)
    assert again.before == pytest.approx(facts.after, rel=1e-4)


@pytest.mark.slow
def test_a_pruned_model_is_healed_too() -> None:
    dense = tiny_model("llama")
    smaller = prune_model(dense, [2, 3])
    facts = healed(smaller, dense)
    assert facts.ghosts == 0 and facts.maps == 4 * 7 and facts.after < 0.97 * facts.before
    given = prune_model(dense, [2, 3])
    assert not torch.equal(logits(given), logits(smaller))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_weights(family: str) -> None:
    dense = visible(tiny_model(family))
    before, smaller = weights(dense), fitted(dense)
    old = weights(smaller)
    facts = healed(smaller, dense, rank="full", learning_rate=2e-3)
    assert facts.after < 0.97 * facts.before and same(before, weights(dense))
    new = weights(smaller)
    changed = {name for name in new if not torch.equal(old[name], new[name])}
    # Of each kept layer all maps, and beside them the ghost alone: no factors are left behind.
    assert len(changed) == facts.maps + 1 and facts.ghosts == 1 and new.keys() == old.keys()
    assert facts.trained_parameters == sum(new[name].numel() for name in changed)
    again = healed(smaller, dense, learning_rate=1e-12, tokens=400)
    assert again.before == pytest.approx(facts.after, rel=1e-4)


@pytest.mark.parametrize("rank", [4, "full"])
def test_a_copy_that_shares_the_weights_stays(rank: Any) -> None:
    dense = tiny_model("llama")
    smaller = fitted(dense, removed=(1, 3), bias=True)
    given = share_copy(smaller)
    before = weights(given)
    assert healed(smaller, dense, tokens=1600, rank=rank, learning_rate=2e-3).best_tokens > 0
    assert same(before, weights(given)) and not same(before, weights(smaller))


@pytest.mark.slow
def test_rank_0_trains_the_ghosts_alone() -> None:
    dense = tiny_model("llama")
    smaller = fitted(dense, removed=(1, 3), bias=True, first_state="on")
    old = weights(smaller)
    facts = healed(smaller, dense, rank=0)
    new = weights(smaller)
    changed = {name for name in new if not torch.equal(old[name], new[name])}
    assert facts.after < facts.before and facts.maps == 0 and facts.ghosts == 2
    assert facts.trained_parameters == 2 * (32 * 32 + 32)
    assert {name.rpartition("ghost.")[2] for name in changed} == {"weight", "bias"}
    with pytest.raises(UnsupportedModelError, match="nothing that healing could train"):
        healed(prune_model(dense, [1]), dense, rank=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_copies_of_ghosts_are_forgotten(dtype: torch.dtype) -> None:
    dense = tiny_model("llama", dtype=dtype)
    smaller = fitted(dense)
    logits(smaller)  # packs
    healed(smaller, dense)
    (ghost,) = (module for module in smaller.modules() if isinstance(module, GhostLinear))
    assert ghost._packed is None
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        found, wanted = ghost(x), share_copy(ghost)(x)
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_same_seed_same_bits_other_seed_others() -> None:
    dense = tiny_model("llama")
    found = []
    for seed in (0, 0, 1):
        smaller = fitted(dense)
        healed(smaller, dense, seed=seed)
        found.append(weights(smaller))
    assert same(found[0], found[1]) and not same(found[0], found[2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    dense, path = tiny_model("llama", dtype=dtype), tmp_path / "new" / "state"
    whole = fitted(dense)
    expected = healed(whole, dense)
    real, taken = healing.take_step, [0]

    def step(*arguments: Any) -> None:
        taken[0] += 1
        if taken[0] == 14:  # after the judgement half-way, which the state is written at
            raise KeyboardInterrupt
        real(*arguments)

    killed = fitted(dense)
    untouched = weights(killed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(healing, "take_step", step)
        healed(killed, dense, state=path)
    assert same(untouched, weights(killed))
    assert [item.name for item in path.parent.iterdir()] == ["state"]
    steps: list[int] = []
    monkeypatch.setattr(
        healing, "take_step", lambda run, *rest: (steps.append(run.step), real(run, *rest))
    )
    resumed = fitted(dense)
    facts = healed(resumed, dense, state=path)
    assert steps[0] > 0 and steps == list(range(steps[0], 18))
    assert same(weights(whole), weights(resumed)) and facts.curve == expected.curve
    again = fitted(dense)
    healed(again, dense, state=path)
    assert steps[-1] == 17 and len(steps) == 18 - steps[0]
    assert same(weights(whole), weights(again))


@pytest.mark.slow
def test_worse_steps_end_the_run_and_leave_the_model_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = tiny_model("llama")
    smaller = fitted(dense)
    old = weights(smaller)
    facts = healed(smaller, dense, learning_rate=30.0, state=tmp_path / "state")
    assert facts.ended == "worse" and facts.best_tokens == 0 and facts.after == facts.before
    assert facts.tokens < 40 * 8 * 24 // 2 and same(old, weights(smaller))
    kept, theirs = decoder_layers(smaller)[0], decoder_layers(dense)[0]
    assert kept.mlp.up_proj.weight.data_ptr() == theirs.mlp.up_proj.weight.data_ptr()
    assert "smaller learning_rate than 30" in caplog.text
    again = healed(smaller, dense, learning_rate=30.0, state=tmp_path / "state")
    assert again.ended == "worse" and again.tokens == facts.tokens


@pytest.mark.slow
@pytest.mark.parametrize("steps_before", [0, 9])
def test_nan_gradients_end_the_run_with_the_best_state(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, steps_before: int
) -> None:
    dense = tiny_model("llama")
    smaller, calls = fitted(dense), [0]
    old = weights(smaller)
    real = healing._Healing._gradients

    def gradients(self: Any, chosen: Any) -> list[Tensor]:
        found = real(self, chosen)
        calls[0] += 1
        if calls[0] > steps_before:
            found[-1][0, 0] = math.nan
        return found

    monkeypatch.setattr(healing._Healing, "_gradients", gradients)
    facts = healed(smaller, dense)
    assert facts.ended == "nan" and calls[0] == steps_before + 1
    assert "a gradient is NaN or infinite; the best state is kept" in caplog.text
    assert all(math.isfinite(point.divergence) for point in facts.curve)
    if steps_before:
        assert facts.after < facts.before and not same(old, weights(smaller))
    else:
        assert facts.best_tokens == 0 and same(old, weights(smaller))
    assert bool(torch.isfinite(logits(smaller)).all())


@pytest.mark.slow
def test_text_that_ends_early_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    dense = tiny_model("llama")
    facts = healed(fitted(dense), dense, tokens=20_000)
    there = 40 * 8 * 24 - 768
    assert facts.ended == "text" and facts.tokens == there
    assert f"the text ended after {there} of the 20000 tokens asked for" in caplog.text
    half = next(point for point in facts.curve if point.tokens >= there / 2)
    gain = 100 * (1 - facts.curve[-1].divergence / half.divergence)
    assert f"the held-out divergence fell by {gain:.1f}%: give more text" in caplog.text
    caplog.clear()
    facts = healed(fitted(dense), dense, tokens=1536)
    assert facts.ended == "tokens" and facts.tokens == 1536 and not caplog.text


@pytest.mark.slow
def test_no_sequence_is_read_twice_and_none_that_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("llama")
    read: list[bytes] = []
    real = healing._Healing._gradients

    def gradients(self: Any, chosen: Any) -> list[Tensor]:
        read.extend(item.input_ids.numpy().tobytes() for item in chosen)
        return real(self, chosen)

    monkeypatch.setattr(healing._Healing, "_gradients", gradients)
    healed(fitted(dense), dense)
    rows = [row.numpy().tobytes() for batch in text() for row in batch]
    judges = [row for place, row in enumerate(rows) if place % 4 == 3][: 768 // 24]
    assert len(set(read)) == len(read) == len(rows) - len(judges)
    assert not set(read) & set(judges) and set(read) | set(judges) == set(rows)


@pytest.mark.slow
@pytest.mark.parametrize("seconds_per_step", [1.0, 3.0])
def test_minutes_end_the_run(monkeypatch: pytest.MonkeyPatch, seconds_per_step: float) -> None:
    dense = tiny_model("llama")
    now, real = [0.0], healing.exit_divergence

    def compare(*arguments: Any) -> float:
        wants_gradient = len(arguments) > 5  # a step; each judgement takes a second
        now[0] += seconds_per_step if wants_gradient else 1.0
        return real(*arguments)

    monkeypatch.setattr(healing, "exit_divergence", compare)
    monkeypatch.setattr(healing.time, "perf_counter", lambda: now[0])
    facts = healed(fitted(dense), dense, minutes=0.25)
    assert facts.ended == "time" and 0 < facts.tokens < 40 * 8 * 24 - 768
    assert 13 - seconds_per_step < facts.seconds <= 15
    assert facts.curve[-1].tokens == facts.tokens and facts.best_tokens > 0


@pytest.mark.slow
def test_best_state_is_kept_where_later_ones_are_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("llama")
    smaller = fitted(dense)
    judged: list[Tensor] = []

    def judge(_: Any, point: list[Tensor]) -> float:
        judged.append(point[0].clone())
        return abs(len(judged) - 2) + 10.0  # lowest at the second

    monkeypatch.setattr(healing._Healing, "_judge", judge)
    facts = healed(smaller, dense, rank=0)
    (ghost,) = (module for module in smaller.modules() if isinstance(module, GhostLinear))
    assert facts.after == 10.0 and 0 < facts.best_tokens < facts.tokens and len(judged) > 2
    assert torch.equal(ghost.weight, judged[1]) and not torch.equal(judged[1], judged[-1])


@pytest.mark.slow
def test_state_of_another_run(tmp_path: Path) -> None:
    dense, path = tiny_model("llama"), tmp_path / "state"
    healed(fitted(dense), dense, tokens=800, state=path)
    for smaller, options in (
        (fitted(dense), {"tokens": 900}),
        (fitted(dense), {"tokens": 800, "rank": 3}),
        (fitted(dense, bias=True), {"tokens": 800}),
    ):
        with pytest.raises(ArgumentError, match="holds another healing"):
            healed(smaller, dense, state=path, **options)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not the state of a healing"):
        healed(fitted(dense), dense, tokens=800, state=path)


@pytest.mark.slow
def test_weights_that_maps_share_stay_tied() -> None:
    dense = tiny_model("llama")
    layers = decoder_layers(dense)
    layers[0].mlp.up_proj.weight = layers[5].mlp.up_proj.weight
    dense.lm_head.weight = dense.model.embed_tokens.weight
    smaller = prune_model(dense, [2, 3])
    facts = healed(smaller, dense)
    kept = decoder_layers(smaller)
    assert facts.maps == 4 * 7 - 2 and facts.after < facts.before
    assert kept[0].mlp.up_proj.weight is kept[3].mlp.up_proj.weight
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    assert torch.equal(smaller.lm_head.weight, dense.lm_head.weight)


@pytest.mark.parametrize("family", ["llama4_text", "phimoe"])
def test_routers_built_on_a_linear_map_are_left_alone(family: str) -> None:
    dense = tiny_causal(family)
    smaller = prune_model(dense, [2])
    layers = decoder_layers(smaller)
    routers = [item for item in layers.modules() if type(item).__name__.endswith("Router")]
    maps = [item for item in layers.modules() if isinstance(item, nn.Linear)]
    assert routers and all(isinstance(item, nn.Linear) for item in routers)
    old = [item.weight.detach().clone() for item in routers]
    facts = healed(smaller, dense, text(8), held_out_tokens=300, learning_rate=3e-3)
    assert facts.maps == len(maps) - len(routers) and facts.after < facts.before
    assert all(torch.equal(was, item.weight) for was, item in zip(old, routers, strict=True))


@pytest.mark.slow
def test_pipeline_heals_after_the_corrections(tmp_path: Path) -> None:
    dense, path = tiny_model("llama"), tmp_path / "state"
    before = weights(dense)
    run = RunOptions(corrections=1, heal=HealOptions(**SMALL), heal_state=path)
    smaller, report = ghost_model(dense, text(), removed=[1, 3], run=run)
    assert report.healing is not None and path.is_file() and same(before, weights(dense))
    assert report.corrections and report.healing.after < report.healing.before
    assert report.to_dict()["healing"]["curve"][0]["tokens"] == 0
    assert report.seconds["heal"] > 0
    (kept,) = smaller.config.ghost["report"]["healed"]
    assert kept["after"] == report.healing.after and "curve" not in kept
    by_hand, _ = ghost_model(dense, text(), removed=[1, 3], run=RunOptions(corrections=1))
    healed(by_hand, dense)
    assert same(weights(by_hand), weights(smaller))
    _, report = ghost_model(
        dense, text(), removed=[1, 3], recovery="none", run=RunOptions(heal=run.heal)
    )
    assert report.healing is not None and report.healing.ghosts == 0
    in_place = RunOptions(corrections=1, heal=run.heal, inplace=True)
    same_model, _ = ghost_model(dense, text(), removed=[1, 3], run=in_place)
    assert same_model is dense and same(weights(dense), weights(smaller))
