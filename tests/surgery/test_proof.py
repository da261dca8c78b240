"""A cut model is what is loaded: where its configuration cannot say so, it is built whole."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_wrappers import tiny_wrapper
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models import built_whole
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.serving.vllm.configuration import check_native
from ghosted_fast.surgery import proof
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.surgery.removable import check_removable
from ghosted_fast.testing import random_tokens, tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
KINDS = ["sliding_attention", "full_attention"] * 3
FAMILIES: dict[str, dict[str, Any]] = {
    # Attention in every fourth layer, experts in every second one: rules, not lists.
    "jamba": {
        "num_hidden_layers": 8,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    # Residuals are scaled by the root of the number of layers.
    "minicpm3": {
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    # The first layer is dense, the others have experts.
    "deepseek_v3": {
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    # Settings of single layers, an embedding for each of them, shared keys, a last layer of one
    # kind.
    "gemma4_text": {
        "num_hidden_layers": 6,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 16,
        "hidden_size_per_layer_input": 6,  # by chance as many as there are layers
        "vocab_size_per_layer_input": 97,
        "num_kv_shared_layers": 2,
        "layer_types": KINDS,
    },
}


def tiny(name: str) -> Any:
    torch.manual_seed(7)
    config = CONFIG_MAPPING[name](**{**SIZES, **FAMILIES[name]}, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(random_tokens(2, 12, 3), use_cache=False).logits
    return found


@torch.inference_mode()
def passed_by(model: Any, removed: list[int]) -> torch.Tensor:
    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layers = Decoder.of(model).layers
    handles = [layers[i].register_forward_hook(hook, with_kwargs=True) for i in removed]
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cut", ["first", "middle", "last"])
def test_any_cut_is_what_is_loaded(name: str, cut: str, tmp_path: Path) -> None:
    model = tiny(name)
    last = Decoder.of(model).num_layers - 1
    removed = {"first": [0], "middle": [1], "last": [last]}[cut]
    check_removable(model, removed)
    smaller = prune_model(model, removed)
    assert torch.allclose(logits(smaller), passed_by(model, removed), atol=1e-5)
    save_model(smaller, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again), logits(smaller))
    prompt = random_tokens(1, 5, 8)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = smaller.generate(prompt, use_cache=False, **greedy)
    assert torch.equal(again.generate(prompt, **greedy), expected)


def test_a_second_cut_is_one_cut(tmp_path: Path) -> None:
    model = tiny("jamba")
    twice = prune_model(prune_model(model, [1]), [3, 4])  # 4 and 5 of the dense model
    assert torch.equal(logits(twice), logits(prune_model(model, [1, 4, 5])))
    save_model(twice, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again), logits(twice))
    assert again.config.ghost["removed"] == [1, 4, 5]
    assert again.config.layers_block_type == ["mamba", "attention", "mamba", "attention", "mamba"]


def test_a_family_that_its_configuration_describes_stays_one_of_its_own() -> None:
    assert prune_model(tiny_model("llama"), [2]).config.model_type == "llama"
    assert prune_model(tiny("deepseek_v3"), [3]).config.model_type == "deepseek_v3"
    assert prune_model(tiny("deepseek_v3"), [0]).config.model_type == "ghosted_deepseek_v3"


def test_what_the_dense_model_would_lose_as_well_is_no_fault_of_the_cut() -> None:
    model = tiny_model("llama")
    model.model.layers[3].mlp.extra = torch.nn.Linear(2, 2)
    model.model.layers[3].mlp.scale = 3.0
    assert len(prune_model(model, [1]).model.layers) == 5
    assert len(prune_model(model, [1], inplace=True).model.layers) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda layer: vars(layer.self_attn).update(scaling=0.1), r"layers.1.self_attn.scaling"),
        (
            lambda layer: setattr(layer, "mlp", torch.nn.Identity()),
            r"weight .*layers.1.mlp.down_proj",
        ),
        (lambda layer: layer.register_buffer("table", torch.ones(3)), r"weight .*layers.1.table"),
    ],
)
def test_a_cut_that_no_file_describes_is_refused(
    change: Callable[[Any], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    build = proof._built_anew

    def another(cut: Any) -> Any:
        built = build(cut)
        if cut is not model:
            change(built.model.layers[1])
        return built

    monkeypatch.setattr(proof, "_built_anew", another)
    with pytest.raises(UnsupportedModelError, match=rf"layers 2-3 cannot be removed.*{said}"):
        prune_model(model, [2, 3])
    with pytest.raises(UnsupportedModelError, match=said):
        prune_model(model, [2, 3], inplace=True)
    assert len(model.model.layers) == 6  # as it was


def test_towers_beside_the_decoder_are_compared_by_their_own_names() -> None:
    model = tiny_wrapper("llava")
    tower = model.model.vision_tower
    tower.encoder.layers[1].extra = torch.nn.Linear(2, 2)  # in no configuration
    assert Decoder.of(prune_model(model, [0, 1, 2, 3, 4])).num_layers == 1


def test_layers_may_come_from_anything_that_gives_them_once() -> None:
    with pytest.raises(UnsupportedModelError, match="expected layer 2 to be kept"):
        check_removable(_with_a_layer_that_looks_back(), iter([2, 3]))


def _with_a_layer_that_looks_back() -> Any:
    """Return a model whose fifth layer adds what the third one computed."""
    model = tiny_model("llama")
    seen: list[torch.Tensor] = []
    # Hooks are copied with the layers, and a layer that is passed by still runs.
    model.model.layers[2].register_forward_hook(lambda *io: seen.append(io[2].clone()))
    model.model.layers[4].register_forward_hook(lambda *io: io[2] + (seen.pop() if seen else 0.0))
    return model


def test_layers_that_were_tried_alone_are_let_go() -> None:
    model = _with_a_layer_that_looks_back()
    with pytest.raises(UnsupportedModelError):
        check_removable(model, [2, 3])
    layer = weakref.ref(model.model.layers[3])
    prune_model(model, [3], inplace=True)
    gc.collect()
    assert layer() is None


def test_layers_that_count_tokens_stay() -> None:
    model = tiny("jamba")
    with pytest.raises(UnsupportedModelError, match="one of the layers 2, 6 to be kept"):
        prune_model(model, [2, 5, 6])


def test_layers_whose_keys_are_shared_stay() -> None:
    model = tiny("gemma4_text")
    with pytest.raises(UnsupportedModelError, match="layers 2-3 to be kept: the last 2 layers"):
        check_removable(model, [3])
    smaller = prune_model(model, [1, 4])
    assert smaller.config.num_kv_shared_layers == 1
    tables = smaller.model.embed_tokens_per_layer.weight, model.model.embed_tokens_per_layer.weight
    assert [table.shape[1] for table in tables] == [4 * 6, 6 * 6]


def test_names_of_layers_in_a_quantization_follow() -> None:
    config = tiny_model("llama").config
    config.quantization_config = {
        "quant_method": "fp8",
        "modules_to_not_convert": [
            "lm_head",
            "vision_tower.encoder.layers.0",
            "model.layers.0.mlp",
            "model.layers.10",
            "layers.3.x",
        ],
        "dynamic": {"model.layers.4.self_attn": {"bits": 8}},
    }
    from ghosted_fast.models.cut_config import cut_config
    from ghosted_fast.models.families import Family

    cut_config(config, Family("llama"), [1, 3, 4, 5], 6)
    assert config.quantization_config["modules_to_not_convert"] == [
        "lm_head",
        "vision_tower.encoder.layers.0",
        "layers.1.x",
    ]
    assert config.quantization_config["dynamic"] == {"model.layers.2.self_attn": {"bits": 8}}


def test_configurations_are_as_they_were_after_building() -> None:
    smaller = prune_model(tiny("gemma4_text"), [5])
    assert smaller.config.layer_types == KINDS[:5]
    read = AutoConfig.for_model(**smaller.config.to_dict())
    assert read.layer_types == KINDS[:5] and read.num_hidden_layers == 5


def test_lists_that_are_as_long_as_the_layers_by_chance_stay() -> None:
    model = tiny_model("llama")
    model.config.eos_token_id = [2, 3, 4, 5, 6, 7]
    model.config.scales = [0, 1, 0, 1, 0, 1]
    pruned = prune_model(model, [1, 2])
    assert pruned.config.eos_token_id == [2, 3, 4, 5, 6, 7]
    assert pruned.config.scales == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ({0: 0, 1: 1, 2: 2}, 1),
        ({1: 2, 4: 5}, 1),  # counted from 1
        ({0: 0, 1: 2, 3: 6}, 2),  # two caches a layer
        ({0: 1, 1: 3, 2: 5}, 2),
        ({0: 2, 1: 4, 2: 6}, 0),  # a scale that grows with depth
        ({0: 3, 1: 3, 2: 3}, 0),
        ({0: 0, 1: 1, 2: 1}, 0),
        ({5: 5}, 1),
        ({5: 2}, 0),
    ],
)
def test_indices_are_told_from_other_numbers(values: dict[int, int], step: int) -> None:
    assert built_whole._step_of(values) == step


@pytest.mark.parametrize("name", ["evolla", "chameleon"])
def test_the_decoder_is_found_beside_other_lists_of_its_length(name: str) -> None:
    model = tiny_wrapper(name)
    decoder = Decoder.of(model)
    shorter = Decoder.of(prune_model(model, [1]))
    ran: list[int] = []
    for index, layer in enumerate(shorter.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.inference_mode():
        shorter.model(input_ids=random_tokens(1, 6, 2) % 30 + 5, use_cache=False)
    assert ran == list(range(decoder.num_layers - 1))


def test_vllm_is_given_only_what_its_classes_can_build() -> None:
    check_native("GhostedQwen3MoeForCausalLM", _ghosted_config(tiny_model("qwen3_moe"), [2]))
    with pytest.raises(
        UnsupportedModelError, match=r"GhostedDeepseekV3.*Serve it with transformers"
    ):
        check_native("GhostedDeepseekV3ForCausalLM", _ghosted_config(tiny("deepseek_v3"), [0]))


def _ghosted_config(model: Any, removed: list[int]) -> Any:
    return remove_layers(model, removed, [GhostLinear(32)]).config
