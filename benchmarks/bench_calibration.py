"""Calibration: its time over the bare forward passes, and its memory over the statistics.

Gate first: the statistics are compared with those of hidden states that transformers itself
recorded. Then, in rounds: the bare layers up to the last boundary, and the same with statistics.
Memory is measured in new processes, one per number of tokens, as the peak of the resident set above
the model, beside that of one bare forward pass (Linux).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _passes import in_rounds, passes
from _results import append_rows, machine_folder
from rich.console import Console

from ghosted_fast.assets.downloads import fetch_demo_assets
from ghosted_fast.fit.candidates import score_intervals
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.ghosts import fit_ghost, fit_on_training_folds
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import hidden_size, num_layers
from ghosted_fast.models.loading import cast_parameters, load_model
from ghosted_fast.options import GhostOptions
from ghosted_fast.selection.criteria.request import candidate_intervals
from ghosted_fast.statistics.interval import interval_bytes
from ghosted_fast.statistics.token_weights import energy_floor, token_weights
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import relative_rms
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.folds import held_out_batches
from ghosted_fast.text.loading import load_texts, token_batches
from ghosted_fast.timing.estimates import Estimate, ratio_text

INTERVAL = (14, 19)
OPTIONS = GhostOptions(first_state="off")
PRECISION = 0.01
# What is promised: at most this times the bare layers, or the evaluations of whole models.
GOALS = {"one interval": 1.10, "all intervals": 1.40, "scoring": 0.60}
SCORE_TOKENS = 2048
# Of the evaluations of whole models every so many is measured; the rest take as long.
EVALUATE_EVERY = 6


def dense_model(dtype: str) -> tuple[Any, Any]:
    """Return the demo's model in a dtype, and its tokenizer."""
    model, tokenizer = load_model(fetch_demo_assets().model, torch.float32)
    return cast_parameters(model, getattr(torch, dtype)), tokenizer


def calibration_tokens(tokenizer: Any, count: int) -> list[torch.Tensor]:
    """Return `count` tokens of the demo's calibration text, in batches of 8 x 512."""
    return token_batches(tokenizer, load_texts(fetch_demo_assets().calibration), count)


@torch.inference_mode()
def gate(model: Any, batch: torch.Tensor) -> float:
    """Return the error of G against recorded hidden states, after checking it.

    Raises:
        SystemExit: The error is above 1e-6.
    """
    start, stop = INTERVAL
    collected = collect_statistics(model, [batch], [INTERVAL], OPTIONS)[0].gram.total()
    states = model(batch, output_hidden_states=True).hidden_states
    x, y = states[start], states[stop]
    eps = Decoder.of(model).norm_eps
    [tokens] = iterate_batches([batch])
    floor = energy_floor(tokens, y)
    weight = token_weights(x, y, OPTIONS, eps, floor).double()[..., None]
    x64 = x.double()
    features = x64 if eps is None else x64 / (x64.square().mean(-1, keepdim=True) + eps).sqrt()
    exact = (weight * features).flatten(0, 1).mT @ features.flatten(0, 1)
    error = relative_rms(collected.gram.tril(), exact.tril())
    if not error <= 1e-6:
        raise SystemExit(f"the Gram is off by {error:.1e}, above 1e-6")
    return error


def overheads(model: Any, batch: torch.Tensor, seconds: float) -> dict[str, dict[str, Any]]:
    """Return the time of calibration over that of the bare layers, as an `Estimate`."""
    count = num_layers(model)
    every = candidate_intervals(INTERVAL[1] - INTERVAL[0], count)
    result = {}
    for name, intervals in (("one interval", [INTERVAL]), ("all intervals", every)):
        works = passes(model, [batch], intervals, OPTIONS)
        rounds = in_rounds(works, model.device, seconds, PRECISION)
        result[name] = {
            "ratio": rounds.speedup("bare").to_dict(),
            "bare_ms": 1e3 * rounds.seconds("bare").value,
            "intervals": len(intervals),
        }
    return result


