"""A saved folder loads where `ghosted_fast` is not installed, by the file beside the weights."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dense_reference import NUM_LAYERS, REMOVED, random_ghosts
from transformers import AutoModelForCausalLM

from ghosted_fast.checkpoint.remote_code import MODULE, remote_code
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, tiny_model

TOKENS = random_tokens(2, 20)
MASK = torch.ones_like(TOKENS)
MASK[1, :6] = 0
# Relative to the logits; the ghosts amplify the few roundings in which the two differ.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}

LOAD = """
import sys
from pathlib import Path

sys.modules["ghosted_fast"] = None  # importing it is an ImportError from here on

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
root = Path(sys.argv[1])
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    expected = torch.load(root / f"{folder.name}.pt")
    dtype = expected["dtype"]
    options = {"dtype": dtype, "trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        logits = model(expected["tokens"], attention_mask=expected["mask"]).logits
        states = model(expected["tokens"][:1], output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1, folder.name
    attended = expected["mask"].bool()
    error = (logits.double() - expected["logits"].double())[attended].norm()
    error = float(error / expected["logits"].double()[attended].norm())
    assert error <= expected["tolerance"], (folder.name, error)
    for cache in ("dynamic", "static"):
        options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
        tokens = model.generate(expected["tokens"][:1], **options)
        if dtype == torch.float32:
            assert torch.equal(tokens, expected["generated"]), (folder.name, cache)
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("a ghosted model loaded without ghosted_fast and without its file")
again = root / "again"
model.save_pretrained(again)
twin = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(twin(expected["tokens"]).logits, model(expected["tokens"]).logits)
print("loaded")
"""


def save_with_answers(root: Path, name: str, model: Any) -> None:
    """Save a model and what it answers to the tokens."""
    save_model(model, root / name)
    model = AutoModelForCausalLM.from_pretrained(root / name, dtype=model.dtype).eval()
    with torch.no_grad():
        answers = {
            "tokens": TOKENS,
            "mask": MASK,
            "dtype": model.dtype,
            "tolerance": TOLERANCES[model.dtype],
            "logits": model(TOKENS, attention_mask=MASK).logits,
            "generated": model.generate(TOKENS[:1], max_new_tokens=8, do_sample=False),
        }
    torch.save(answers, root / f"{name}.pt")


def run(script: str, *arguments: str, modules: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_MODULES_CACHE": str(modules)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_every_family_loads_without_the_package(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for family in FAMILY_NAMES:
        dense = tiny_model(family, NUM_LAYERS)
        save_with_answers(tmp_path, family, remove_layers(dense, REMOVED, random_ghosts()))
    for dtype in (torch.bfloat16, torch.float16):
        dense = tiny_model("llama", NUM_LAYERS, dtype)
        save_with_answers(tmp_path, str(dtype), remove_layers(dense, REMOVED, random_ghosts()))
    ghosts = [ghost.quantize("int8") for ghost in random_ghosts()]
    quantized = remove_layers(tiny_model("llama", NUM_LAYERS), REMOVED, ghosts)
    save_with_answers(tmp_path, "int8", quantized)
    modules = tmp_path_factory.mktemp("modules")
    assert run(LOAD, str(tmp_path), modules=modules).endswith("loaded\n")


DAMAGED = """
import sys
sys.modules["ghosted_fast"] = None
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config["ghost"]["ghosts"].pop(), "weights without a place ['model.layers"),
        (lambda config: config["ghost"]["ghosts"][0].update(bias=False), "input_ghost.bias"),
        (lambda config: config["ghost"].update(format=3), "format 3, and this file reads up to 2"),
    ],
)
def test_damaged_folder_is_refused(tmp_path: Path, edit: Any, message: str) -> None:
    import json

    folder = save_model(
        remove_layers(tiny_model("llama", NUM_LAYERS), REMOVED, random_ghosts()), tmp_path / "model"
    )
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    assert message in run(DAMAGED, str(folder), modules=tmp_path / "modules")


def test_package_wins_where_it_is_installed(tmp_path: Path) -> None:
    model = remove_layers(tiny_model("qwen3", NUM_LAYERS), REMOVED, random_ghosts())
    folder = save_model(model, tmp_path / "model")
    for options in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert type(loaded) is type(model)


NOT_IMPORTED = """
import sys
from transformers import AutoModelForCausalLM
assert "ghosted_fast" not in sys.modules
options = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], **options)
ghost = model.model.layers[0].ghost
print(type(model).__module__, type(again) is type(model), type(ghost).__name__)
"""


@pytest.mark.slow
def test_package_wins_where_it_is_installed_and_not_imported(tmp_path: Path) -> None:
    model = remove_layers(tiny_model("qwen3", NUM_LAYERS), REMOVED, random_ghosts())
    folder, again = save_model(model, tmp_path / "model"), tmp_path / "again"
    arguments = (NOT_IMPORTED, str(folder), str(again))
    printed = run(*arguments, modules=tmp_path / "modules")
    assert printed == "ghosted_fast.checkpoint.transformers_types True GhostLinear\n"
    files = [
        {path.name: path.read_text() for path in place.glob("*.[jp]*")} for place in (folder, again)
    ]
    assert files[0] == files[1]


def test_file_is_self_contained_and_small(tmp_path: Path) -> None:
    model = remove_layers(tiny_model("llama", NUM_LAYERS), REMOVED, random_ghosts())
    source = (save_model(model, tmp_path / "model") / f"{MODULE}.py").read_text()
    assert source == remote_code()
    assert len(source.encode()) < 32_000
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    assert found - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_unknown_name_in_the_file() -> None:
    import ghosted_fast.checkpoint.modeling_ghosted as module

    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        module.Other  # noqa: B018


def test_model_of_foreign_code_gets_no_file(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    class OwnConfig(LlamaConfig):
        model_type = "own_llama"

    class OwnModel(LlamaForCausalLM):
        config_class = OwnConfig

    config = OwnConfig.from_dict(tiny_model("llama").config.to_dict() | {"model_type": "own_llama"})
    model = remove_layers(OwnModel(config), [1], [None])
    assert type(model) is OwnModel
    ghosted = remove_layers(OwnModel(config), [0, 2, 3], random_ghosts()[:2])
    ghosted.save_pretrained(tmp_path)
    assert not (tmp_path / f"{MODULE}.py").exists()
