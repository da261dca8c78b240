"""Corrections: the direction, the search on held-out text, and what they do to whole models."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from ghosted_fast.errors import ArgumentError, CalibrationError
from ghosted_fast.improve import correction
from ghosted_fast.improve.correction import correct_ghosts
from ghosted_fast.improve.divergence import Divergence, LoadedComparison, local_model
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.structure import share_copy
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model
from ghosted_fast.text.batches import iterate_batches


def text(count: int = 12) -> list[torch.Tensor]:
    return [random_tokens(8, 24, seed) for seed in range(count)]


def fitted(dense: Any, removed: list[int], **options: Any) -> Any:
    return ghost_model(
        dense,
        text(),
        removed=removed,
        options=GhostOptions(**options),
        run=RunOptions(corrections=0),
    )[0]


def weights(model: Any) -> list[torch.Tensor]:
    found = [m for m in model.modules() if isinstance(m, GhostLinear)]
    return [p.detach().clone() for ghost in found for p in ghost.parameters()]


def held_out_divergence(ghosted: Any, dense: Any, batches: list[Any]) -> float:
    """Return the mean KL over every fourth sequence."""
    total = tokens = sequences = 0.0
    with torch.no_grad():
        for batch in iterate_batches(batches):
            keys = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            p = dense(**keys).logits.double().log_softmax(-1)
            q = ghosted(**keys).logits.double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1) * batch.attention_mask
            for row in range(len(kl)):
                if sequences % 4 == 3:
                    total += float(kl[row].sum())
                    tokens += float(batch.attention_mask[row].sum())
                sequences += 1
    return total / tokens


@pytest.mark.parametrize("bias", [False, True])
def test_direction_solves_the_damped_equations(bias: bool) -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense, [2, 3], bias=bias)
    slopes = Divergence(ghosted, dense).gradients(iterate_batches(text(2)))
    direction = correction._descent(slopes, 0.1)
    found = slopes[0].equations()
    gram = found.gram.tril() + found.gram.tril(-1).mT
    if not bias:
        damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
        assert relative_rms(-direction[0].mT, torch.linalg.solve(damped, found.cross)) < 1e-8
        return
    # With a bias: one more feature, which is 1 and is not damped.
    centred = gram - torch.outer(found.feature_sum, found.feature_sum) / found.weight_sum
    full = torch.zeros(33, 33, dtype=torch.float64)
    full[:32, :32] = gram
    full[:32, :32] += found.gram.diagonal().mean() * 0.1 * torch.eye(32, dtype=torch.float64)
    full[32, :32] = full[:32, 32] = found.feature_sum
    full[32, 32] = found.weight_sum
    exact = torch.linalg.solve(full, torch.cat([found.cross, found.delta_sum[None]]))
    assert torch.linalg.eigvalsh(centred)[0] > 0
    assert relative_rms(-direction[0].mT, exact[:32]) < 1e-8
    assert relative_rms(-direction[1], exact[32]) < 1e-8


def test_scaled_direction_divides_by_the_gradients_gram() -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense, [2, 3], first_state="off", bias=True)
    batches = list(iterate_batches(text(2)))
    (slope,) = Divergence(ghosted, dense).gradients(batches)
    (ghost,) = [m for m in ghosted.modules() if isinstance(m, GhostLinear)]
    gram = torch.zeros(32, 32, dtype=torch.float64)
    for batch in batches:
        probe = torch.zeros(*batch.input_ids.shape, 32, requires_grad=True)
        handle = ghost.register_forward_hook(lambda _, __, y, probe=probe: y + probe)
        q = ghosted(batch.input_ids).logits.log_softmax(-1)
        handle.remove()
        p = dense(batch.input_ids).logits.detach().log_softmax(-1)
        (p.exp() * (p - q)).sum().backward()
        gradients = probe.grad.flatten(0, 1).double()
        gram += gradients.mT @ gradients
    damped = gram + gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    direction = correction._descent([slope], 0.1)
    scaled = correction._output_scaled([slope], direction)
    for found, part in zip(scaled, direction, strict=True):
        assert relative_rms(found, torch.linalg.solve(damped, part)) < 1e-4
        assert relative_rms(found / found.norm(), part / part.norm()) > 0.01


@pytest.mark.slow
def test_trial_that_is_too_long_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("llama")
    gains = {}
    for trials in (1, 4):
        monkeypatch.setattr(correction, "_TRIAL_CHANGE", 20.0)
        monkeypatch.setattr(correction, "_MOST_TRIALS", trials)
        (fact,) = correct_ghosts(fitted(dense, [2, 3]), dense, text(), 1)
        gains[trials] = fact.before - fact.after
    monkeypatch.undo()
    (usual,) = correct_ghosts(fitted(dense, [2, 3]), dense, text(), 1)
    assert gains[4] > 1.1 * gains[1]
    assert gains[4] == pytest.approx(usual.before - usual.after, rel=0.2)


def test_local_model_is_that_of_the_logits() -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense, [1, 3, 4])
    divergence = Divergence(ghosted, dense)
    (batch,) = iterate_batches([{"input_ids": random_tokens(4, 20), "attention_mask": mask()}])
    point = divergence.parameters64()
    generator = torch.Generator().manual_seed(0)
    directions = [
        [torch.randn(p.shape, generator=generator).double() * 0.02 for p in point] for _ in range(2)
    ]
    states = [divergence.states(batch)]
    value, slope, curvature = local_model(divergence, states, point, directions)
    attended = batch.attention_mask.bool()

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            output = model(batch.input_ids, attention_mask=batch.attention_mask)
        return output.logits[attended].double()

    p, z = logits(dense).softmax(-1), logits(ghosted)
    q = z.softmax(-1)
    changes = []
    for direction in directions:
        divergence.set_parameters([a + b for a, b in zip(point, direction, strict=True)])
        changes.append(logits(ghosted) - z)
    divergence.set_parameters(point)
    fisher = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    for i in range(2):
        assert slope[i] == pytest.approx(float(((q - p) * changes[i]).sum(-1).mean()), rel=1e-3)
        for j in range(2):
            exact = torch.einsum("tv,tvw,tw->t", changes[i], fisher, changes[j]).mean()
            assert curvature[i, j] == pytest.approx(float(exact), rel=1e-3)
    assert value == pytest.approx(float((p * (p.log() - z.log_softmax(-1))).sum(-1).mean()), 1e-4)
    for old, new in zip(point, divergence.parameters64(), strict=True):
        assert torch.equal(old, new)


def mask() -> torch.Tensor:
    found = torch.ones(4, 20, dtype=torch.int64)
    found[1, :6] = 0
    found[2, 15:] = 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("removed", "options"),
    [
        ([2, 3], {}),
        ([2, 3], {"features": "raw", "bias": True}),
        ([0, 2, 5], {"first_state": "on"}),
    ],
)
def test_held_out_divergence_falls(removed: list[int], options: dict[str, Any]) -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense, removed, **options)
    padded = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill(1, torch.arange(4), 0)}
        for ids in text(4)
    ]
    batches = [*text(8), *padded]
    start = held_out_divergence(ghosted, dense, batches)
    first_states = [p for p in weights(ghosted) if p.dim() == 1]
    facts = correct_ghosts(ghosted, dense, batches, 3, tokens=1000)
    assert facts[0].before == pytest.approx(start, rel=1e-4)
    for fact, following in itertools.pairwise(facts):
        assert following.before == pytest.approx(fact.after, rel=1e-6)
    for fact in facts:
        assert fact.after < fact.before if fact.accepted else fact.after == fact.before
        assert (fact.change > 0) == fact.accepted
    end = held_out_divergence(ghosted, dense, batches)
    assert end == pytest.approx(facts[-1].after, rel=1e-4)
    assert end < 0.99 * start
    if options.get("first_state") == "on":
        kept = [p for p in weights(ghosted) if p.dim() == 1]
        assert all(torch.equal(a, b) for a, b in zip(first_states, kept, strict=True))


@pytest.mark.slow
def test_fresh_text_gains_too() -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense, [2, 3])
    fresh = [random_tokens(8, 24, seed) for seed in range(90, 94)]
    start = held_out_divergence(ghosted, dense, fresh)
    correct_ghosts(ghosted, dense, text(), 4, tokens=1500)
    assert held_out_divergence(ghosted, dense, fresh) < start


def test_a_copy_that_shares_the_ghosts_stays() -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense, [2, 3])
    given = share_copy(ghosted)
    before = weights(given)
    assert correct_ghosts(ghosted, dense, text(), 1)[0].accepted
    assert not torch.equal(before[0], weights(ghosted)[0])
    assert torch.equal(before[0], weights(given)[0])


@pytest.mark.slow
def test_same_text_same_bits_and_bf16() -> None:
    dense = tiny_model("llama", dtype=torch.bfloat16)
    found = []
    for _ in range(2):
        ghosted = fitted(dense, [2, 3])
        facts = correct_ghosts(ghosted, dense, text(), 2)
        found.append((weights(ghosted), [(f.before, f.after, f.change) for f in facts]))
    assert found[0][1] == found[1][1] and found[0][1][0][1] < found[0][1][0][0]
    assert found[0][0][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


@pytest.mark.slow
def test_step_that_makes_it_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense, [2, 3])
    old, real = weights(ghosted), LoadedComparison.local_model

    def uphill(*arguments: Any) -> Any:
        value, slope, curvature = real(*arguments)
        return value, -20.0 * slope, curvature

    monkeypatch.setattr(LoadedComparison, "local_model", uphill)
    facts = correct_ghosts(ghosted, dense, text(), 2)
    assert [fact.accepted for fact in facts] == [False, False]
    assert all(fact.after == fact.before and fact.change == 0.0 for fact in facts)
    assert all(torch.equal(a, b) for a, b in zip(old, weights(ghosted), strict=True))
    assert len(correct_ghosts(ghosted, dense, text(44), "auto")) == 1  # it gives up


def test_perfect_ghost_stays() -> None:
    dense = tiny_model("llama")
    for parameter in (dense.model.layers[2].self_attn.o_proj, dense.model.layers[2].mlp.down_proj):
        torch.nn.init.zeros_(parameter.weight)  # the layer is the identity, and so is a new ghost
    ghosted = remove_layers(dense, [2], [GhostLinear(32)])
    facts = correct_ghosts(ghosted, dense, text(), 1)
    assert abs(facts[0].before) < 1e-6 and not facts[0].accepted
    assert not weights(ghosted)[0].any()


@pytest.mark.slow
def test_auto_needs_text_to_judge_by(caplog: pytest.LogCaptureFixture) -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense, [2, 3])
    old = weights(ghosted)
    assert correct_ghosts(ghosted, dense, text(), "auto") == []
    assert "576 tokens of the text can be held out" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(old, weights(ghosted), strict=True))
    assert 1 <= len(correct_ghosts(ghosted, dense, text(44), "auto")) <= 8


@pytest.mark.slow
def test_pipeline_reports_and_keeps_the_given_model() -> None:
    dense = tiny_model("llama")
    plain = ghost_model(dense, text(), removed=[2, 3], run=RunOptions(corrections=0))
    assert plain[1].corrections == [] and plain[1].healing is None
    before = copy.deepcopy(dense.state_dict())
    ghosted, report = ghost_model(
        dense, iter(text()), removed=[2, 3], run=RunOptions(corrections=2)
    )
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert len(report.corrections) == 2 and report.corrections[0].accepted
    assert report.to_dict()["corrections"][1]["after"] <= report.corrections[0].after
    assert report.seconds["correct"] > 0 and report.seconds["heal"] == 0
    by_hand = plain[0]
    correct_ghosts(by_hand, dense, text(), 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(by_hand), weights(ghosted), strict=True))
    in_place, _ = ghost_model(
        dense, text(), removed=[2, 3], run=RunOptions(corrections=2, inplace=True)
    )
    assert in_place is dense
    assert all(torch.equal(a, b) for a, b in zip(weights(in_place), weights(ghosted), strict=True))


@pytest.mark.parametrize("wrong", [-1, 1.5, "some", True, None])
def test_number_of_corrections(wrong: Any) -> None:
    dense = tiny_model("llama")
    with pytest.raises(ArgumentError, match='int >= 0 or "auto"'):
        ghost_model(dense, text(), removed=[2], run=RunOptions(corrections=wrong))


def test_arguments() -> None:
    dense = tiny_model("llama")
    ghosted = fitted(dense, [2, 3])
    with pytest.raises(ArgumentError, match="damping > 0"):
        correct_ghosts(ghosted, dense, text(), 1, damping=0.0)
    with pytest.raises(CalibrationError, match="at least 128 held-out tokens"):
        correct_ghosts(ghosted, dense, text(1), 1)
    assert correct_ghosts(ghosted, dense, [], 0) == []
