"""The demo: a real model loses layers, gets a ghost, and is measured, saved and loaded again."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ghosted_fast.assets.downloads import DemoAssets
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import ArgumentError, CheckpointError
from ghosted_fast.facts import HealingFacts
from ghosted_fast.improve.healing import heal
from ghosted_fast.measure.models_table import ModelRow, compare_models
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.models.loading import cast_parameters, load_model, resolve_dtype
from ghosted_fast.models.structure import share_copy
from ghosted_fast.options import HealOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.reports.ghost_report import GhostReport
from ghosted_fast.reports.page import write_report
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.text.loading import load_texts, token_batches

_LOGGER = logging.getLogger(__name__)
PROMPT = "Why is the sky blue?"
# A file that says that a folder was made by the demo, which may then replace it.
_MARKER = ".ghosted-fast-demo"
_SEQUENCE_LENGTH = 512
_RELOADED_TOKENS = 64
_HEALING_TOKENS = 32768
_RELOAD = """
import sys, torch
import ghosted_fast
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, source, target, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
with torch.inference_mode():
    logits = model(**load_file(source)).logits
    tokens = model.generate(**load_file(target), max_new_tokens=48, do_sample=False)
save_file({"logits": logits.contiguous(), "tokens": tokens}, target)
"""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found out.

    Attributes:
        rows: Dense, pruned, ghosted without corrections, ghosted and healed model, for each dtype.
        report: Of the model that is saved, with the scores of the choice of layers.
        healing: Of the last healed model, which is not saved: the only one that was trained.
        checkpoint: The saved model's folder.
        page: The report page.
        sample: What the saved model, loaded in a new process, answers to `PROMPT`.
        identical: Whether its logits there are bit for bit the same as here.
    """

    rows: list[ModelRow]
    report: GhostReport
    healing: HealingFacts
    checkpoint: Path
    page: Path
    sample: str
    identical: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON has it; also what the report page shows."""
        checkpoint = str(self.checkpoint)
        detail = f"{checkpoint} gives the logits of the model that was saved, bit for bit"
        return {
            **self.report.to_dict(),
            "healing": asdict(self.healing),
            "models": [row.to_dict() for row in self.rows],
            "samples": [{"name": "ghosted", "prompt": PROMPT, "text": self.sample}],
            "checks": [
                {
                    "label": "loaded in a new process",
                    "passed": self.identical,
                    "detail": detail if self.identical else f"{checkpoint} gives other logits",
                }
            ],
            "machine": machine_facts(),
            "checkpoint": checkpoint,
            "page": str(self.page),
        }


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does.

    Attributes:
        remove: How many layers to remove.
        dtypes: Dtypes to measure in. The layers are chosen in the first; the last is saved.
        tokens: Calibration tokens.
        evaluation_rows: Rows of 512 tokens to measure perplexity on.
        quick: Use an eighth of the tokens and hardly measure speed: to try whether it all works.
    """

    remove: int = 5
    dtypes: Sequence[str] = ("bfloat16",)
    tokens: int = 49152
    evaluation_rows: int = 10
    quick: bool = False


