"""Which share of the learning rate matrices take, by the width of their model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.healed_models import fitted, healed

from ghosted_fast.improve import factors, healing
from ghosted_fast.improve.factors import Trained
from ghosted_fast.improve.healing_run import Run, take_step
from ghosted_fast.testing import tiny_model

WIDTH = 32  # of a tiny model


def shares(rank: Any, apart: bool = False) -> list[tuple[tuple[int, ...], float]]:
    trained = Trained(fitted(tiny_model("llama"), bias=True), rank, seed=0, apart=apart)
    parts = zip(trained.parameters, trained.rate_shares, strict=True)
    return [(tuple(part.shape), share) for part, share in parts]


@pytest.mark.parametrize("rank", [0, 4, "full"])
def test_a_model_four_times_as_wide_takes_a_quarter(
    monkeypatch: pytest.MonkeyPatch, rank: Any
) -> None:
    monkeypatch.setattr(factors, "_WIDTH", WIDTH // 4)
    *maps, ghost, bias = shares(rank)
    assert bool(maps) == (rank != 0) and all(share == 0.25 for _, share in maps)
    assert ghost == ((WIDTH, WIDTH), 0.0625) and bias == ((WIDTH,), 0.0625)


def test_factors_of_a_ghost_take_what_other_factors_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_WIDTH", WIDTH // 2)
    found = shares(4, apart=True)
    assert found[-2:] == [((WIDTH, 4), 0.5), ((4, WIDTH), 0.5)]
    assert {share for _, share in found} == {0.5}


@pytest.mark.parametrize("rank", [0, 4, "full"])
def test_a_narrow_model_takes_no_more_than_the_rate(rank: Any) -> None:
    assert factors._WIDTH > WIDTH
    assert {share for _, share in shares(rank)} == {1.0}


def test_a_step_takes_the_shares() -> None:
    point = [torch.zeros(2, 3), torch.zeros(4)]
    run = Run.start("", point, 0.0, 0.0)
    take_step(run, [torch.full((2, 3), 5.0), torch.full((4,), -1e-3)], 0.1, [0.5, 2.0])
    assert torch.allclose(run.point[0], torch.full((2, 3), -0.05))
    assert torch.allclose(run.point[1], torch.full((4,), 0.2))


def test_a_healing_takes_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_WIDTH", WIDTH // 2)
    dense = tiny_model("llama")
    smaller, taken = fitted(dense), []
    expected = Trained(fitted(dense), 4, seed=0).rate_shares
    assert set(expected) == {0.5, 0.25}
    real = healing.take_step

    def step(run: Any, gradients: Any, size: float, shares: Any) -> None:
        taken.append(shares)
        real(run, gradients, size, shares)

    monkeypatch.setattr(healing, "take_step", step)
    healed(smaller, dense, tokens=800)
    assert taken and all(shares == expected for shares in taken)
