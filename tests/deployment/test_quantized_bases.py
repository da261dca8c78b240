"""Quantized models as the dense model: ghosted, corrected, saved, and loaded equal elsewhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized_models import QUANTIZED, fp8_folder, in_a_list, settings_of, wide_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.improve.gradients import check_gradients, kernels_with_gradients
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.testing import random_tokens, relative_rms

pytest.importorskip("torchao")
pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.slow

TOKENS = random_tokens(2, 12)
TEXTS = [random_tokens(4, 32, seed) for seed in range(16)]
REMOVED = [1, 2]
CORRECTED = RunOptions(corrections=1, progress=False)
# What rounds activations too, in kernels that know no gradient.
WITHOUT_GRADIENT = {
    "torchao-dynamic-int8",
    "float-quantized",
    "int-quantized",
    "int-quantized-bf16",
}
UP, DOWN = "model.layers.3.mlp.up_proj", r"re:model\.layers\.(0|2)\.mlp\.down_proj$"
# Where the names are that follow the layers, and which follow.
NAMES = {
    "torchao-by-name": ("fqn_to_config", {UP, DOWN, "model.layers.2.mlp.gate_proj", "_default"}),
    **dict.fromkeys(
        [name for name in QUANTIZED if name.startswith("torchao") and name != "torchao-by-name"],
        ("modules_to_not_convert", {"lm_head", UP}),
    ),
    **dict.fromkeys(
        [name for name in QUANTIZED if "quantized" in name], ("ignore", {"lm_head", UP, DOWN})
    ),
}
RELOAD = """
import sys
import torch, ghosted_fast
from pathlib import Path
from transformers import AutoModelForCausalLM
from ghosted_fast.testing import random_tokens
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(random_tokens(2, 12)).logits, folder / "logits.pt")
"""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every kind of model, ghosted and corrected, and its logits when another process loads it."""
    root = tmp_path_factory.mktemp("quantized")
    found: dict[str, dict[str, Any]] = {}
    for name, make in QUANTIZED.items():
        dense = make(root / f"{name}-dense")
        before = logits(dense)
        if name in WITHOUT_GRADIENT:
            with pytest.raises(UnsupportedModelError, match="passes none back"):
                ghost_model(dense, TEXTS, removed=REMOVED, run=CORRECTED)
        run = replace(CORRECTED, corrections=int(name not in WITHOUT_GRADIENT))
        smaller, report = ghost_model(dense, TEXTS, removed=REMOVED, run=run)
        assert torch.equal(logits(dense), before)
        folder = save_model(smaller, root / name)
        found[name] = {"folder": folder, "here": logits(smaller), "report": report}
    folders = [str(entry["folder"]) for entry in found.values()]
    subprocess.run([sys.executable, "-c", RELOAD, *folders], check=True)
    return found


@pytest.mark.parametrize("name", QUANTIZED)
def test_it_is_ghosted_and_another_process_loads_it_equal(name: str, saved: Any) -> None:
    entry = saved[name]
    assert torch.equal(torch.load(entry["folder"] / "logits.pt"), entry["here"])
    (ghost,), corrections = entry["report"].ghosts, entry["report"].corrections
    assert ghost.fit_error < 1 and len(corrections) == (name not in WITHOUT_GRADIENT)
    assert all(correction.after <= correction.before for correction in corrections)


@pytest.mark.parametrize("name", QUANTIZED)
def test_names_in_its_settings_follow_the_layers(name: str, saved: Any) -> None:
    settings = settings_of(saved[name]["folder"])
    if name not in NAMES:  # its weights were unpacked
        assert settings is None
        return
    where, names = NAMES[name]
    assert [set(found) for found in in_a_list(settings, where)] == [names]


@pytest.mark.parametrize("name", [name for name in QUANTIZED if "quantized" in name])
def test_weights_that_a_forward_pass_unpacked_are_saved_packed(name: str, saved: Any) -> None:
    folder = saved[name]["folder"]
    whole = (folder.parent / f"{name}-dense" / "model.safetensors").stat().st_size
    ghost = 64 * 64 * 4
    assert (folder / "model.safetensors").stat().st_size < whole + ghost
    assert settings_of(folder)["quantization_status"] == "compressed"


def test_packed_fp8_is_cut_and_saved_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the kernels: it is loaded as on a GPU, and what was saved is unpacked."""
    folder = fp8_folder(tmp_path / "dense")
    settings = FineGrainedFP8Config(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).eval()
    ghost = GhostLinear(64)
    torch.nn.init.normal_(ghost.weight, std=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
        dense = AutoModelForCausalLM.from_pretrained(folder)
        assert dense.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
        saved = save_model(remove_layers(dense, REMOVED, [ghost]), tmp_path / "smaller")
    assert settings_of(saved)["modules_to_not_convert"] == ["lm_head", UP]
    again = AutoModelForCausalLM.from_pretrained(saved, quantization_config=settings).eval()
    expected = remove_layers(plain, REMOVED, [ghost])
    assert torch.equal(logits(again), logits(expected))


def test_weights_that_would_be_others_once_packed_are_saved_unpacked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = QUANTIZED["pack-quantized"](tmp_path / "dense")
    logits(dense)
    smaller = prune_model(dense, REMOVED)
    with torch.no_grad():
        smaller.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    expected = logits(smaller)
    folder = save_model(smaller, tmp_path / "smaller")
    assert "model.layers.1.mlp.up_proj, are others once they are packed" in caplog.text
    again = type(smaller).from_pretrained(folder).eval()
    assert torch.equal(logits(again), expected)


def test_gradients_of_nf4_are_those_of_its_weights(tmp_path: Path) -> None:
    """A processor's kernel for 4 bits knows no gradient, and is not used where one is wanted."""
    functional = pytest.importorskip("bitsandbytes.functional")
    wide_llama().save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings).eval()
    logits(model)  # repacks the weights, where the processor has the kernel
    check_gradients(model)
    module = model.model.layers[1].mlp.up_proj
    x = torch.randn(3, 64)
    module(x)
    with kernels_with_gradients(model):
        module(x)
        x.requires_grad_()
        module(x).sum().backward()
    weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    assert relative_rms(x.grad, weight.sum(0).expand(3, -1)) < 1e-5
