"""Which tokens are the first of their sequence, and that the ghosts hear of it."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.tiny_models import tiny_causal
from support.dense_reference import (
    INTERVALS,
    NUM_LAYERS,
    REMOVED,
    expected_logits,
    random_ghosts,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache

from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.first_token import first_attended, hands_on, mark_of
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, relative_rms, tiny_model


class CacheOfLength:
    """A cache that knows how many tokens it holds, as an int or as a tensor."""

    def __init__(self, length: int | Tensor) -> None:
        self.length = length

    def get_seq_length(self) -> int | Tensor:
        return self.length


def tensor(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


STATIC = torch.tensor(2)
PREPARED = torch.zeros(1, 1, 3, 3)
# attention mask, position ids, cached tokens, expected marks of the (3) current tokens
CASES: list[tuple[Any, Tensor | None, Any, list[list[int]] | None]] = [
    (None, None, 0, [[1, 0, 0], [1, 0, 0]]),
    (None, None, 2, None),
    (None, None, torch.tensor(0), [[1, 0, 0], [1, 0, 0]]),
    (None, None, STATIC, [[0, 0, 0], [0, 0, 0]]),
    (None, tensor([0, 1, 2]), 0, [[1, 0, 0], [1, 0, 0]]),
    (None, tensor([0, 1, 0], [0, 0, 1]), 0, [[1, 0, 1], [1, 1, 0]]),
    (None, tensor([2, 3, 4]), 2, None),
    (None, tensor([2, 3, 4]), STATIC, [[0, 0, 0], [0, 0, 0]]),
    (tensor([1, 1, 1], [0, 0, 1]), None, 0, [[1, 0, 0], [0, 0, 1]]),
    (tensor([0, 0, 0], [0, 1, 0]), None, 0, [[0, 0, 0], [0, 1, 0]]),
    (tensor([1, 1, 0], [0, 1, 1]), tensor([0, 1, 0], [0, 0, 1]), 0, [[1, 0, 0], [0, 1, 0]]),
    (tensor([1, 1, 1], [1, 1, 1]), tensor([0, 1, 0], [0, 1, 2]), 0, [[1, 0, 1], [1, 0, 0]]),
    # Right positions are not given: the mask alone tells.
    (tensor([1, 1, 1], [0, 1, 1]), tensor([0, 1, 2]), 0, [[1, 0, 0], [0, 1, 0]]),
    (tensor([1, 1, 1, 1, 1], [0, 0, 0, 1, 1]), None, 2, [[0, 0, 0], [0, 1, 0]]),
    (tensor([1, 1, 1, 1, 1], [0, 0, 1, 1, 1]), None, STATIC, [[0, 0, 0], [1, 0, 0]]),
    (tensor([1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]), None, 2, [[0, 0, 0], [1, 0, 0]]),
    # A mask too short to tell what was cached says nothing.
    (tensor([1, 1, 1], [1, 1, 1]), tensor([2, 3, 4]), 2, [[0, 0, 0], [0, 0, 0]]),
    (PREPARED, None, 0, [[1, 0, 0], [1, 0, 0]]),
    (PREPARED, tensor([0, 1, 2], [0, 0, 1]), 0, [[1, 0, 0], [1, 1, 0]]),
    (PREPARED, tensor([2, 3, 4], [0, 1, 2]), 2, [[0, 0, 0], [1, 0, 0]]),
    ({"full_attention": PREPARED}, tensor([0, 1, 2], [5, 6, 7]), STATIC, [[1, 0, 0], [0, 0, 0]]),
    (tensor([1.0, 1.0, 1.0], [0.0, 1.0, 1.0]), None, 0, [[1, 0, 0], [0, 1, 0]]),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("embedded", [False, True])
def test_first_attended(case: int, embedded: bool) -> None:
    mask, positions, past, expected = CASES[case]
    tokens = torch.ones(2, 3, 8) if embedded else torch.ones(2, 3, dtype=torch.long)
    first = first_attended(tokens, mask, positions, CacheOfLength(past))
    if expected is None:
        assert first is None
    else:
        assert first is not None and first.dtype == torch.bool and first.is_contiguous()
        assert first.tolist() == [[bool(mark) for mark in row] for row in expected]
    if isinstance(past, int) and past == 0:
        again = first_attended(tokens, mask, positions, None)
        assert again is not None and first is not None and torch.equal(again, first)


def ghosted(family: str) -> tuple[Any, Any, list[GhostLinear]]:
    dense, ghosts = tiny_model(family, NUM_LAYERS), random_ghosts()
    return dense, remove_layers(dense, REMOVED, ghosts), ghosts


@pytest.mark.slow
@pytest.mark.parametrize("cache_kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_prefill_in_pieces(family: str, cache_kind: type) -> None:
    dense, model, ghosts = ghosted(family)
    tokens, mask = random_tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, :6] = 0  # all of the first piece
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = expected_logits(dense, tokens, INTERVALS, ghosts, mask, position_ids=positions)
    cache = cache_kind(config=model.config, **({} if cache_kind is DynamicCache else LENGTH))
    pieces = []
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 11), (11, 12)):
            pieces.append(
                model(
                    tokens[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            )
    actual = torch.cat(pieces, dim=1)
    assert relative_rms(actual[mask.bool()], expected[mask.bool()]) < 1e-5


LENGTH = {"max_cache_len": 12}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_packed_sequences(family: str) -> None:
    dense, model, ghosts = ghosted(family)
    parts = [random_tokens(1, length, seed=length) for length in (5, 7)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    with torch.no_grad():
        packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
    expected = torch.cat([expected_logits(dense, part, INTERVALS, ghosts) for part in parts], 1)
    assert relative_rms(packed, expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_embeddings_and_positional_arguments(family: str) -> None:
    dense, model, ghosts = ghosted(family)
    tokens, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    expected = expected_logits(dense, tokens, INTERVALS, ghosts, mask)[mask.bool()]
    embeddings = model.get_input_embeddings()(tokens)
    decoder_arguments = (tokens, None, mask) if family == "gpt2" else (tokens, mask)
    with torch.no_grad():
        embedded = model(inputs_embeds=embeddings, attention_mask=mask).logits
        states = model.base_model(*decoder_arguments)[0]
        positional = model.get_output_embeddings()(states)
    assert relative_rms(embedded[mask.bool()], expected) < 1e-5
    assert relative_rms(positional[mask.bool()], expected) < 1e-5


def test_layers_without_a_ghost_do_not_see_the_mark() -> None:
    _, model, _ = ghosted("llama")
    seen: list[set[str]] = []
    for module in model.modules():
        if type(module).__name__ == "LlamaAttention":
            module.register_forward_pre_hook(
                lambda _, __, kwargs: seen.append(set(kwargs)), with_kwargs=True
            )
    with torch.no_grad():
        model(random_tokens(1, 4))
    assert len(seen) == NUM_LAYERS - len(REMOVED)
    assert not any("first" in name for names in seen for name in names)


def test_first_tokens_are_sought_once_and_only_if_a_ghost_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor | None:
        calls.append(first_attended(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr("ghosted_fast.models.first_token.first_attended", counted)
    dense, model, _ = ghosted("llama")
    model.generate(random_tokens(1, 4), max_new_tokens=3, do_sample=False)
    assert [call is None for call in calls] == [False, True, True]
    calls.clear()
    with torch.no_grad():
        remove_layers(dense, [1], [GhostLinear(32)])(random_tokens(1, 4))
    assert not calls


@pytest.mark.slow
def test_compiled_decode_with_a_static_cache() -> None:
    dense, ghosts = tiny_model("llama", 3), random_ghosts()[:1]
    model, tokens = remove_layers(dense, [1], ghosts), random_tokens(2, 8)
    expected = expected_logits(dense, tokens, [(1, 2)], ghosts)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        logits = [model(tokens[:, :6], past_key_values=cache, use_cache=True).logits]
        for i in (6, 7):
            step = {"position_ids": torch.tensor([[i]]), "past_key_values": cache}
            logits.append(compiled(tokens[:, i : i + 1], use_cache=True, **step).logits)
    assert relative_rms(torch.cat(logits, 1), expected) < 1e-5


def test_positions_decide_where_a_cache_counts_nothing() -> None:
    # A cache whose first layer holds no keys says 0, however many tokens it has seen.
    mask, token = torch.ones(1, 9, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    first = first_attended(token, mask, torch.tensor([[8]]), CacheOfLength(0))
    assert first is not None and not first.any()
    padded = torch.tensor([[0, 0, 1, 1, 0, 0]])
    tokens, places = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 0, 0, 1]])
    first = first_attended(tokens, padded, places, CacheOfLength(0))
    assert first is not None and first.tolist() == [[False, False, True, False]]


def test_positions_of_several_axes() -> None:
    places = torch.tensor([[[0, 1, 1]], [[0, 0, 1]], [[0, 0, 2]]])
    first = first_attended(torch.zeros(1, 3, dtype=torch.long), None, places)
    assert first is not None and first.tolist() == [[True, False, False]]


@pytest.mark.parametrize(("name", "reached"), [("llama", True), ("gptj", False), ("falcon", False)])
def test_whether_a_mark_reaches_the_layers_is_read_in_the_source(name: str, reached: bool) -> None:
    owner = tiny_causal(name).base_model
    assert hands_on(owner) is reached


@pytest.mark.parametrize("name", ["gptj", "bert", "trocr", "mamba", "openai-gpt"])
def test_marks_reach_ghosts_of_models_of_any_age(name: str) -> None:
    dense = tiny_causal(name)
    width = Decoder.of(dense).hidden_size
    ghost = GhostLinear(width, first_state=True)
    with torch.no_grad():
        ghost.first_state.fill_(3.0)
    smaller = remove_layers(dense, [1], [ghost])
    seen: list[Tensor] = []
    found = next(m for m in smaller.modules() if isinstance(m, GhostLinear))
    found.register_forward_hook(lambda *io: seen.append(io[2]))
    with torch.no_grad():
        smaller(input_ids=random_tokens(2, 5, 1) % 30 + 5, use_cache=False)
    assert (seen[0][:, 0] == 3).all() and not (seen[0][:, 1:] == 3).all(-1).any()


def test_a_copy_leaves_its_marks_to_itself() -> None:
    ghost = GhostLinear(Decoder.of(tiny_causal("gptj")).hidden_size, first_state=True)
    smaller = remove_layers(tiny_causal("gptj"), [1], [ghost])
    for again in (copy.deepcopy(smaller), pickle.loads(pickle.dumps(smaller))):
        holders = {id(m.first_tokens) for m in again.modules() if getattr(m, "first_tokens", None)}
        assert len(holders) == 1
        assert id(smaller.base_model.first_tokens) not in holders
        assert again.base_model.first_tokens.mark is None


@pytest.mark.parametrize(
    ("state", "begins"),
    [
        (None, True),
        (SimpleNamespace(has_previous_state=False), True),
        (SimpleNamespace(has_previous_state=lambda: True), False),
        (SimpleNamespace(seqlen_offset=0), True),
        (SimpleNamespace(seqlen_offset=3), False),
        ([torch.zeros(2)], False),
    ],
)
@pytest.mark.parametrize("name", ["cache_params", "state"])
def test_a_recurrent_state_that_has_seen_tokens_has_no_first(
    state: Any, begins: bool, name: str
) -> None:
    mark = mark_of(["input_ids"], (torch.zeros(1, 2, dtype=torch.long),), {name: state})
    assert (mark is not None) is begins
    assert mark is None or mark.tolist() == [[True, False]]