def scoring(model: Any, batches: list[torch.Tensor], seconds: float) -> dict[str, Any]:
    """Return the time of scoring every candidate of one length over that of evaluating as many.

    Of the whole models some are evaluated, and their time is taken that many times.

    Raises:
        SystemExit: The best candidate's score is not the loss of the model cut there.
    """
    intervals = candidate_intervals(INTERVAL[1] - INTERVAL[0], num_layers(model))
    statistics_ = collect_statistics(model, batches, intervals, OPTIONS)
    dtype = next(model.parameters()).dtype
    ghosts = [fit_on_training_folds(item, OPTIONS).to_module(dtype, "cpu") for item in statistics_]
    held_out = held_out_batches(list(iterate_batches(batches)), OPTIONS, SCORE_TOKENS)
    scores = score_intervals(model, held_out, intervals, ghosts)
    best = min(range(len(scores)), key=scores.__getitem__)
    chosen = sorted({*range(0, len(intervals), EVALUATE_EVERY), best})
    smaller = [
        remove_layers(model, list(range(*intervals[index])), [ghosts[index]], inplace=False)
        for index in chosen
    ]
    whole = [math.log(float(perplexity(variant, held_out))) for variant in smaller]
    difference = abs(whole[chosen.index(best)] - scores[best])
    if not difference <= 2e-2:
        raise SystemExit(f"the best score differs from the loss of the whole model by {difference}")
    if min(whole) != whole[chosen.index(best)]:
        raise SystemExit("another candidate has a lower loss than the best score's")
    works: dict[str, Callable[[], object]] = {
        "evaluated": lambda: [perplexity(variant, held_out) for variant in smaller],
        "scored": lambda: score_intervals(model, held_out, intervals, ghosts),
    }
    rounds = in_rounds(works, model.device, seconds, PRECISION)
    share = rounds.speedup("scored").inverse.times(len(chosen) / len(intervals))
    return {
        "ratio": share.to_dict(),
        "seconds": rounds.seconds("scored").value,
        "intervals": len(intervals),
    }


def peak_above(resident: int, work: Callable[[], object]) -> int:
    """Return by how many bytes the resident set exceeded `resident` at most while work ran."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    work()
    return status_bytes("VmHWM") - resident


def status_bytes(name: str) -> int:
    """Return a size that Linux keeps of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def measure_memory(dtype: str, tokens: int) -> None:
    """Print the peak above the model of one bare forward pass, and of calibrating and fitting."""
    model, tokenizer = dense_model(dtype)
    batches = calibration_tokens(tokenizer, tokens)
    options = GhostOptions()

    bare = passes(model, batches[:1], [INTERVAL], options)["bare"]

    def calibrate() -> None:
        fit_ghost(collect_statistics(model, batches, [INTERVAL], options)[0], options)

    gc.collect()
    resident = status_bytes("VmRSS")
    facts = {"bare": peak_above(resident, bare), "peak": peak_above(resident, calibrate)}
    facts["statistics"] = interval_bytes(hidden_size(model), options)
    sys.stdout.write(json.dumps(facts))


def main() -> None:
    """Run the gate, the times and the memory; append the rows to the results."""
    parser = argparse.ArgumentParser(description="Cost of calibration in time and memory")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--memory-tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--output", type=Path, default=machine_folder() / "calibration.jsonl")
    parser.add_argument("--measure-memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_memory:
        measure_memory(options.dtype[0], options.measure_memory)
        return
    rows: list[dict[str, Any]] = []
    console = Console(highlight=False, soft_wrap=True)
    for dtype in options.dtype:
        model, tokenizer = dense_model(dtype)
        batches = calibration_tokens(tokenizer, options.batches * 4096)
        error = gate(model, batches[0])
        for name, found in overheads(model, batches[0], options.seconds).items():
            rows.append({"what": name, "dtype": dtype, "error": error, **found})
            console.print(
                f"{dtype:9} {name:13} ({found['intervals']:2.0f}): "
                f"{ratio_text(Estimate(**found['ratio']))} the bare layers "
                f"(goal: {GOALS[name]:.2f})"
            )
        found = scoring(model, batches, options.seconds)
        rows.append({"what": "scoring", "dtype": dtype, **found})
        console.print(
            f"{dtype:9} scoring       ({found['intervals']:2.0f}): {Estimate(**found['ratio'])} of "
            f"as many evaluations of whole models (goal: {GOALS['scoring']:.2f})"
        )
    for tokens in options.memory_tokens:
        command = [sys.executable, __file__, "--dtype", options.dtype[0]]
        done = subprocess.run(
            [*command, "--measure-memory", str(tokens)], capture_output=True, check=True, text=True
        )
        memory = json.loads(done.stdout)
        rows.append({"what": "memory", "dtype": options.dtype[0], "tokens": tokens, **memory})
        above = memory["peak"] - memory["bare"]
        console.print(
            f"{options.dtype[0]:9} {tokens:6} tokens: peak {memory['peak'] / 2**20:.0f} MiB above "
            f"the model, of a bare forward pass {memory['bare'] / 2**20:.0f}; the difference is "
            f"{above / memory['statistics']:.2f} x the statistics"
        )
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = {"machine": machine_facts(), "date": date}
    append_rows(options.output, ({"benchmark": "calibration", **row, **facts} for row in rows))


if __name__ == "__main__":
    main()
