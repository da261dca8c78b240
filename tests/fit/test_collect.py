"""One pass into the statistics of every interval: values, first tokens, refusals, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ghosted_fast.errors import ArgumentError, CalibrationError, NonFiniteError
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.ghosts import FittedGhost, fit_ghost, fit_on_training_folds
from ghosted_fast.models.boundaries import visit_boundaries
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.gram import GramAccumulator
from ghosted_fast.statistics.interval import interval_bytes
from ghosted_fast.statistics.token_weights import token_weights
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model
from ghosted_fast.text.batches import Batch


def batches() -> list[Batch]:
    result = []
    for seed in range(3):
        mask = torch.ones(5, 24, dtype=torch.int64)
        mask[seed, :7] = 0  # left padding
        mask[4, 20:] = 0  # right padding
        result.append(Batch(random_tokens(5, 24, seed), mask))
    return result


@pytest.mark.parametrize("first_state", ["off", "on"])
@pytest.mark.parametrize("input_form", ["normed", "raw"])
def test_statistics_are_those_of_the_dense_states(first_state: str, input_form: str) -> None:
    model = tiny_model("llama")
    options = GhostOptions(features=input_form, first_state=first_state)  # type: ignore[arg-type]
    intervals = [(1, 3), (0, 2), (4, 6)]
    collected = collect_statistics(model, batches(), intervals, options)
    eps = Decoder.of(model).norm_eps if input_form == "normed" else None
    for item, (start, stop) in zip(collected, intervals, strict=True):
        expected = GramAccumulator(32, 4, eps)
        sequence, first_sum, firsts, floor = 0, torch.zeros(32, dtype=torch.float64), 0, None
        for batch in batches():
            states: dict[int, torch.Tensor] = {}
            visit_boundaries(model, batch, [start, stop], states.__setitem__)
            if floor is None:
                energies = states[stop][0].square().mean(-1)[batch.attention_mask[0].bool()]
                floor = 4 * float(energies.median())
            weight = token_weights(states[start], states[stop], options, eps, floor)
            weight = weight * batch.attention_mask
            if first_state == "on":
                first_sum += states[stop][batch.is_first].double().sum(0)
                firsts += int(batch.is_first.sum())
                weight = weight.masked_fill(batch.is_first, 0.0)
            for row in range(5):
                expected.update(
                    states[start][row], states[stop][row], weight[row], fold=sequence % 4
                )
                sequence += 1
        for fold in range(4):
            assert relative_rms(item.gram.fold(fold).gram, expected.fold(fold).gram) < 1e-6
            assert relative_rms(item.gram.fold(fold).cross, expected.fold(fold).cross) < 1e-6
        assert item.gram.num_tokens == expected.num_tokens
        assert item.energy_floor == pytest.approx(floor, rel=1e-5)
        if first_state == "on":
            assert item.first is not None and item.first.count == firsts == 15
            torch.testing.assert_close(item.first.mean(), first_sum / firsts)
        else:
            assert item.first is None


def test_split_into_batches_does_not_matter() -> None:
    model = tiny_model("llama")
    whole = [
        Batch(
            torch.cat([b.input_ids for b in batches()]),
            torch.cat([b.attention_mask for b in batches()]),
        )
    ]
    a = collect_statistics(model, whole, [(1, 3)])[0]
    b = collect_statistics(model, batches(), [(1, 3)])[0]
    for fold in range(4):
        assert relative_rms(a.gram.fold(fold).cross, b.gram.fold(fold).cross) < 1e-5


def sink_statistics(jump: bool) -> tuple[FittedGhost, FittedGhost]:
    """Fit ghosts on a gap in which the first token does, or does not, gain a huge activation."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(1)
    state = 1000.0 * torch.randn(32, generator=generator)
    layer = decoder_layers(model)[2 if jump else 0]

    def grow(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 0] = state + torch.randn(len(output), 32, generator=generator)
        return output

    layer.register_forward_hook(grow)
    tokens = [random_tokens(8, 24, seed) for seed in range(8)]
    options = GhostOptions()
    item = collect_statistics(model, tokens, [(2, 4)], options)[0]
    judged = fit_on_training_folds(item, options)
    return judged, fit_ghost(item, options)[0]


def test_first_state_is_found_where_it_is_needed() -> None:
    judged, fitted = sink_statistics(jump=True)
    assert judged.first_state is not None and fitted.first_state is not None
    assert fitted.first_state is not None and fitted.first_state.norm() > 1000


