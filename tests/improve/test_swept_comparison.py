"""What corrections ask of a model: the sweep answers as the model in memory does."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.swept_models import saved, sweep_of, text

import ghosted_fast as gf
from ghosted_fast.errors import NonFiniteError
from ghosted_fast.fit.sweep.climb import climb
from ghosted_fast.fit.sweep.shelf import FolderShelf, MemoryShelf, Shelf, boundary_name
from ghosted_fast.improve.divergence import Divergence, LoadedComparison
from ghosted_fast.improve.swept import SweptComparison, SweptSplit
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.ghosted_layers import ghosts_of
from ghosted_fast.models.unloaded.source import FolderSource
from ghosted_fast.surgery.cut import removed_intervals
from ghosted_fast.testing import FAMILY_NAMES, relative_rms
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.folds import split_sequences

HELD_OUT = 4096


def both(
    folder: Path, family: str, removed: list[int], shelf: Shelf | None = None, **options: Any
) -> tuple[LoadedComparison, SweptComparison]:
    """Return comparisons of one model with the same ghosts, in memory and swept through."""
    model, batches = saved(folder, family), list(iterate_batches(text()))
    smaller, _ = gf.ghost_model(
        model,
        batches,
        removed=removed,
        options=gf.GhostOptions(**options),
        run=gf.RunOptions(corrections=0),
    )
    ghosts = [copy.deepcopy(ghost) for _, _, ghost in ghosts_of(decoder_layers(smaller))]
    loaded = LoadedComparison(Divergence(smaller, model), *split_sequences(batches, HELD_OUT))
    sweep = sweep_of(folder, batches, shelf)
    climb(sweep, 6, lambda _: None)
    pairs = zip(removed_intervals(removed, 6), ghosts, strict=True)
    gaps = [Gap(*gap, ghost) for gap, ghost in pairs]
    split = SweptSplit.of(sweep, batches, HELD_OUT)
    return loaded, SweptComparison(sweep, gaps, split)


def directions_at(point: Sequence[torch.Tensor], count: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(p.shape, generator=generator).double() * 0.02 for p in point]
        for _ in range(count)
    ]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_answers_are_those_in_memory(tmp_path: Path, family: str) -> None:
    loaded, swept = both(tmp_path, family, [1, 3, 4])
    assert_same_answers(loaded, swept)


@pytest.mark.parametrize(
    ("removed", "options"),
    [
        ([0, 3, 5], {"first_state": "on"}),
        ([5], {}),
        ([0, 1], {"features": "raw", "bias": True}),
        ([1, 2, 4], {"bias": True, "first_state": "off"}),
    ],
)
def test_gaps_at_the_ends_and_other_ghosts(
    tmp_path: Path, removed: list[int], options: dict[str, Any]
) -> None:
    loaded, swept = both(
        tmp_path / "dense", "llama", removed, FolderShelf(tmp_path / "s"), **options
    )
    assert_same_answers(loaded, swept)
    left = {path.stem for path in (tmp_path / "s").iterdir()}
    assert left == {boundary_name(boundary) for boundary in range(7)}, "what was used is gone"


def assert_same_answers(loaded: LoadedComparison, swept: SweptComparison) -> None:
    assert swept.num_training == loaded.num_training == 13
    numbers = [*range(5), 12, 0]
    for mine, theirs in zip(swept.gradients(numbers), loaded.gradients(numbers), strict=True):
        assert mine.num_tokens == theirs.num_tokens > 100
        one, other = mine.equations(), theirs.equations()
        for name in ("gram", "cross", "feature_sum", "delta_sum"):
            assert relative_rms(getattr(one, name), getattr(other, name)) <= 1e-5, name
        change = torch.eye(32, dtype=torch.float64)
        scaled = (item.output_scaled(change, 1.0) for item in (mine, theirs))
        assert relative_rms(*scaled) <= 1e-5
    assert swept.value() == pytest.approx(loaded.value(), rel=1e-5)
    point = loaded.moved.parameters64()
    directions = directions_at(point, 2)
    mine, theirs = (item.local_model(point, directions) for item in (swept, loaded))
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert relative_rms(mine[1], theirs[1]) <= 1e-5
    assert relative_rms(mine[2], theirs[2]) <= 1e-5
    for old, new in zip(point, swept.moved.parameters64(), strict=True):
        assert torch.equal(old, new), "the ghosts are where they were"


def test_a_model_of_bf16_gives_nearly_the_same(tmp_path: Path) -> None:
    """Each way rounds at the same places, but for the head's slices."""
    model = saved(tmp_path, "llama", torch.bfloat16)
    batches = list(iterate_batches(text()))
    run = gf.RunOptions(corrections=0)
    smaller, _ = gf.ghost_model(model, batches, removed=[1, 3], run=run)
    ghosts = [copy.deepcopy(ghost) for _, _, ghost in ghosts_of(decoder_layers(smaller))]
    loaded = LoadedComparison(Divergence(smaller, model), *split_sequences(batches, HELD_OUT))
    sweep = sweep_of(tmp_path, batches)
    climb(sweep, 6, lambda _: None)
    gaps = [Gap(1, 2, ghosts[0]), Gap(3, 4, ghosts[1])]
    swept = SweptComparison(sweep, gaps, SweptSplit.of(sweep, batches, HELD_OUT))
    assert swept.value() == pytest.approx(loaded.value(), rel=0.02)
    for mine, theirs in zip(swept.gradients(range(8)), loaded.gradients(range(8)), strict=True):
        assert relative_rms(mine.equations().cross, theirs.equations().cross) <= 0.05


