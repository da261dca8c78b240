"""Raw or normed features by held-out error: which is taken, that it is the same ghost, and cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ghosted_fast.errors import NonFiniteError
from ghosted_fast.fit.ghosts import FittedGhost, fit_ghost, fit_on_training_folds
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import Features, GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.statistics.interval import (
    IntervalStatistics,
    interval_bytes,
    new_statistics,
    update_statistics,
)
from ghosted_fast.statistics.sample import Sample
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model
from ghosted_fast.text.batches import Batch

D, EPS = 16, 1e-6


def statistics_of(
    truth: Features, options: GhostOptions
) -> tuple[IntervalStatistics, torch.Tensor]:
    """Return sums of tokens of many sizes whose change is linear in one form, and the matrix."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(D, D, generator=generator)
    item = new_statistics((1, 2), options, D, EPS)
    for number in range(4):
        x = torch.randn(8, 24, D, generator=generator)
        x *= torch.randn(8, 24, 1, generator=generator).exp()
        features = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() if truth == "normed" else x
        y = x + features @ matrix.mT
        batch = Batch(torch.zeros(8, 24, dtype=torch.long), torch.ones(8, 24, dtype=torch.long))
        update_statistics(item, Sample((1, 2), x, y, batch, number, 8 * number), options)
    return item, matrix


@pytest.mark.parametrize("first_state", ["off", "auto", "on"])
@pytest.mark.parametrize("truth", ["normed", "raw"])
def test_the_form_that_fits_is_taken_and_its_ghost_is_that_of_its_name(
    truth: Features, first_state: str
) -> None:
    def fits(features: Features) -> list[FittedGhost]:
        options = GhostOptions(features=features, first_state=first_state)  # type: ignore[arg-type]
        item, _ = statistics_of(truth, options)
        return [fit_on_training_folds(item, options), fit_ghost(item, options)[0]]

    found, named = fits("auto"), fits(truth)
    other = fits("raw" if truth == "normed" else "normed")
    _, matrix = statistics_of(truth, GhostOptions())
    for mine, same, worse in zip(found, named, other, strict=True):
        assert mine.norm_eps == same.norm_eps == (EPS if truth == "normed" else None)
        assert torch.equal(mine.weight, same.weight)
        assert (mine.first_state is None) == (same.first_state is None)
        assert relative_rms(mine.weight, matrix.double()) < 1e-3
        assert relative_rms(worse.weight, matrix.double()) > 0.1


@pytest.mark.parametrize("truth", ["normed", "raw"])
def test_the_held_out_fold_decides(truth: Features) -> None:
    """Its change is linear in one form, that of the three folds that are learned from in the other.

    So the errors of these, and of all tokens, would choose the other form.
    """
    options = GhostOptions(features="auto", first_state="off")
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(D, D, generator=generator)
    item = new_statistics((1, 2), options, D, EPS)
    for number in range(4):
        held_out = (torch.arange(8) % options.folds == options.folds - 1)[:, None, None]
        normed = torch.randn(8, 24, D, generator=generator)
        normed /= (normed.square().mean(-1, keepdim=True) + EPS).sqrt()
        spread = torch.where(held_out, 0.3, 0.4)  # enough that the forms differ, and not too much
        x = normed * (spread * torch.randn(8, 24, 1, generator=generator)).exp()
        features = torch.where(held_out == (truth == "normed"), normed, x)
        batch = Batch(torch.zeros(8, 24, dtype=torch.long), torch.ones(8, 24, dtype=torch.long))
        sample = Sample((1, 2), x, x + features @ matrix.mT, batch, number, 8 * number)
        update_statistics(item, sample, options)
    shares = []
    for form, features in zip(item.forms(), ("normed", "raw"), strict=True):
        ghost = fit_on_training_folds(form, replace(options, features=features))  # type: ignore[arg-type]
        sums = *form.split(), form.gram.total()
        shares.append([part.error_share(ghost.weight.mT) for part in sums])
    (train, held, whole), (other_train, other_held, other_whole) = (
        shares if truth == "normed" else shares[::-1]
    )
    assert held < other_held and train > 2 * other_train and whole > 2 * other_whole
    expected = EPS if truth == "normed" else None
    assert fit_on_training_folds(item, options).norm_eps == expected
    assert fit_ghost(item, options)[0].norm_eps == expected


def test_an_error_is_told_of_either_form_and_memory_is_twice_the_sums() -> None:
    options = GhostOptions(features="auto")
    item, _ = statistics_of("raw", options)
    single, _ = statistics_of("raw", GhostOptions())
    assert [gram.norm_eps for gram in item.grams] == [EPS, None]
    assert sum(gram.nbytes for gram in item.grams) == 2 * single.gram.nbytes
    more = interval_bytes(D, options) - interval_bytes(D, GhostOptions())
    assert more == single.gram.nbytes
    x = torch.full((1, 2, D), torch.inf)
    batch = Batch(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(NonFiniteError, match="boundaries 1 and 2"):
        update_statistics(item, Sample((1, 2), x, x, batch, 9, 0), options)


@pytest.mark.parametrize("sequential", [True, False])
def test_each_gap_has_its_own_form_and_the_report_says_which(sequential: bool) -> None:
    model, run = tiny_model("llama"), RunOptions(corrections=0)
    text = [random_tokens(8, 24, seed) for seed in range(6)]

    def fit(features: Features) -> tuple[list[GhostLinear], list[str]]:
        options = GhostOptions(features=features, sequential=sequential)
        smaller, report = ghost_model(model, text, removed=[0, 3], options=options, run=run)
        ghosts = [module for module in smaller.modules() if isinstance(module, GhostLinear)]
        return ghosts, [item.features for item in report.ghosts]

    found, said = fit("auto")
    assert said == ["raw" if ghost.norm_eps is None else "normed" for ghost in found]
    assert set(said) <= {"raw", "normed"} and len(said) == 2
    named = {form: fit(form)[0] for form in ("normed", "raw")}
    assert torch.equal(found[0].weight, named[said[0]][0].weight)
    if not sequential:  # else the second gap sees what the first one gives
        assert torch.equal(found[1].weight, named[said[1]][1].weight)
