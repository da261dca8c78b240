"""A ghosted model in the places where transformers' users put models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dense_reference import NUM_LAYERS, REMOVED, random_ghosts
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.ghosted_layers import ghosts_of
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, relative_rms, tiny_model

pytestmark = pytest.mark.slow

TOKENS = random_tokens(2, 12)


def ghosted(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return remove_layers(tiny_model(family, NUM_LAYERS, dtype), REMOVED, random_ghosts())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def generated(model: Any, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    return model.generate(TOKENS[:1], **options)


def test_text_generation_pipeline(tmp_path: Path) -> None:
    from support.tiny_text import TEXT, tiny_tokenizer

    model, tokenizer = ghosted(), tiny_tokenizer()
    folder = save_model(model, tmp_path / "model", tokenizer)
    writer = pipeline("text-generation", model=str(folder))
    assert type(writer.model) is type(model)
    options = {"max_new_tokens": 6, "do_sample": False}
    answers = writer([TEXT, "the cat"], batch_size=2, return_tensors=True, **options)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert (
        answers[1][0]["generated_token_ids"][-6:] == model.generate(ids, **options)[0, -6:].tolist()
    )


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_device_map(tmp_path: Path, family: str) -> None:
    pytest.importorskip("accelerate")
    model = ghosted(family)
    folder = save_model(model, tmp_path / "model")
    for place in ("auto", "cpu"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=place)
        assert torch.equal(logits(loaded), logits(model))


def test_layers_offloaded_to_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = ghosted()
    folder = save_model(model, tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[3].ghost.weight.is_meta
    assert relative_rms(logits(loaded), logits(model)) < 1e-6


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_dtype(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = ghosted(family)
    folder = save_model(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ghosts = [ghost for _, _, ghost in ghosts_of(decoder_layers(loaded))]
    assert len(ghosts) == 3
    assert all(parameter.dtype == dtype for ghost in ghosts for parameter in ghost.parameters())
    dense = tiny_model(family, NUM_LAYERS)
    # As far from fp32 as the dense model of that dtype is, within the chaos of random layers.
    dense_error = relative_rms(logits(copy.deepcopy(dense).to(dtype)), logits(dense))
    assert relative_rms(logits(loaded), logits(model)) < 8 * dense_error
    assert save_model(loaded, tmp_path / "again").is_dir()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == dtype and torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_static_cache_and_assisted_generation(family: str) -> None:
    model, dense = ghosted(family), tiny_model(family, NUM_LAYERS)
    expected = generated(model)
    assert torch.equal(generated(model, cache_implementation="static"), expected)
    assert torch.equal(generated(model, assistant_model=dense), expected)
    assert torch.equal(generated(dense, assistant_model=model), generated(dense))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_continuous_batching(family: str) -> None:
    """Sequences packed into one row: the state for first tokens goes to each one's first."""
    model = ghosted(family)
    prompts = [TOKENS[0].tolist(), TOKENS[1, :5].tolist()]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    found = model.generate_batch(
        prompts,
        GenerationConfig(**options),
        ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
    )
    for answer in found.values():
        prompt = torch.tensor([answer.prompt_ids])
        assert answer.prompt_ids in prompts
        expected = model.generate(prompt, **options)[0, prompt.shape[1] :]
        assert answer.generated_tokens == expected.tolist()
    assert len(found) == 2


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = ghosted(family).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same dropout
            model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append(
            {
                name: item.grad.clone()
                for name, item in model.named_parameters()
                if item.grad is not None
            }
        )
    plain, checkpointed = gradients
    assert any("ghost.weight" in name for name in plain)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert relative_rms(checkpointed[name], gradient) < 1e-5, name


def trained(model: Any, steps: int = 3) -> list[float]:
    """Return the losses of a few steps of training on what requires gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "ghosts"])
def test_lora_adapters(tmp_path: Path, targets: Any) -> None:
    peft = pytest.importorskip("peft")
    model = ghosted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if targets == "ghosts":  # adapters on nothing else: the ghost's own weight is what is trained
        names = {"target_parameters": ["ghost.weight", "input_ghost.weight"]}
        config = peft.LoraConfig(r=2, target_modules=[], **names)
    else:
        config = peft.LoraConfig(r=2, target_modules=targets)
    adapted = peft.get_peft_model(model, config)
    losses = trained(adapted)
    assert losses[-1] < losses[0]
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = ghosted()
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert relative_rms(logits(reloaded), logits(adapted)) < 1e-5
    merged = reloaded.merge_and_unload()
    assert relative_rms(logits(merged), logits(adapted)) < 1e-4
    changed = {
        name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])
    }
    wanted = "ghost.weight" if targets == "ghosts" else "_proj.weight"
    assert changed and all(name.endswith(wanted) for name in changed)


def test_training_the_ghosts_alone() -> None:
    model = ghosted().requires_grad_(False)
    for _, _, ghost in ghosts_of(decoder_layers(model)):
        ghost.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits(model)  # packs the weights: the training must not leave a stale copy
    losses = trained(model.train())
    assert losses[-1] < losses[0]
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed and all("ghost." in name for name in changed)
    expected = copy.deepcopy(model).eval()
    assert torch.equal(logits(model.eval()), logits(expected))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_torchao_base(tmp_path: Path, kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model = ghosted()
    folder = save_model(model, tmp_path / "model")
    if kind == "int8":
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        config = TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4))
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert type(loaded.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    for (_, _, ghost), (_, _, other) in zip(
        ghosts_of(decoder_layers(loaded)), ghosts_of(decoder_layers(model)), strict=True
    ):
        assert isinstance(ghost, GhostLinear)
        assert torch.equal(ghost.weight, other.weight)
    error = relative_rms(logits(loaded), logits(model))
    assert 0 < error < (0.1 if kind == "int8" else 0.9)
    assert generated(loaded).shape == (1, 24)


def test_bitsandbytes_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = ghosted()
    folder = save_model(model, tmp_path / "model")
    config = BitsAndBytesConfig(load_in_8bit=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu"
    )
    assert type(loaded.model.layers[0].mlp.up_proj) is not nn.Linear
    assert loaded.model.layers[3].ghost.weight.is_floating_point()
    assert 0 < relative_rms(logits(loaded), logits(model)) < 0.1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_model_is_ghosted_and_comes_back(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    sizes = {**tiny_model("llama").config.to_dict(), "hidden_size": 64, "intermediate_size": 128}
    wide = LlamaForCausalLM(LlamaConfig(**{**sizes, "head_dim": 16}))  # a block is of 64 weights
    folder = save_model(wide, tmp_path / "dense")
    plain = ["lm_head", "model.layers.5.mlp.up_proj"]
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plain)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=plain
        )
    dense = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()
    texts = [random_tokens(4, 32, seed) for seed in range(16)]
    smaller, _ = ghost_model(
        dense, texts, removed=[1, 2], run=RunOptions(corrections=1, progress=False)
    )
    again = AutoModelForCausalLM.from_pretrained(save_model(smaller, tmp_path / "smaller")).eval()
    assert torch.equal(logits(again), logits(smaller))
    kinds = [type(layer.mlp.up_proj) for layer in again.model.layers]
    assert kinds[-1] is nn.Linear and nn.Linear not in kinds[:-1]


def test_compiled_generation() -> None:
    model = ghosted()
    expected = generated(model)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(generated(model, cache_implementation="static"), expected)
