"""`lorp` against its definition in plain loops, and its groups against scikit-learn's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support.padded_text import dense_states, padded_batches

from ghosted_fast.errors import ArgumentError
from ghosted_fast.selection.criteria.lorp import (
    cluster,
    locality,
    number_of_groups,
    removal_order,
)
from ghosted_fast.selection.select import select_layers
from ghosted_fast.testing import tiny_model


def blocks(sizes: list[int], seed: int = 0, inside: float = 0.9) -> np.ndarray:
    """Return similarities of layers that are alike within blocks, with noise."""
    draw = np.random.default_rng(seed)
    count = sum(sizes)
    group = np.repeat(np.arange(len(sizes)), sizes)
    similar = np.where(group[:, None] == group[None], inside, 0.2)
    noise = draw.normal(0, 0.03, (count, count))
    similar = similar + (noise + noise.T) / 2
    np.fill_diagonal(similar, 1.0)
    return similar


def expected_order(similar: np.ndarray, groups: list[list[int]]) -> list[int]:
    """Return the order by equations 8 to 11, everything computed anew at each step."""
    protected = {0, len(similar) - 1}

    def redundancy(layer: int, members: list[int]) -> float:
        others = [similar[layer, other] for other in members if other != layer]
        return sum(others) / len(others) if others else 0.0

    def best(members: list[int], gone: list[int]) -> int | None:
        free = [layer for layer in members if layer not in protected and layer not in gone]
        return max(free, key=lambda layer: redundancy(layer, members)) if free else None

    order: list[int] = []
    for members in groups:
        layer = best(members, order)
        if layer is not None:
            order.append(layer)
    while True:
        chosen, highest = None, -np.inf
        for members in groups:
            left = [layer for layer in members if layer not in order]
            pairs = [similar[i, j] for i, j in itertools.combinations(left, 2)]
            layer = best(members, order)
            if layer is not None and pairs and np.mean(pairs) > highest:
                chosen, highest = layer, float(np.mean(pairs))
        if chosen is None:
            rest = [best(members, order) for members in groups]
            chosen = next((layer for layer in rest if layer is not None), None)
        if chosen is None:
            return order
        order.append(chosen)


@pytest.mark.parametrize(("sizes", "seed"), [([4, 5, 3], 0), ([6, 6], 1), ([1, 7, 4, 1], 2)])
def test_order_by_the_equations(sizes: list[int], seed: int) -> None:
    similar = blocks(sizes, seed)
    ends = np.cumsum(sizes)
    groups = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    order = removal_order(similar, groups)
    assert order == expected_order(similar, groups)
    assert sorted(order) == list(range(1, sum(sizes) - 1))


def test_blocks_are_found() -> None:
    for seed, sizes in enumerate(([5, 7], [4, 4, 6], [3, 5, 4, 6])):
        ends = np.cumsum(sizes)
        groups = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
        assert cluster(blocks(sizes, seed), len(sizes)) == groups


def squares(similar: np.ndarray, groups: list[list[int]]) -> float:
    """Return the sum of squares that k-means minimises, in the embedding of the layers."""
    affinity = (similar + 1) / 2
    np.fill_diagonal(affinity, 0.0)
    degree = np.diag(affinity.sum(0) ** -0.5)
    _, vectors = np.linalg.eigh(degree @ affinity @ degree)
    points = degree @ vectors[:, -len(groups) :]
    return sum(float(((points[g] - points[g].mean(0)) ** 2).sum()) for g in groups)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_groups_are_those_of_scikit_learn_or_closer_ones(count: int) -> None:
    learn = pytest.importorskip("sklearn.cluster")
    same = []
    for seed in range(6):
        # States that drift from layer to layer, as those of models do.
        draw = np.random.default_rng(seed)
        states = np.cumsum(draw.normal(size=(24, 50)), axis=0) + 3.0
        states /= np.linalg.norm(states, axis=1, keepdims=True)
        similar = states @ states.T
        affinity = (similar + 1) / 2
        np.fill_diagonal(affinity, 1.0)
        labels = learn.SpectralClustering(
            n_clusters=count, affinity="precomputed", random_state=0, assign_labels="kmeans"
        ).fit_predict(affinity)
        theirs = sorted(np.flatnonzero(labels == label).tolist() for label in set(labels))
        ours = cluster(similar, count)
        same.append(ours == theirs)
        assert same[-1] or squares(similar, ours) < squares(similar, theirs)
    assert sum(same) >= 5


def test_locality_decides_the_number_of_groups() -> None:
    similar = np.full((5, 5), 0.5)
    np.fill_diagonal(similar, 1.0)
    assert locality(similar) == 1.0
    assert [number_of_groups(value) for value in (9.0, 1.0, 0.99, 0.7, 0.69, -1.0)] == [
        *(2, 2, 3, 3, 4, 4)
    ]
    assert number_of_groups(locality(similar - 0.6)) == 2


def test_resting_layers_go_last() -> None:
    similar = blocks([6, 6])
    groups = [list(range(6)), list(range(6, 12))]
    order = removal_order(similar, groups, resting=[3])
    assert [layer for layer in order if layer < 6][-1] == 3


def test_on_a_model_with_padding() -> None:
    model = tiny_model("llama", 8)
    rows: list[list[torch.Tensor]] = [[] for _ in range(8)]
    for batch in padded_batches():
        mask = batch["attention_mask"].bool()
        for layer, states in enumerate(dense_states(model, batch)[:8]):
            rows[layer].append(states[mask].double())
    states = torch.stack([torch.cat(parts) for parts in rows])
    states /= states.norm(dim=-1, keepdim=True)
    similar = (torch.einsum("ind,jnd->ij", states, states) / states.shape[1]).numpy()
    groups = cluster(similar, number_of_groups(locality(similar)))
    order = expected_order(similar, groups)
    chosen = select_layers(model, padded_batches(), 3, "lorp")
    assert chosen.removed == sorted(order[:3]) and chosen.criterion == "lorp"
    assert chosen.choices == {count: sorted(order[:count]) for count in range(1, 7)}
    for members in groups:
        for layer in members:
            others = [similar[layer, other] for other in members if other != layer]
            expected = 1 - sum(others) / len(others) if others else 1.0
            assert chosen.scores[layer].score == pytest.approx(expected, rel=1e-4)


def test_the_first_and_the_last_layer_stay() -> None:
    with pytest.raises(ArgumentError, match=r"remove in 1\.\.4 .* first and the last of 6"):
        select_layers(tiny_model("llama"), padded_batches(), 5, "lorp")
