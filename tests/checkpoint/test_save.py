"""Saving and loading ghosted models, and refusing damaged ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.dense_reference import NUM_LAYERS, REMOVED, random_ghost, random_ghosts
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

from ghosted_fast.checkpoint.record import is_ghosted
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import ArgumentError, CheckpointError
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, tiny_model

WEIGHTS = "model.safetensors"
TOKENS = random_tokens(2, 20)

LOAD_IN_A_NEW_PROCESS = """
import sys
from pathlib import Path

root = Path(sys.argv[1])
if sys.argv[2] == "transformers first":
    from transformers import AutoModelForCausalLM
    try:
        AutoModelForCausalLM.from_pretrained(root / "llama")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("a ghosted model loaded without ghosted_fast")
    import ghosted_fast
else:
    import ghosted_fast
    assert "transformers" not in sys.modules
    from transformers import AutoConfig
    assert AutoConfig.from_pretrained(root / "llama").ghost["format"] == 1
    from transformers import AutoModelForCausalLM
    assert not any("modeling_gpt2" in name for name in sys.modules), "families are loaded lazily"

import torch

torch.set_num_threads(1)
tokens = torch.load(root / "tokens.pt")
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__.startswith("Ghosted"), type(model)
    with torch.no_grad():
        logits = model(tokens).logits
    assert torch.equal(logits, torch.load(root / f"{folder.name}.pt")), folder.name
print("loaded")
"""


def ghosted(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return remove_layers(tiny_model(family, NUM_LAYERS, dtype), REMOVED, random_ghosts())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the folder of a saved ghosted model."""
    return save_model(ghosted(), tmp_path / "model")


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def edit_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["ghost"])
    path.write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["transformers first", "ghosted_fast first"])
def test_every_family_loads_in_a_new_process(tmp_path: Path, order: str) -> None:
    torch.save(TOKENS, tmp_path / "tokens.pt")
    for family in FAMILY_NAMES if order == "transformers first" else ("llama", "mixtral"):
        model = ghosted(family)
        save_model(model, tmp_path / family)
        torch.save(logits(model), tmp_path / f"{family}.pt")
    result = subprocess.run(
        [sys.executable, "-c", LOAD_IN_A_NEW_PROCESS, str(tmp_path), order],
        stdin=subprocess.DEVNULL,  # transformers asks whether to run the saved code
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.endswith("loaded\n")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_naive_model_loads_as_an_ordinary_one(tmp_path: Path, family: str) -> None:
    pruned = prune_model(tiny_model(family, NUM_LAYERS), REMOVED)
    pruned.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(pruned)
    assert "ghost" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(loaded), logits(pruned))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantized_ghosts_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    # Loaded once before: casting a model in memory also rounds its rotary tables, loading does not.
    model = load(save_model(ghosted(dtype=dtype), tmp_path / "first"), dtype=dtype)
    model.model.layers[0].ghost.quantize("int8")  # after surgery: saving must notice
    loaded = load(save_model(model, tmp_path / "model"), dtype=dtype)
    ghost = loaded.model.layers[0].ghost
    assert (ghost.weight.dtype, ghost.scale.dtype, ghost.bias) == (
        torch.int8,
        torch.float32,
        None,
    )
    assert loaded.model.layers[0].input_ghost.weight.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))