def test_layers_above_the_first_gap_are_read_once_a_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, swept = both(tmp_path, "llama", [1, 3])
    seen: list[int] = []
    heads: list[None] = []
    layer, head = FolderSource.layer, FolderSource.head

    def counted(source: FolderSource, index: int, then: int | None = None) -> Any:
        seen.append(index)
        return layer(source, index, then)

    def counted_head(source: FolderSource) -> Any:
        heads.append(None)
        return head(source)

    monkeypatch.setattr(FolderSource, "layer", counted)
    monkeypatch.setattr(FolderSource, "head", counted_head)
    swept.gradients(range(13))
    assert seen == [2, 4, 5, 5, 4, 2] and len(heads) == 1
    seen.clear()
    swept.value()
    assert seen == [2, 4, 5] and len(heads) == 2
    seen.clear()
    point = swept.moved.parameters64()
    swept.local_model(point, directions_at(point, 3))
    assert seen == [2, 4, 5] and len(heads) == 3


def test_weights_are_gone_and_memory_keeps_no_states(tmp_path: Path) -> None:
    shelf = MemoryShelf()
    _, swept = both(tmp_path, "llama", [1, 3], shelf)
    swept.gradients(range(13))
    swept.value()
    decoder = swept._source.decoder
    assert all(weight.is_meta for weight in decoder.model.parameters())
    assert set(shelf._lists) == {boundary_name(boundary) for boundary in range(7)}


def test_what_is_not_finite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, swept = both(tmp_path, "llama", [1, 3])
    with torch.no_grad():
        swept.moved.parameters[1][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="finite states and gradients at the ghost"):
        swept.gradients(range(13))


def test_sequences_are_those_of_the_split_with_their_places(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    batches = list(iterate_batches(text()))
    split = SweptSplit.of(sweep_of(tmp_path, batches), batches, 90)
    for rows, sequences in zip(
        (split.train, split.judges), split_sequences(batches, 90), strict=True
    ):
        assert len(rows) == len(sequences) > 1
        for row, sequence in zip(rows, sequences, strict=True):
            assert row.place is not None
            held = batches[row.place]
            assert torch.equal(row.batch.input_ids, sequence.input_ids)
            assert torch.equal(held.input_ids[row.row], sequence.input_ids[0])
            assert torch.equal(held.attention_mask[row.row], sequence.attention_mask[0])
    counts = Counter(row.place for row in (*split.train, *split.judges))
    assert counts == {0: 4, 1: 4, 2: 3, 3: 1, 4: 3}, "two too many to judge by are left out"
