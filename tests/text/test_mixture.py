"""Several texts as one, in shares."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tiny_text import tiny_tokenizer

from ghosted_fast.errors import ArgumentError, SourceError
from ghosted_fast.text.loading import token_batches
from ghosted_fast.text.mixture import mix_texts

LENGTH = 8
FILLERS = [f"w{i}" for i in range(70)]


def words(first: int, count: int) -> Iterator[str]:
    """Yield texts, of which no two in a row of 30 are the same, out of 30 fillers of their own."""
    for place in range(count):
        yield FILLERS[first + place % 30]


def mixed(rows: int, shares: dict[str, float] | None = None, **options: Any) -> torch.Tensor:
    sources = {"a": words(0, 9000), "b": words(30, 9000)}
    return torch.cat(mix_texts(tiny_tokenizer(), sources, rows * LENGTH, shares, LENGTH, **options))


def source_of(rows: torch.Tensor) -> list[str]:
    """Tell which text each row is of, by its words; each row is of one."""
    middle = int(tiny_tokenizer().convert_tokens_to_ids("w30"))
    of_b = rows >= middle
    assert torch.equal(of_b.all(1), of_b.any(1))
    return ["b" if item else "a" for item in of_b[:, 0].tolist()]


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_shares_hold_in_each_block(share: float) -> None:
    rows = source_of(mixed(160, {"a": share, "b": 1 - share}))
    assert rows.count("a") == 160 * share
    for start in range(0, 160, 16):
        assert abs(rows[start : start + 16].count("a") - 16 * share) <= 1


def test_every_fold_has_both() -> None:
    rows = source_of(mixed(320))
    for fold in range(4):
        assert 24 < rows[fold::4].count("a") < 56, "of 80 a fold has about half"


def test_rows_are_those_of_each_text_and_none_comes_twice() -> None:
    rows = mixed(64, {"b": 0.25, "a": 0.75})
    sources = source_of(rows)
    for name, first, count in (("a", 0, 48), ("b", 30, 16)):
        alone = token_batches(tiny_tokenizer(), words(first, 9000), count * LENGTH, LENGTH)
        of_it = [row for row, source in zip(rows, sources, strict=True) if source == name]
        assert torch.equal(torch.stack(of_it), torch.cat(alone))


def test_the_seed_decides_the_order_alone() -> None:
    before = random.getstate()
    first, other = mixed(48), mixed(48, seed=1)
    assert random.getstate() == before
    assert torch.equal(first, mixed(48)) and torch.equal(first[:37], mixed(37))
    assert source_of(first) != source_of(other)
    assert sorted(first.tolist()) == sorted(other.tolist())


def test_batches_and_bos() -> None:
    sources = {"a": words(0, 900), "b": words(30, 900)}
    batches = mix_texts(tiny_tokenizer(adds_bos=True), sources, 5 * LENGTH, None, LENGTH, 2)
    assert [list(batch.shape) for batch in batches] == [[2, LENGTH], [2, LENGTH], [1, LENGTH]]
    assert (torch.cat(batches)[:, 0] == 1).all() and not (torch.cat(batches)[:, 1:] == 1).any()


def test_a_text_that_ends_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def sources() -> dict[str, Any]:
        return {"own": own, "web": words(0, 90)}

    wanted: list[int] = []

    def own(tokens: int) -> Iterator[str]:
        wanted.append(tokens)
        return words(30, 9000)

    how = tiny_tokenizer(), LENGTH
    with pytest.raises(SourceError, match=r"expected 512 .*: the text 'web' ended after 90 of 256"):
        mix_texts(how[0], sources(), 64 * LENGTH, None, LENGTH)
    assert not wanted and not caplog.records, "what writes text is not asked in vain"
    rows = torch.cat(mix_texts(how[0], sources(), 64 * LENGTH, None, LENGTH, fewest=16 * LENGTH))
    assert source_of(rows).count("a") == 11 and 16 < len(rows) < 32
    [warning] = caplog.records
    assert "the text 'web' ended after 90 of 256 tokens, and" in warning.getMessage()
    assert f"{len(rows) * LENGTH} of the 512 tokens" in warning.getMessage()
    assert wanted == [(len(rows) - 11) * LENGTH]
    assert torch.equal(rows, mixed_of_long_ones(len(rows)))


def mixed_of_long_ones(rows: int) -> torch.Tensor:
    """Return the first rows of the same mixture, where no text ends."""
    sources = {"own": words(30, 9000), "web": words(0, 9000)}
    return torch.cat(mix_texts(tiny_tokenizer(), sources, rows * LENGTH, None, LENGTH))


def test_the_shortest_of_several_decides(caplog: pytest.LogCaptureFixture) -> None:
    sources = {"a": words(0, 90), "b": words(30, 40), "c": words(0, 9000)}
    rows = torch.cat(mix_texts(tiny_tokenizer(), sources, 512, None, LENGTH, fewest=LENGTH))
    assert 15 <= len(rows) <= 18
    [warning] = caplog.records
    assert "the text 'b' ended after 40 of" in warning.getMessage()


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 1.0}, r"expected a share of each text \(a, b\), got shares of a"),
        ({"a": 0.5, "c": 0.5}, "got shares of a, c"),
        ({"a": 0.5, "b": 0.4}, "above 0 that add up to 100%, got 50% [+] 40%"),
        ({"a": 1.5, "b": -0.5}, "add up to 100%, got 150% [+] -50%"),
        ({"a": float("nan"), "b": 0.5}, "add up to 100%, got nan% [+] 50%"),
        ({"a": 0.995, "b": 0.005}, "give each text a row of 8, got none for 'b' of 128"),
    ],
)
def test_shares_that_are_refused(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        mixed(16, shares)
    with pytest.raises(ArgumentError, match="expected texts to mix, got none"):
        mix_texts(tiny_tokenizer(), {}, 512)


def test_shares_are_as_near_as_they_can_be_written() -> None:
    sources = {name: words(0, 900) for name in "abc"}
    shares = dict.fromkeys(sources, 0.333)
    assert len(torch.cat(mix_texts(tiny_tokenizer(), sources, 240, shares, LENGTH))) == 30


def test_an_error_names_the_text() -> None:
    def damaged() -> Iterator[str]:
        yield "cat"
        raise SourceError("it is damaged")

    with pytest.raises(SourceError, match="text 'b': it is damaged"):
        mix_texts(tiny_tokenizer(), {"a": words(0, 90), "b": damaged()}, 64, None, LENGTH)