def test_record_in_the_configuration(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "ghosted_llama"
    assert config["architectures"] == ["GhostedLlamaForCausalLM"]
    assert config["num_hidden_layers"] == 4
    plain = {"bias": False, "norm_eps": None, "first_state": False, "quantization": None}
    assert config["ghost"] == {
        "format": 1,
        "removed": REMOVED,
        "num_hidden_layers": NUM_LAYERS,
        "layers": "layers",
        "family": "llama",
        "digests": True,
        "ghosts": [
            {**plain, "layer": 0, "side": "input", "bias": True, "first_state": True},
            {**plain, "layer": 0, "side": "output", "norm_eps": 1e-5, "first_state": True},
            {**plain, "layer": 3, "side": "output", "bias": True, "norm_eps": 1e-6},
        ],
    }
    assert AutoConfig.from_pretrained(saved).to_dict()["ghost"] == config["ghost"]


def test_loaded_model_can_be_cut_and_saved_again(saved: Path, tmp_path: Path) -> None:
    loaded = load(saved)
    again = remove_layers(loaded, [2], [random_ghost(7)])
    assert again.config.ghost["removed"] == sorted([*REMOVED, 5])
    assert torch.equal(logits(load(save_model(again, tmp_path / "again"))), logits(again))


def test_base_model_loads_from_either_kind_of_folder(saved: Path, tmp_path: Path) -> None:
    whole = load(saved)
    base = AutoModel.from_pretrained(saved)
    assert type(base).__name__ == "GhostedLlamaModel"
    base.save_pretrained(tmp_path / "base")
    twin = AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = whole.model(TOKENS)[0]
        assert torch.equal(base(TOKENS)[0], expected)
        assert torch.equal(twin(TOKENS)[0], expected)
    with pytest.raises(CheckpointError, match=r"missing weights lm_head\.weight"):
        load(tmp_path / "base")


def test_experts_keep_their_layout_on_disk(tmp_path: Path) -> None:
    names = []
    for name, model in (
        ("dense", prune_model(tiny_model("mixtral", NUM_LAYERS), REMOVED)),
        ("ghosted", ghosted("mixtral")),
    ):
        save_model(load(save_model(model, tmp_path / name)), tmp_path / f"{name} again")
        with safe_open(tmp_path / f"{name} again" / WEIGHTS, "pt") as file:
            names.append({key for key in file.keys() if "ghost" not in key})  # noqa: SIM118 - no dict
    assert names[0] == names[1]
    assert any("experts.0." in name for name in names[0])


def test_model_made_of_a_ghosted_configuration(saved: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved))
    assert not model.model.layers[3].ghost.weight.any()


def test_loading_info_is_returned_when_asked_for(saved: Path) -> None:
    model, info = load(saved, output_loading_info=True)
    assert not info["missing_keys"] and torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.ghost.weight",
        "model.layers.0.input_ghost.bias",
        "model.layers.0.ghost.first_state",
        "model.layers.3.mlp.up_proj.weight",
    ],
)
def test_missing_weight_is_refused(saved: Path, name: str) -> None:
    edit_weights(saved, lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match=f"missing weights {name}"):
        load(saved)


def test_weight_without_a_place_is_refused(saved: Path) -> None:
    stray = {"model.layers.1.ghost.weight": torch.zeros(32, 32)}
    edit_weights(saved, lambda weights: weights.update(stray))
    with pytest.raises(CheckpointError, match=r"without a place model\.layers\.1\.ghost\.weight"):
        load(saved)


def test_ghost_missing_from_the_record_is_refused(saved: Path) -> None:
    edit_record(saved, lambda record: record["ghosts"].pop())
    with pytest.raises(CheckpointError, match=r"without a place model\.layers\.3\.ghost"):
        load(saved)


def test_ghost_of_another_shape_is_refused(saved: Path) -> None:
    edit_weights(
        saved, lambda weights: weights.update({"model.layers.3.ghost.bias": torch.zeros(16)})
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.ghost\.bias"):
        load(saved)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.ghost\.bias"):
        load(saved, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.9])
def test_truncated_file_is_refused(saved: Path, kept: float) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load(saved)


def test_other_shapes_outside_the_layers_are_the_callers_choice(saved: Path) -> None:
    edit_weights(saved, lambda weights: weights.update({"lm_head.weight": torch.zeros(99, 32)}))
    with pytest.raises(CheckpointError, match=r"another shape lm_head\.weight"):
        load(saved)
    assert load(saved, ignore_mismatched_sizes=True).lm_head.weight.shape == (97, 32)