@pytest.mark.parametrize("options", [GhostOptions(), GhostOptions(bias=True, features="raw")])
def test_first_tokens_join_the_fit_where_a_map_serves_them(options: GhostOptions) -> None:
    """It is the map of the training folds with them in, on the first tokens of the last fold."""
    model = tiny_model("llama")
    tokens = [random_tokens(8, 24, seed) for seed in range(8)]
    for interval in [(0, 1), (2, 3), (3, 5), (4, 6)]:
        item = collect_statistics(model, tokens, [interval], options)[0]
        together = replace(options, first_state="off")
        (whole,) = collect_statistics(model, tokens, [interval], together)
        mapped = fit_on_training_folds(whole, together)
        assert item.first is not None
        x, y, folds = item.first.rows()
        last = folds == options.folds - 1
        constant = y[~last].double().mean(0)
        errors = [
            float((y[last].double() - guess).square().sum())
            for guess in (mapped.apply(x[last]), constant)
        ]
        judged = fit_on_training_folds(item, options)
        fitted, solution = fit_ghost(item, options)
        assert errors[0] < errors[1], "no token of a tiny model has a huge activation"
        assert judged.first_state is None and fitted.first_state is None
        assert solution.num_tokens == 8 * 8 * 24
        assert relative_rms(judged.weight, mapped.weight) <= 1e-6


def test_module_computes_what_was_fitted() -> None:
    judged, _ = sink_statistics(jump=True)
    x = torch.randn(2, 5, 32)
    is_first = torch.zeros(2, 5, dtype=torch.bool)
    is_first[:, 0] = True
    y = judged.to_module(torch.float32, "cpu")(x, is_first)
    expected = judged.apply(x.view(-1, 32)).view(2, 5, 32).float()
    assert judged.first_state is not None
    expected[is_first] = judged.first_state.float()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_too_little_text_is_refused_with_the_number() -> None:
    with pytest.raises(CalibrationError, match=r"at least 64 .* got 40"):
        collect_statistics(tiny_model("llama"), [random_tokens(2, 20)], [(1, 3)])


@pytest.mark.parametrize("position", [0, 9])
def test_non_finite_activations_name_boundary_and_batch(position: int) -> None:
    model = tiny_model("llama")
    seen = 0

    def poison(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += output.shape[1] == 24  # of the text, not of a look at what layers return
        if seen == 3:
            output = output.clone()
            output[1, position] = float("nan")
        return output

    decoder_layers(model)[2].register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match=r"boundaries 1 and 3.*batch 2"):
        collect_statistics(model, [random_tokens(4, 24, seed) for seed in range(4)], [(1, 3)])


@pytest.mark.parametrize(
    "wrong",
    [{"features": "hidden"}, {"token_weight": "none"}, {"first_state": "yes"}, {"folds": 1}],
)
def test_refused_options(wrong: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        GhostOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_memory_is_what_was_announced() -> None:
    model = tiny_model("llama")
    options = GhostOptions()
    few = collect_statistics(model, [random_tokens(4, 24)], [(1, 3)], options)[0]
    many = collect_statistics(
        model, [random_tokens(8, 24, seed) for seed in range(300)], [(1, 3)], options
    )[0]

    def held(item: object) -> int:
        assert few.first is not None and many.first is not None
        first = few.first if item is few else many.first
        gram = few.gram if item is few else many.gram
        return gram.nbytes + sum(t.nbytes for t in (*first.x, *first.y, first.y_sum))

    assert held(few) <= held(many) <= interval_bytes(32, options)


def test_capped_weights_count_usual_tokens_alike() -> None:
    """All tokens of a tiny model are usual: as uniform weights, but for the rounding."""
    model, batch = tiny_model("llama", 4), random_tokens(8, 64)
    options = GhostOptions(features="raw", token_weight="capped")
    (capped,) = collect_statistics(model, [batch], [(1, 3)], options)
    usual = 0.25 * capped.energy_floor
    y = torch.full((3, 8), usual**0.5)
    y[2] *= 100.0
    weight = token_weights(y, y, options, None, capped.energy_floor)
    assert weight[0] == weight[1]
    assert 0.5 <= weight[0] * capped.energy_floor <= 2.0
    assert 0.5 <= weight[2] * usual * 1e4 <= 2.0
    rows = [batch[:3], batch[3:]]
    (split,) = collect_statistics(model, rows, [(1, 3)], options)
    assert split.energy_floor == pytest.approx(capped.energy_floor, rel=1e-6)
