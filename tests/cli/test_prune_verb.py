"""`ghosted-fast prune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_text import save_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ghosted_fast.cli.app import app
from ghosted_fast.models.unloaded.files import StoredTensor


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def test_prune_writes_a_smaller_folder_without_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = save_tiny_model(tmp_path / "dense"), tmp_path / "out"
    monkeypatch.delattr(StoredTensor, "read")
    asked = ("--model", dense, "--removed", "1-2,4", "--output", out)
    planned = run(*asked, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "would remove layers 1-2, 4" in planned.stdout
    assert not out.exists()
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["removed"] == [1, 2, 4]
    assert facts["output"] == str(out)
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3
    again = run(*asked)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert run(*asked, "--overwrite").exit_code == 0
