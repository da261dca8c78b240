"""Removing layers and placing ghosts: values, numbering, configuration, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from support.dense_reference import (
    INTERVALS,
    KEPT,
    NUM_LAYERS,
    REMOVED,
    expected_logits,
    random_ghost,
    random_ghosts,
)
from torch import nn
from transformers import AutoModelForCausalLM

from ghosted_fast.errors import ArgumentError, UnsupportedModelError
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import prune_model, remove_layers, removed_intervals, share_copy
from ghosted_fast.surgery.removable import check_removable
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, relative_rms, tiny_config, tiny_model


def logits(model: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **inputs).logits


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ([3], [(3, 4)]),
        ([2, 0, 1], [(0, 3)]),
        ([0, 2, 3, 5], [(0, 1), (2, 4), (5, 6)]),
        (torch.tensor([4, 5]), [(4, 6)]),
        ({1, 2}, [(1, 3)]),
        (range(1, 6), [(1, 6)]),
    ],
)
def test_removed_intervals(removed: Any, expected: list[tuple[int, int]]) -> None:
    assert removed_intervals(removed, 6) == expected


@pytest.mark.parametrize(
    ("removed", "error", "message"),
    [
        ([], ArgumentError, "at least one layer to remove"),
        ([6], ArgumentError, r"layers in 0\.\.5"),
        ([-1], ArgumentError, r"layers in 0\.\.5"),
        ([1, 1], ArgumentError, "each layer once"),
        (range(6), ArgumentError, "at least one of the 6 layers to be kept"),
        ([1.0], TypeError, "integers"),
        ([True], TypeError, "integers"),
        (["1"], TypeError, "integers"),
    ],
)
def test_removed_intervals_refuses(removed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        removed_intervals(removed, 6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_ghosted_model_equals_the_reference(family: str, inplace: bool) -> None:
    dense, ghosts, tokens = tiny_model(family, NUM_LAYERS), random_ghosts(), random_tokens(2, 20)
    expected = expected_logits(dense, tokens, INTERVALS, ghosts)
    unghosted = expected_logits(dense, tokens, INTERVALS, [None] * 3)
    model = remove_layers(dense, REMOVED, ghosts, inplace=inplace)
    assert (model is dense) == inplace
    assert relative_rms(logits(model, tokens), expected) < 1e-5
    assert relative_rms(unghosted, expected) > 0.1, "the ghosts must matter"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_pruned_model_equals_skipping(family: str) -> None:
    dense, tokens = tiny_model(family, NUM_LAYERS), random_tokens(2, 20)
    before = logits(dense, tokens)
    expected = expected_logits(dense, tokens, [(1, 3), (4, 5)], [None, None])
    pruned = prune_model(dense, [4, 1, 2])
    assert relative_rms(logits(pruned, tokens), expected) < 1e-5
    assert type(pruned) is type(dense)
    assert type(pruned.config) is type(dense.config)
    assert torch.equal(logits(dense, tokens), before), "the dense model changed"
    assert dense.config.num_hidden_layers == len(decoder_layers(dense)) == NUM_LAYERS


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_left_padded_batch_equals_the_reference(family: str) -> None:
    dense, ghosts = tiny_model(family, NUM_LAYERS), random_ghosts()
    tokens, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    expected = expected_logits(dense, tokens, INTERVALS, ghosts, mask)
    model = remove_layers(dense, REMOVED, ghosts)
    actual = logits(model, tokens, attention_mask=mask)
    assert relative_rms(actual[mask.bool()], expected[mask.bool()]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ghosts_are_cast_to_the_model(dtype: torch.dtype) -> None:
    dense, tokens = tiny_model("llama", NUM_LAYERS), random_tokens(1, 9)
    exact = expected_logits(dense, tokens, INTERVALS, random_ghosts())
    model = remove_layers(dense.to(dtype), REMOVED, random_ghosts())
    assert model.model.layers[0].ghost.weight.dtype == dtype
    assert relative_rms(logits(model, tokens), exact) < 0.1


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_numbering_and_configuration_agree(family: str) -> None:
    dense = tiny_model(family, NUM_LAYERS)
    kinds = getattr(dense.config, "layer_types", None)
    for model in (prune_model(dense, REMOVED), remove_layers(dense, REMOVED, random_ghosts())):
        layers, config = decoder_layers(model), model.config
        assert config.num_hidden_layers == len(layers) == len(KEPT)
        for position, layer in enumerate(layers):
            numbers = {m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")}
            assert numbers == {position}
        if kinds is not None:
            assert config.layer_types == [kinds[layer] for layer in KEPT]
            attention = [layer.self_attn for layer in layers]
            assert [a.layer_type for a in attention] == config.layer_types
        shared = {id(m.config) for m in model.modules() if hasattr(m, "config")}
        assert shared == {id(config)}
        assert config is not dense.config


def test_sparse_layers_of_qwen3_moe_are_listed() -> None:
    config = tiny_config("qwen3_moe", num_layers=8)
    config.mlp_only_layers, config.decoder_sparse_step = [3], 2
    model = AutoModelForCausalLM.from_config(config)
    dense_mlp = [0, 2, 3, 4, 6]
    pruned = prune_model(model, [1, 2])
    kept = [0, 3, 4, 5, 6, 7]
    assert pruned.config.mlp_only_layers == [i for i, old in enumerate(kept) if old in dense_mlp]
    assert pruned.config.decoder_sparse_step == 1
    rebuilt = AutoModelForCausalLM.from_config(copy.deepcopy(pruned.config))
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in pruned.state_dict().items()
    }
    assert model.config.decoder_sparse_step == 2


def test_a_kind_of_attention_may_vanish() -> None:
    dense, tokens = tiny_model("gemma3_text", NUM_LAYERS), random_tokens(1, 20)
    full = [i for i, kind in enumerate(dense.config.layer_types) if kind == "full_attention"]
    expected = expected_logits(dense, tokens, [(full[0], full[0] + 1)], [None])
    pruned = prune_model(dense, full)
    assert set(pruned.config.layer_types) == {"sliding_attention"}
    assert relative_rms(logits(pruned, tokens), expected) < 1e-5
    rebuilt = AutoModelForCausalLM.from_config(copy.deepcopy(pruned.config))
    rebuilt.load_state_dict(pruned.state_dict())
    assert torch.equal(logits(rebuilt.eval(), tokens), logits(pruned, tokens))


def test_flag_of_sliding_layers_follows() -> None:
    config = tiny_config("qwen2")
    config.layer_types = ["sliding_attention", *["full_attention"] * 5]
    config.sliding_window = 8
    dense, tokens = AutoModelForCausalLM.from_config(config).eval(), random_tokens(1, 20)
    assert prune_model(dense, [1]).model.has_sliding_layers
    pruned = prune_model(dense, [0])
    assert not pruned.model.has_sliding_layers
    expected = expected_logits(dense, tokens, [(0, 1)], [None])
    assert relative_rms(logits(pruned, tokens), expected) < 1e-5


def test_base_model_without_head() -> None:
    dense, tokens = tiny_model("llama", NUM_LAYERS), random_tokens(2, 9)
    whole = remove_layers(dense, REMOVED, random_ghosts())
    base = remove_layers(dense.model, REMOVED, random_ghosts())
    assert type(base).__name__ == "GhostedLlamaModel"
    with torch.no_grad():
        assert torch.equal(base(tokens)[0], whole.model(tokens)[0])


@pytest.mark.parametrize("kind", ["causal", "base"])
def test_hidden_states_are_recorded_behind_the_ghost(kind: str) -> None:
    dense = tiny_model("llama", NUM_LAYERS)
    ghost = random_ghost(0, first_state=True)
    model = remove_layers(dense if kind == "causal" else dense.model, [1], [ghost])
    seen: list[torch.Tensor] = []
    decoder_layers(model)[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        states = model(random_tokens(1, 5), output_hidden_states=True).hidden_states
    assert len(states) == NUM_LAYERS
    assert torch.equal(states[1], seen[0])


def test_share_copy_shares_memory_and_nothing_else() -> None:
    model = tiny_model("llama", NUM_LAYERS)
    model.lm_head.weight = model.model.embed_tokens.weight
    twin = share_copy(model)
    for name, parameter in model.named_parameters():
        assert twin.get_parameter(name).data_ptr() == parameter.data_ptr()
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.config is not model.config
    twin.to(torch.bfloat16)
    twin.requires_grad_(False)
    twin.model.layers = twin.model.layers[:2]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert len(model.model.layers) == NUM_LAYERS


def test_in_place_surgery_leaves_models_of_the_same_configuration_alone() -> None:
    config = tiny_config("llama")
    first, second = (
        AutoModelForCausalLM.from_config(config),
        type(tiny_model("llama", NUM_LAYERS))(config),
    )
    first.config = second.config
    remove_layers(first, [1], [random_ghost(0)], inplace=True)
    assert second.config.num_hidden_layers == 6
    assert second.config.model_type == "llama"


def test_second_removal_keeps_ghosts_and_records_dense_indices() -> None:
    dense, tokens = tiny_model("llama", NUM_LAYERS), random_tokens(1, 9)
    early, late = random_ghost(1, first_state=True), random_ghost(2)
    both = remove_layers(dense, [2, 6], [early, late])
    once = remove_layers(dense, [2], [early])
    twice = remove_layers(once, [5], [late])
    assert torch.equal(logits(twice, tokens), logits(both, tokens))
    assert twice.config.ghost == both.config.ghost
    assert both.config.ghost["removed"] == [2, 6]
    pruned = prune_model(twice, [0])
    assert pruned.config.ghost["removed"] == [0, 2, 6]
    assert [entry["layer"] for entry in pruned.config.ghost["ghosts"]] == [0, 3]
    assert once.config.ghost["removed"] == [2]
    # A gap that swallows a ghosted layer swallows its ghost.
    wider = remove_layers(once, [1, 2], [late])
    direct = remove_layers(dense, [1, 2, 3], [late])
    assert torch.equal(logits(wider, tokens), logits(direct, tokens))
    assert wider.config.ghost == direct.config.ghost


def test_second_ghost_in_one_place_is_refused() -> None:
    once = remove_layers(tiny_model("llama", NUM_LAYERS), [2], [random_ghost(1)])
    with pytest.raises(ArgumentError, match="a ghost already stands"):
        remove_layers(once, [2], [random_ghost(2)])
    assert len(decoder_layers(once)) == NUM_LAYERS - 1


@pytest.mark.parametrize(
    ("ghosts", "error", "message"),
    [
        ([None], ArgumentError, "expected 3 ghosts"),
        ([GhostLinear(16), None, None], ArgumentError, "hidden_size 32"),
        ([nn.Linear(32, 32), None, None], TypeError, "expected a GhostLinear"),
    ],
)
def test_ghosts_that_do_not_fit_are_refused(
    ghosts: list[Any], error: type[Exception], message: str
) -> None:
    dense = tiny_model("llama", NUM_LAYERS)
    with pytest.raises(error, match=message):
        remove_layers(dense, REMOVED, ghosts, inplace=True)
    assert len(decoder_layers(dense)) == NUM_LAYERS


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_hidden_layers": 5}, "num_hidden_layers = 6"),
        ({"layer_types": ["full_attention"]}, "config.layer_types"),
    ],
)
def test_configuration_that_contradicts_the_model_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    dense = tiny_model("qwen2")
    vars(dense.config).update(changed)
    with pytest.raises(UnsupportedModelError, match=message):
        prune_model(dense, [0])


def test_ghosts_may_be_mixed_with_empty_gaps() -> None:
    dense, tokens = tiny_model("gemma2", NUM_LAYERS), random_tokens(1, 9)
    ghosts = [None, random_ghost(1), None]
    expected = expected_logits(dense, tokens, INTERVALS, ghosts)
    model = remove_layers(dense, REMOVED, ghosts)
    assert relative_rms(logits(model, tokens), expected) < 1e-5


@pytest.mark.parametrize("kind", ["causal", "base"])
def test_copies_and_pickles_compute_the_same(kind: str) -> None:
    dense, tokens = tiny_model("gpt2", NUM_LAYERS), random_tokens(2, 9)
    model = remove_layers(
        dense if kind == "causal" else dense.transformer, REMOVED, random_ghosts()
    )
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(tokens)[0]
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
            share_copy(model),
        ):
            assert type(twin) is type(model)
            assert torch.equal(twin(tokens)[0], expected)


def test_class_names_stay_for_device_maps() -> None:
    dense = tiny_model("llama", NUM_LAYERS)
    model = remove_layers(dense, REMOVED, random_ghosts())
    names = {type(layer).__name__ for layer in model.model.layers}
    assert names == {"LlamaDecoderLayer"} == set(model._no_split_modules)
    assert isinstance(model, type(dense))


def test_accelerate_hooks_run_the_ghost() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    dense, tokens, ghosts = tiny_model("llama", NUM_LAYERS), random_tokens(2, 9), random_ghosts()
    expected = expected_logits(dense, tokens, INTERVALS, ghosts)
    for module in [dense, dense.model, *dense.model.layers]:
        hooks.add_hook_to_module(module, hooks.ModelHook())
    model = remove_layers(dense, REMOVED, ghosts)
    assert relative_rms(logits(model, tokens), expected) < 1e-5


def test_patched_forward_is_refused() -> None:
    dense = tiny_model("llama", NUM_LAYERS)
    layer = dense.model.layers[0]
    layer.forward = layer.forward
    with pytest.raises(UnsupportedModelError, match="remove the patch"):
        remove_layers(dense, [1], [random_ghost(0)], inplace=True)
    assert len(decoder_layers(dense)) == dense.config.num_hidden_layers == NUM_LAYERS


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    model = remove_layers(tiny_model(family, NUM_LAYERS), REMOVED, random_ghosts()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tokens = random_tokens(2, 9)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert any(".ghost.weight" in name for name in plain)
    assert any(".ghost.first_state" in name for name in plain)
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert relative_rms(checkpointed[name], gradient) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize(("family", "backend"), [("llama", "aot_eager"), ("gemma2", "eager")])
def test_compiles_as_one_graph(family: str, backend: str) -> None:
    ghosts = random_ghosts()[1:]
    model = remove_layers(tiny_model(family, 4), [0, 2], ghosts)
    tokens, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        actual = compiled(tokens, attention_mask=mask, use_cache=False).logits
    assert relative_rms(actual, expected) < 1e-5


def test_a_model_whose_kernels_are_missing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, tokens = tiny_model("llama", NUM_LAYERS), random_tokens(2, 9, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("no such kernel here")

    with monkeypatch.context() as patch:
        patch.setattr(type(decoder_layers(dense)[0].mlp), "forward", fail)
        with pytest.raises(UnsupportedModelError, match="no such kernel here"):
            check_removable(dense, REMOVED)
        smaller = remove_layers(dense, REMOVED, random_ghosts())
        patch.setattr(type(decoder_layers(dense)[0].mlp), "forward", lambda *_: 1 / 0)
        with pytest.raises(UnsupportedModelError, match="ZeroDivisionError"):
            remove_layers(dense, REMOVED, random_ghosts())
    expected = remove_layers(dense, REMOVED, random_ghosts())
    assert torch.equal(logits(smaller, tokens), logits(expected, tokens))
