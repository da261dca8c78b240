"""`ghosted-fast import` from end to end, on a tiny model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ghosted_fast.cli.app import app
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.loading import load_model
from ghosted_fast.testing import random_tokens, relative_rms


@pytest.fixture
def operators(tmp_path: Path) -> Path:
    """Two operators x @ W, for the gaps [1, 3) and [4, 5)."""
    path = tmp_path / "operators.safetensors"
    generator = torch.Generator().manual_seed(0)
    changes = [torch.randn(32, 32, generator=generator) / 20 for _ in range(2)]
    save_file({f"gap_{i}.weight": torch.eye(32) + m for i, m in enumerate(changes)}, path)
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["import", *map(str, arguments)])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_import(model_folder: Path, operators: Path, tmp_path: Path) -> None:
    output = tmp_path / "ghosted"
    told = ["--removed", "1-2,4", "--form", "full", "--layout", "in-out", "--output", output]
    command = [operators, "--model", model_folder, *told]
    status, shown, _ = run(*command)
    assert status == 0
    assert shown.splitlines() == [
        f"removed 1-2, 4; saved {output}",
        "read as y = x @ A",
        "gap 0: gap_0.weight",
        "gap 1: gap_1.weight",
    ]
    dense, _ = load_model(model_folder)
    smaller, tokenizer = load_model(output)
    assert tokenizer.bos_token_id == 1
    _check(dense, smaller, operators)
    assert run(*command)[0] == 1
    status, found, _ = run(*command, "--overwrite", "--json")
    assert status == 0
    assert json.loads(found)["keys"] == [["gap_0.weight"], ["gap_1.weight"]]


def _check(dense: Any, smaller: Any, operators: Path) -> None:
    """Run the kept layers of the dense model with x @ W behind the first two of them."""
    kept = decoder_layers(dense)
    held = load_file(operators)
    for layer, key in ((0, "gap_0.weight"), (3, "gap_1.weight")):
        kept[layer].register_forward_hook(lambda _, __, y, key=key: y @ held[key])
    for layer in (4, 2, 1):
        del kept[layer]
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        expected = dense(tokens, use_cache=False).logits
        assert relative_rms(smaller(tokens).logits, expected) < 1e-5


def test_failures(model_folder: Path, operators: Path, tmp_path: Path) -> None:
    output = tmp_path / "ghosted"
    rest = ["--model", model_folder, "--output", output]
    status, shown, error = run(operators, *rest, "--removed", "1")
    assert (status, shown) == (1, "")
    assert "error: expected one operator for each of the gaps [(1, 2)], or" in error
    status, _, error = run(operators, *rest, "--removed", "1-2,4")
    assert status == 1
    assert "distances" in error
    assert run(tmp_path / "none.pt", *rest, "--removed", "1")[0] == 1
    assert not output.exists()
