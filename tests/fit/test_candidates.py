"""Losses of candidates, against hooks on the dense model, and the race between them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ghosted_fast.errors import CalibrationError
from ghosted_fast.fit import candidates
from ghosted_fast.fit.candidates import score_gaps, score_intervals
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.ghosts import FittedGhost, fit_on_training_folds
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.gap import Gap
from ghosted_fast.options import GhostOptions
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.folds import held_out_batches

OPTIONS = GhostOptions()


def tokens() -> list[torch.Tensor]:
    return [random_tokens(6, 24, seed) for seed in range(4)]


def test_scores_are_losses_of_the_model_with_the_ghost_in_place() -> None:
    model = tiny_model("gemma3_text")
    intervals = [(1, 3), (0, 2), (4, 6)]
    statistics = collect_statistics(model, tokens(), intervals, OPTIONS)
    fitted = [fit_on_training_folds(item, OPTIONS) for item in statistics]
    held_out = held_out_batches(list(iterate_batches(tokens())), OPTIONS, 10**6)
    scores = score_intervals(
        model, held_out, intervals, [f.to_module(torch.float32, "cpu") for f in fitted]
    )
    for (start, stop), ghost, score in zip(intervals, fitted, scores, strict=True):
        assert score == pytest.approx(loss_by_hooks(model, held_out, start, stop, ghost), rel=1e-4)


def loss_by_hooks(
    model: torch.nn.Module, batches: list[object], start: int, stop: int, ghost: FittedGhost
) -> float:
    """Run the dense model and overwrite the state that leaves the last removed layer."""
    entering: list[torch.Tensor] = []

    def remember(_: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])  # type: ignore[arg-type]

    def overwrite(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        x = entering.pop()
        y = ghost.apply(x.flatten(0, 1)).float().view_as(x)
        if ghost.first_state is not None:
            y[:, 0] = ghost.first_state.float()
        return y

    layers = decoder_layers(model)
    handles = [
        layers[start].register_forward_pre_hook(remember, with_kwargs=True),
        layers[stop - 1].register_forward_hook(overwrite),
    ]
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            ids = batch.input_ids  # type: ignore[attr-defined]
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            total += float(functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    for handle in handles:
        handle.remove()
    return total / count


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_several_gaps_give_the_loss_of_the_model_after_surgery(family: str) -> None:
    model = tiny_model(family)
    intervals = [(0, 1), (2, 4), (5, 6)]
    statistics = collect_statistics(model, tokens(), intervals, GhostOptions(first_state="on"))
    ghosts = [
        fit_on_training_folds(item, GhostOptions(first_state="on")).to_module(torch.float32, "cpu")
        for item in statistics
    ]
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[1, :6] = 0
    batches = [Batch(random_tokens(3, 20, 7), mask)]
    sets = [[0, 1, 2], [1, 2], [0, 2]]
    candidates = [[Gap(*intervals[i], ghosts[i]) for i in chosen] for chosen in sets]
    candidates.append([Gap(1, 2), Gap(3, 5)])
    losses = score_gaps(model, batches, candidates)
    for chosen, loss in zip(sets, losses, strict=False):
        removed = [layer for i in chosen for layer in range(*intervals[i])]
        smaller = remove_layers(model, removed, [ghosts[i] for i in chosen])
        expected = torch.tensor(perplexity(smaller, batches).value).log()
        assert loss == pytest.approx(float(expected), rel=1e-5)
    pruned = perplexity(remove_layers(model, [1, 3, 4]), batches).value
    assert losses[3] == pytest.approx(float(torch.tensor(pruned).log()), rel=1e-5)


@pytest.mark.slow
def test_clearly_worse_candidates_are_dropped_and_still_ranked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    intervals = [(0, 2), (1, 3), (2, 4), (4, 6)]
    texts = [random_tokens(8, 64, seed) for seed in range(10)]
    with (
        torch.no_grad()
    ):  # what the model itself would say, so that removing layers costs something
        for position in range(4, 64):
            for text in texts:
                text[:, position] = 1 + model(text[:, :position]).logits[:, -1, 1:].argmax(-1)
    statistics = collect_statistics(model, texts, intervals, OPTIONS)
    ghosts = [
        fit_on_training_folds(item, OPTIONS).to_module(torch.float32, "cpu") for item in statistics
    ]
    for spoilt in (0, 2):
        ghosts[spoilt].weight.copy_(torch.randn(32, 32))
    held_out = held_out_batches(list(iterate_batches(texts)), OPTIONS, 10**6)
    resumed: list[int] = []
    resume = candidates.resume

    def counted(model: object, batch: object, stop: int, *others: object) -> torch.Tensor:
        resumed.append(stop)
        return resume(model, batch, stop, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(candidates, "resume", counted)
    monkeypatch.setattr(candidates, "FEWEST_TOKENS_TO_DROP", 10**9)
    whole = score_intervals(model, held_out, intervals, ghosts)
    assert len(resumed) == len(held_out) * len(intervals)
    resumed.clear()
    monkeypatch.setattr(candidates, "FEWEST_TOKENS_TO_DROP", 256)
    raced = score_intervals(model, held_out, intervals, ghosts)
    # 252 tokens of four batches do not suffice for a verdict, 315 of five do.
    assert resumed.count(2) == resumed.count(4) == 5
    assert resumed.count(3) + resumed.count(6) > len(held_out)
    best = min(range(4), key=whole.__getitem__)
    assert min(range(4), key=raced.__getitem__) == best
    assert raced[best] == pytest.approx(whole[best], rel=1e-6)
    assert raced == pytest.approx(whole, rel=0.05)


def test_as_many_as_are_wanted_stay_in_the_race() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(400, generator=generator, dtype=torch.float64)
    losses = [[base + shift] for shift in (0.0, 0.5, 0.2, 1.0)]
    assert candidates._still_good(losses, [0, 1, 2, 3], 1) == [0]
    assert candidates._still_good(losses, [0, 1, 2, 3], 2) == [0, 2]
    assert candidates._still_good(losses, [1, 3], 2) == [1, 3]


def test_held_out_sequences_are_those_of_the_last_fold() -> None:
    batches = list(iterate_batches(tokens()))
    rows = torch.cat([b.input_ids for b in batches])
    held_out = held_out_batches(batches, OPTIONS, 10**6)
    assert torch.equal(torch.cat([b.input_ids for b in held_out]), rows[3::4])
    assert len(held_out_batches(batches, OPTIONS, 30)) == 2
    with pytest.raises(CalibrationError, match="at least 4"):
        held_out_batches(batches[:1][0:0], OPTIONS, 100)
