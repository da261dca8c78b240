"""A fit with the defaults, in units of one forward pass of its text, and where its time goes.

SmolLM2-135M-Instruct in bf16 loses 5 of its 30 layers. The passes of the dense model, with its head
as in training, are measured over some of the text before and after the fit; the fit itself is run
once. Gate: the ghosted model's perplexity is below the pruned one's.
"""

from __future__ import annotations

import argparse
import datetime
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _results import append_rows, machine_folder
from rich.console import Console

from ghosted_fast.assets.downloads import fetch_demo_assets
from ghosted_fast.cli._shared.results import Result, show
from ghosted_fast.cli._shared.tables import profile_table
from ghosted_fast.errors import GateError
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.models.loading import load_model
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.text.loading import load_texts, token_batches
from ghosted_fast.timing.estimates import Estimate
from ghosted_fast.timing.stopwatch import warm_sample

REMOVE = 5
EVALUATION_TOKENS = 5120
# Batches of the text whose passes are timed, twice before the fit and twice after it.
TIMED = 2
GOAL = 6.0


@torch.inference_mode()
def seconds_per_token(model: Any, batches: list[torch.Tensor]) -> list[float]:
    """Return the dense model's seconds per token, batch by batch; one batch warms up."""
    model(batches[0], use_cache=False)
    return [
        warm_sample(partial(model, batch, use_cache=False), model.device, 1, warm_up=False)
        / batch.numel()
        for batch in 2 * batches[:TIMED]
    ]


def main() -> None:
    """Fit, and append a row to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=49152)
    parser.add_argument("--output", type=Path, default=machine_folder() / "fit.jsonl")
    given = parser.parse_args()
    assets = fetch_demo_assets()
    dense, tokenizer = load_model(assets.model, dtype="bfloat16")
    batches = token_batches(tokenizer, load_texts(assets.calibration), given.tokens)
    evaluation = token_batches(tokenizer, load_texts(assets.evaluation), EVALUATION_TOKENS)
    passes = seconds_per_token(dense, batches)
    began = time.perf_counter()
    smaller, report = ghost_model(dense, batches, REMOVE, run=RunOptions(progress=True))
    seconds = time.perf_counter() - began
    passes += seconds_per_token(dense, batches)
    pruned = prune_model(dense, report.removed)
    found = {
        name: perplexity(model, evaluation).value
        for name, model in (("dense", dense), ("pruned", pruned), ("ghosted", smaller))
    }
    if not found["dense"] < found["ghosted"] < found["pruned"]:
        raise GateError(f"expected the ghosted model between dense and pruned, got {found}")
    ratio = Estimate.of(passes).times(report.num_tokens / seconds).inverse
    row = {
        "tokens": report.num_tokens,
        "removed": report.removed,
        "seconds": seconds,
        "passes": ratio.to_dict(),
        "perplexity": found,
        "spans": report.spans,
        "machine": machine_facts(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    append_rows(given.output, [row])
    show(Result({}, [profile_table(report.spans)]), as_json=False)
    Console(highlight=False).print(f"{ratio} forward passes of the text (goal: {GOAL:g})")


if __name__ == "__main__":
    main()
