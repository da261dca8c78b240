"""A folder that an earlier state of the library saved still loads, with the same logits.

The folder is kept as text: its configuration, its file for machines without the package, and the
recipe of its weights: number i of a weight of a name is 0.3 sin(0.7 i + length of the name).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import ghosted_fast
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.testing import random_tokens

SAVED = Path(__file__).parent / "saved_in_format_1"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
TOKENS = random_tokens(2, 7, 3)
LOAD_AS_REMOTE_CODE = """
import sys
if sys.argv[2] == "absent":
    sys.modules["ghosted_fast"] = None
else:
    import ghosted_fast
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[3])).logits, sys.argv[4])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(SAVED / name, folder)
    shutil.copy(SAVED / "modeling_ghosted.txt", folder / "modeling_ghosted.py")
    weights = {}
    for name, shape in EXPECTED["weights"].items():
        places = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        weights[name] = (0.3 * torch.sin(0.7 * places + len(name))).reshape(shape).float()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_as_saved(logits: torch.Tensor) -> None:
    found = logits[:, -1, :8]
    assert torch.allclose(found, torch.tensor(EXPECTED["last_logits"]), rtol=1e-4, atol=1e-4)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_it_loads_and_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    assert ghosted_fast.__version__
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(isinstance(module, GhostLinear) for module in model.modules()) == 2
    assert_as_saved(logits_of(model))
    again = save_model(model, tmp_path / "again")
    assert_as_saved(logits_of(AutoModelForCausalLM.from_pretrained(again)))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["absent", "installed"])
def test_its_own_file_loads_it(folder: Path, tmp_path: Path, package: str) -> None:
    torch.save(TOKENS, tmp_path / "tokens.pt")
    arguments = [str(folder), package, str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AS_REMOTE_CODE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path / "hub")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_as_saved(torch.load(tmp_path / "logits.pt"))