def run_demo(
    assets: DemoAssets,
    output: Path,
    options: DemoOptions | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> DemoResult:
    """Remove layers from the demo's model, put a ghost in, measure, save, reload and report.

    Args:
        assets: The model and the texts.
        output: Folder for the checkpoint (`model`) and the page (`report.html`). An older one is
            replaced if the demo made it.
        options: What is done.
        overwrite: Replace `output` even if the demo did not make it.
        progress: Show progress bars on stderr.

    Returns:
        The result; the page is written and the checkpoint saved.

    Raises:
        ArgumentError: There is no dtype, or `output` is there and was not made by the demo.
        CheckpointError: The saved model could not be loaded in a new process.
    """
    options = options or DemoOptions()
    if not options.dtypes:
        raise ArgumentError("expected at least one dtype, got none")
    _claim(output, overwrite)
    tokens, evaluation_rows, quick = options.tokens, options.evaluation_rows, options.quick
    healing = HealOptions(minutes=0.5, tokens_per_step=512, held_out_tokens=1024)
    if quick:
        tokens, evaluation_rows = max(tokens // 8, 16 * _SEQUENCE_LENGTH), 2
        healing = replace(healing, minutes=0.1)
    # Loaded once, in fp32, since unpacking the file takes longer than a cast.
    source, tokenizer = load_model(assets.model, torch.float32)
    batches = token_batches(tokenizer, load_texts(assets.calibration), tokens, _SEQUENCE_LENGTH)
    # What healing learns from begins where the calibration text ends.
    longer = token_batches(
        tokenizer,
        load_texts(assets.calibration),
        tokens + _HEALING_TOKENS,
        _SEQUENCE_LENGTH,
        fewest=tokens + _HEALING_TOKENS // 8,
    )
    fresh = torch.cat(longer)[sum(map(len, batches)) :].split(8)
    evaluation = token_batches(
        tokenizer,
        load_texts(assets.evaluation),
        evaluation_rows * _SEQUENCE_LENGTH,
        _SEQUENCE_LENGTH,
    )
    speed = {
        "prompt_length": _SEQUENCE_LENGTH,
        "new_tokens": 16 if quick else 32,
        "seconds": 1.0 if quick else 35.0,
        "interruptible": False,
    }
    run = RunOptions(progress=progress)
    rows: list[ModelRow] = []
    chosen: GhostReport | None = None
    for dtype in options.dtypes:
        _LOGGER.info("measuring in %s", dtype)
        dense = cast_parameters(copy.deepcopy(source), resolve_dtype(dtype) or torch.float32)
        if chosen is None:
            ghosted, report = ghost_model(dense, batches, options.remove, run=run)
            chosen = report
        else:
            ghosted, report = ghost_model(dense, batches, removed=chosen.removed, run=run)
        least_squares, _ = ghost_model(
            dense, batches, removed=chosen.removed, run=RunOptions(corrections=0)
        )
        healed = share_copy(ghosted)
        healing_facts = heal(healed, dense, fresh, healing, progress=progress)
        models = {
            "dense": dense,
            "pruned": prune_model(dense, chosen.removed),
            "ghosted, not corrected": least_squares,
            "ghosted": ghosted,
            "healed": healed,
        }
        rows += compare_models(models, evaluation, speed, progress)
    assert chosen is not None
    report = replace(report, criterion=chosen.criterion, scores=chosen.scores)
    folder = save_model(ghosted, output / "model", tokenizer, overwrite=True)
    sample, identical = check_reload(ghosted, folder, tokenizer, evaluation[0])
    result = DemoResult(
        rows, report, healing_facts, folder, output / "report.html", sample, identical
    )
    write_report(
        result.page, result.to_dict(), "SmolLM2-135M-Instruct with a ghost", overwrite=True
    )
    return result


def _claim(output: Path, overwrite: bool) -> None:
    """Make the output folder the demo's own, or refuse it."""
    marker = output / _MARKER
    mine = output.is_dir() and (overwrite or marker.is_file())
    if output.exists() and not mine:
        raise ArgumentError(
            f"{str(output)!r} exists and was not made by the demo: name another folder, "
            "or pass --overwrite"
        )
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()


def check_reload(model: Any, folder: Path, tokenizer: Any, batch: Tensor) -> tuple[str, bool]:
    """Load a saved model in a new process; let it write, and compare its logits with the model's.

    Args:
        model: The model that was saved.
        folder: Where it was saved.
        tokenizer: Its tokenizer.
        batch: Token ids [B, T] to compare on; a part of them is used.

    Returns:
        What it answers to `PROMPT`, and whether the logits are bit for bit the same.

    Raises:
        CheckpointError: The new process failed.
    """
    ids = batch[:1, :_RELOADED_TOKENS].contiguous()
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    with tempfile.TemporaryDirectory(prefix="ghosted-fast-") as temporary:
        source, target = Path(temporary) / "ids.safetensors", Path(temporary) / "out.safetensors"
        save_file({"input_ids": ids}, source)
        save_file(_prompt_ids(tokenizer), target)
        threads = str(torch.get_num_threads())
        finished = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(folder), str(source), str(target), threads],
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            lines = finished.stderr.strip().splitlines() or ["no message"]
            raise CheckpointError(f"{str(folder)!r} does not load in a new process: {lines[-1]}")
        found = load_file(target)
    prompt_length = _prompt_ids(tokenizer)["input_ids"].shape[1]
    text = tokenizer.decode(found["tokens"][0, prompt_length:], skip_special_tokens=True)
    return text.strip(), torch.equal(found["logits"], expected)


def _prompt_ids(tokenizer: Any) -> dict[str, Tensor]:
    """Return the prompt's input_ids and attention_mask, as a chat if the model has a template."""
    if tokenizer.chat_template is None:
        encoded = tokenizer(PROMPT, return_tensors="pt")
    else:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    return {name: encoded[name].contiguous() for name in ("input_ids", "attention_mask")}
