"""Decoding speed of a real model in each engine: dense, naively pruned, and ghosted.

Every engine runs what `ghosted-fast export` writes for it, or the saved folder itself, in its own
environment (`make bench-engines` makes them). Within an engine the three models are loaded side by
side and measured in turn. That each gives the tokens of transformers is proven by tests/engines,
not here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ghosted_fast.assets import fetch_demo_assets
from ghosted_fast.checkpoint import save_model
from ghosted_fast.export.gguf import export_gguf
from ghosted_fast.machine import machine_facts
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.sources import cast_parameters, load_model, load_texts, token_batches
from ghosted_fast.speed import Throughput, throughput_of
from ghosted_fast.surgery import prune_model

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "bench_engines.jsonl"
REMOVED = range(14, 19)
CALIBRATION_TOKENS = 8192
NAMES = ("dense", "pruned", "ghosted")
ENGINES = {
    "transformers": ("fp32", "bf16"),
    "vllm": ("fp32", "bf16"),
    "llama.cpp": ("f32", "f16", "q8_0"),
    "ort-genai": ("fp32", "int8", "int4"),
}
_PYTHON = {
    "transformers": ROOT / ".venv/bin/python",
    "vllm": ROOT / ".venv-vllm/bin/python",
    "llama.cpp": ROOT / ".venv-engines/bin/python",
    "ort-genai": ROOT / ".venv-engines/bin/python",
}


def make_models(folder: Path) -> None:
    """Save the three models, in fp32 and bf16, and as GGUF files, where they are not yet."""
    base = fetch_demo_assets().model
    wanted = [folder / f"{name}-{dtype}" for name in NAMES for dtype in ("fp32", "bf16")]
    wanted += [folder / f"{name}-{kind}.gguf" for name in NAMES for kind in ENGINES["llama.cpp"]]
    if all(path.exists() for path in wanted):
        return
    dense, tokenizer = load_model(base, torch.float32)
    batches = token_batches(
        tokenizer, load_texts(fetch_demo_assets().calibration), CALIBRATION_TOKENS
    )
    # The form that every engine has a place for.
    ghosted, _ = ghost_model(dense, batches, removed=REMOVED, input="normed", first_state="off")
    models = {"dense": dense, "pruned": prune_model(dense, REMOVED), "ghosted": ghosted}
    for name, model in models.items():
        for kind in ENGINES["llama.cpp"]:
            export_gguf(model, folder / f"{name}-{kind}.gguf", base, kind, True)  # type: ignore[arg-type]
    # The copies share their weights: cast after all of them have been written.
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for name, model in models.items():
            save_model(cast_parameters(model, dtype), folder / f"{name}-{kind}", tokenizer, True)


def measure(engine: str, kind: str, folder: Path, given: argparse.Namespace) -> list[Throughput]:
    """Return the speed of the three models in an engine's own process.

    Raises:
        CalledProcessError: The engine failed; what it said has been shown.
    """
    python = _PYTHON[engine]
    if engine in ("transformers", "vllm"):
        command = [python, "-m", "ghosted_fast.cli", "bench", "--engine", engine, "--json"]
        for name in NAMES:
            command += ["--model", folder / f"{name}-{kind}"]
        command += ["--prompt-length", given.prompt_length, "--new-tokens", given.new_tokens]
        command += ["--repeats", given.repeats, "--threads", given.threads]
        rows = json.loads(_run(command, given.threads))["models"]
        return [Throughput(**row["throughput"]) for row in rows]
    if engine == "llama.cpp":
        paths = [folder / f"{name}-{kind}.gguf" for name in NAMES]
    else:
        paths = [folder / f"{name}-ort-{kind}" for name in NAMES]
        for name, path in zip(NAMES, paths, strict=True):
            if not path.exists():
                source = folder / f"{name}-fp32"
                _run([python, "-m", "ghosted_fast.cli", "export", source, "--to", engine,
                      "--precision", kind, "--output", path], given.threads)  # fmt: skip
    vocabulary = json.loads((folder / "dense-fp32" / "config.json").read_text())["vocab_size"]
    command = [python, Path(__file__).parent / "_engines.py", engine, "--paths", *paths]
    command += ["--prompt-length", given.prompt_length, "--new-tokens", given.new_tokens]
    command += ["--repeats", given.repeats, "--threads", given.threads, "--vocabulary", vocabulary]
    lines = _run(command, given.threads).splitlines()
    return [
        throughput_of(seconds, given.prompt_length, given.new_tokens, 1)
        for seconds in json.loads(lines[-1])
    ]


def _run(command: list[Any], threads: int) -> str:
    """Run a program away from this folder, so that each environment has its own library."""
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [str(part) for part in command],
        env=settings,
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.stderr.write(done.stderr[-4000:])
        done.check_returncode()
    return done.stdout


def rows_of(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each engine and precision, as it is measured."""
    make_models(given.folder)
    facts = machine_facts()
    for engine in given.engines:
        for kind in ENGINES[engine]:
            dense, pruned, ghosted = measure(engine, kind, given.folder, given)
            yield {
                "engine": engine,
                "precision": kind,
                **{
                    name: speed.to_dict()
                    for name, speed in zip(NAMES, (dense, pruned, ghosted), strict=True)
                },
                "ghosted_to_pruned": ghosted.decode_tokens_per_s / pruned.decode_tokens_per_s,
                "ghosted_to_dense": ghosted.decode_tokens_per_s / dense.decode_tokens_per_s,
                "threads": given.threads,
                "machine": facts,
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of engines."""
    table = Table(title="decoding, tokens per second (median of the repeats)")
    for column in ("engine", "precision", *NAMES, "ghosted / pruned", "ghosted / dense"):
        table.add_column(column, justify="left" if column in ("engine", "precision") else "right")
    for row in rows:
        speeds = [f"{row[name]['decode_tokens_per_s']:.1f}" for name in NAMES]
        ratios = [f"{row['ghosted_to_pruned']:.3f}", f"{row['ghosted_to_dense']:.3f}"]
        table.add_row(row["engine"], row["precision"], *speeds, *ratios)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench_engines")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = list(rows_of(given))
    show(rows)
    with given.results.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
