"""`fit --calibrate-in`: everything is computed in a quantized copy, and the model itself is cut."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized_models import wide_llama
from support.tiny_text import TEXT, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ghosted_fast.checkpoint.model_card import CARD
from ghosted_fast.cli import fit as verb
from ghosted_fast.cli.app import app
from ghosted_fast.errors import ArgumentError, MissingExtraError
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.ghosted_layers import ghosts_of
from ghosted_fast.models.loading import load_model
from ghosted_fast.models.quantized.loading import (
    KINDS,
    check_quantizable,
    load_quantized,
    quantization_of,
)
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.surgery.transfer import put_ghosts, take_ghosts
from ghosted_fast.testing import tiny_model
from ghosted_fast.text.loading import load_texts, token_batches

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

RELOAD = """
import sys
import torch, ghosted_fast
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.no_grad():
    torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16, with its tokenizer."""
    root = tmp_path_factory.mktemp("calibrate_in")
    wide_llama(torch.bfloat16).save_pretrained(root / "bf16")
    tiny_tokenizer().save_pretrained(root / "bf16")
    return root / "bf16"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT, "id": i}) + "\n" for i in range(120)))
    return path


def fit(source: Path, texts: Path, output: Path, *options: str) -> Any:
    command = ["fit", "--model", source, "--calibration", texts, "--tokens", 1024]
    command += ["--sequence-length", 32, "--batch-size", 8, "--output", output, *options]
    return CliRunner().invoke(app, [str(word) for word in command])


def ghosts(model: Any) -> list[Any]:
    return [ghost for _, _, ghost in ghosts_of(decoder_layers(model))]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(8)[None]).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_cut_as_its_quantized_copy_says(
    kind: str, source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    opened = verb.FitCalibrationArgs.open

    def watched(self: Any, model: Any) -> Any:
        found = opened(self, model)
        alive.append(weakref.ref(found[0]))
        return found

    def dense_loaded(self: Any) -> Any:
        gc.collect()
        assert alive[0]() is None, "the quantized copy is still in memory"
        return load_model(self.model, self.dtype)

    monkeypatch.setattr(verb.FitCalibrationArgs, "open", watched)
    monkeypatch.setattr(verb.ModelArgs, "open", dense_loaded)
    output, page = tmp_path / "ghosted", tmp_path / "report.json"
    result = fit(source, texts, output, "--remove", "2", "--corrections", "1",
                 "--calibrate-in", kind, "--report", str(page))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"calibrated in weights quantized by bitsandbytes {kind}" in result.output

    teacher, tokenizer = load_quantized(source, kind)
    batches = token_batches(tokenizer, load_texts(str(texts), None, None), 1024, 32, 8)
    expected, report = ghost_model(
        teacher, batches, 2, run=RunOptions(corrections=1, progress=False)
    )
    facts = json.loads(page.read_text())
    assert facts["removed"] == report.removed
    assert facts["calibrated_in"] == report.calibrated_in == f"bitsandbytes {kind}"
    assert f"quantized by bitsandbytes {kind}" in (output / CARD).read_text()

    found = AutoModelForCausalLM.from_pretrained(output, dtype="auto").eval()
    dense, _ = load_model(source)
    assert quantization_of(found.config) is None and found.dtype == torch.bfloat16
    for mine, other in zip(ghosts(found), ghosts(expected), strict=True):
        for name, value in other.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value)
    plain = prune_model(dense, report.removed).state_dict()
    kept = {n: v for n, v in found.state_dict().items() if "ghost." not in n}
    assert kept.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in kept.items())

    # Not the ghosts of the model itself.
    itself, _ = ghost_model(
        dense, batches, removed=report.removed, run=RunOptions(corrections=1, progress=False)
    )
    assert not torch.equal(ghosts(itself)[0].weight, ghosts(found)[0].weight)
    subprocess.run([sys.executable, "-c", RELOAD, output, tmp_path / "logits.pt"], check=True)
    again = put_ghosts(dense, take_ghosts(expected))
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(again))
    assert again.config.ghost["report"]["calibrated_in"] == f"bitsandbytes {kind}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recovery", "linearpatch-d", "--remove", "2"], "expected --recovery ghost"),
        (["--min-speedup", "1.2"], "the speed of the quantized copy"),
    ],
)
def test_what_a_quantized_copy_cannot_stand_for(
    options: list[str], said: str, source: Path, texts: Path, tmp_path: Path
) -> None:
    result = fit(source, texts, tmp_path / "x", "--calibrate-in", "int8", *options)
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_the_models_that_cannot_be_quantized(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, tokenizer = load_quantized(source, "nf4")
    quantized.save_pretrained(tmp_path / "nf4")
    tokenizer.save_pretrained(tmp_path / "nf4")
    with pytest.raises(
        ArgumentError, match=r"is quantized .bitsandbytes nf4.: name the model that"
    ):
        check_quantizable(tmp_path / "nf4", "int8")
    result = fit(tmp_path / "nf4", texts, tmp_path / "x", "--calibrate-in", "int8", "--remove", "2")
    assert result.exit_code != 0 and "name the model that it was made of" in str(
        result.output
    ) + str(result.exception)
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    with pytest.raises(ArgumentError, match=r"got the GGUF file 'model.gguf': name the model"):
        check_quantizable(gguf, "int8")
    with pytest.raises(ArgumentError, match="in int8 or nf4, got 'int3'"):
        check_quantizable(source, "int3")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(MissingExtraError, match="pip install bitsandbytes accelerate"):
        check_quantizable(source, "int8")


def test_ghosts_are_put_only_where_they_were_taken() -> None:
    dense = tiny_model("llama", 6)
    with pytest.raises(ArgumentError, match="expected a ghosted model to take ghosts from"):
        take_ghosts(dense)
    batches = [torch.randint(0, 90, (8, 32)) for _ in range(8)]
    smaller, _ = ghost_model(dense, batches, removed=[0, 3, 4])
    taken = take_ghosts(smaller)
    assert torch.equal(logits(put_ghosts(dense, taken)), logits(smaller))
    with pytest.raises(ArgumentError, match=r"6 layers of width 32, .* got 5 layers"):
        put_ghosts(tiny_model("llama", 5), taken)
    with pytest.raises(ArgumentError, match="got a ghosted one"):
        put_ghosts(smaller, taken)