def test_newer_format_is_refused(saved: Path) -> None:
    edit_record(saved, lambda record: record.update(format=3))
    with pytest.raises(CheckpointError, match=r"format 3.*pip install --upgrade ghosted_fast"):
        load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("format"),
        lambda record: record.pop("removed"),
        lambda record: record["removed"].pop(),
        lambda record: record.update(num_hidden_layers=9),
        lambda record: record.update(removed=[0, 2, 3, 8]),
        lambda record: record["ghosts"][0].update(side="left"),
        lambda record: record["ghosts"][0].update(layer=4),
        lambda record: record["ghosts"][0].update(quantization="int4"),
        lambda record: record["ghosts"][0].pop("bias"),
        lambda record: record["ghosts"].append(None),
    ],
)
def test_damaged_record_is_refused(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_record(saved, change)
    with pytest.raises(CheckpointError, match="damaged"):
        load(saved)


def test_save_model_refuses_what_is_there(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="overwrite=True"):
        save_model(ghosted(), saved)
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="got the file"):
        save_model(ghosted(), tmp_path / "file", overwrite=True)
    (saved / "leftover").touch()
    save_model(ghosted("gpt2"), saved, overwrite=True)
    assert load(saved).config.model_type == "ghosted_gpt2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]
    assert not (saved / "leftover").exists()


class Broken:
    """A tokenizer that cannot be saved."""

    def save_pretrained(self, folder: Path) -> None:
        raise OSError("disk full")


def test_interrupted_save_leaves_the_old_folder(saved: Path, tmp_path: Path) -> None:
    before = logits(load(saved))
    with pytest.raises(OSError, match="disk full"):
        save_model(ghosted("gpt2"), saved, tokenizer=Broken(), overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        save_model(ghosted("gpt2"), tmp_path / "new", tokenizer=Broken())
    assert torch.equal(logits(load(saved)), before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saved_folder_can_be_read_by_others(saved: Path) -> None:
    (saved.parent / "ordinary").mkdir()
    assert saved.stat().st_mode == (saved.parent / "ordinary").stat().st_mode


@pytest.mark.parametrize("ghosts", [None, [random_ghost(0)]])
def test_marks_of_an_unpacked_gguf_file_are_dropped(tmp_path: Path, ghosts: Any) -> None:
    quantizers = pytest.importorskip("transformers.quantizers.quantizer_gguf")
    from transformers.utils.quantization_config import GgufConfig

    dense = tiny_model("llama")
    quantizer = quantizers.GgufHfQuantizer(GgufConfig(dequantize=True))
    dense.hf_quantizer, dense.is_quantized = quantizer, True
    dense.quantization_method = quantizer.quantization_config.quant_method
    dense.config.quantization_config = quantizer.quantization_config
    with pytest.raises(ValueError, match="not serializable"):
        dense.save_pretrained(tmp_path / "dense")
    model = remove_layers(dense, [1], ghosts)
    loaded = load(save_model(model, tmp_path / "model"))
    assert torch.equal(logits(loaded), logits(model))
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    assert dense.hf_quantizer is quantizer


def test_ghosted_models_of_other_families_load(tmp_path: Path) -> None:
    from transformers import StableLmConfig

    config = StableLmConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = remove_layers(AutoModelForCausalLM.from_config(config), [1], [random_ghost(0)])
    folder = save_model(model, tmp_path / "model")
    assert type(load(folder)) is type(model)
    assert torch.equal(logits(load(folder)), logits(model))


def test_dense_class_reports_the_ghosts_it_leaves_out(saved: Path) -> None:
    _, info = LlamaForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert any("ghost" in key for key in info["unexpected_keys"])


def test_a_classifier_comes_back_as_one(tmp_path: Path) -> None:
    config = tiny_model("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    dense = AutoModelForSequenceClassification.from_config(config).eval()
    smaller = remove_layers(dense, [2], [random_ghost(1, bias=True)])
    save_model(smaller, tmp_path / "judge")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").eval()
    ids = random_tokens(1, 8, 4)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, smaller(ids).logits)
        assert again(ids).logits.shape == (1, 3)


def test_a_model_that_was_loaded_is_ghosted_as_one_that_was_made(tmp_path: Path) -> None:
    tiny_model("llama", 6).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    once = remove_layers(dense, [1], [random_ghost(0)])
    assert is_ghosted(once.config) and once.config.model_type == "ghosted_llama"
    twice = remove_layers(once, [3])
    assert twice.config.ghost["removed"] == [1, 4]
    assert twice.config.ghost["num_hidden_layers"] == 6
    assert dense.config.model_type == "llama"
