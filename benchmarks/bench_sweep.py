"""The sweep: layers chosen and fitted, and a folder cut, under a limit of the operating system.

A checkpoint of a known shape with random weights is written, a few megabytes at a time. New
processes then work on it, each under a limit on its memory (RLIMIT_DATA: the kernel refuses what
goes beyond), and say their peak and their time. Gate first: on a small model what a sweep gives is
compared with what the way in memory gives. The work `compare` takes SmolLM2 both ways, in rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _passes import in_rounds
from _results import append_rows, machine_folder
from _shapes import SHAPES, llama_config
from rich.console import Console

from ghosted_fast.assets.downloads import fetch_demo_assets
from ghosted_fast.cli._shared.values import parse_bytes
from ghosted_fast.errors import GateError
from ghosted_fast.fit.sweep.climb import Sweep, SweptText, climb
from ghosted_fast.fit.sweep.plan import PROGRAM_BYTES
from ghosted_fast.fit.sweep.shelf import FolderShelf
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.models.loading import load_model
from ghosted_fast.models.unloaded.files import Piece, bytes_of, write_tensors
from ghosted_fast.models.unloaded.opening import meta_tensors, open_unloaded
from ghosted_fast.models.unloaded.source import FolderSource
from ghosted_fast.options import Count, GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.folder import prune_folder
from ghosted_fast.swept.asked import Asked
from ghosted_fast.swept.run import ghost_unloaded
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.loading import load_texts, token_batches
from ghosted_fast.timing.estimates import Estimate, ratio_text

COMPARED = "SmolLM2-135M"
# Layers that SmolLM2 loses.
_COMPARED_REMOVED = 5
_PRECISION = 0.01
_BLOCK = 1_000_003
_SHARD_LAYERS = 8


@dataclass(frozen=True)
class RandomPiece:
    """A tensor of random numbers that is never in memory whole."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    block: torch.Tensor

    def chunks(self) -> Iterator[Any]:
        """Yield its bytes: norms are ones, the rest is normal, scaled by its width."""
        left = int(torch.Size(self.shape).numel())
        scale = 0.7 / self.shape[-1] ** 0.5
        part = (self.block * scale if len(self.shape) > 1 else torch.ones_like(self.block)).to(
            self.dtype
        )
        while left:
            found = part[:left].contiguous()
            left -= len(found)
            yield bytes_of(found)


def make_checkpoint(folder: Path, shape: str, layers: int | None = None) -> None:
    """Write a llama of some shape with random weights, unless it is there."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if (folder / "config.json").exists():
        return
    config = llama_config(shape, layers)
    with torch.device("meta"), no_init_weights():
        names = AutoModelForCausalLM.from_config(config).state_dict()
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    shards: dict[int, dict[str, Piece]] = {}
    for name, tensor in names.items():
        number = int(name.split(".")[2]) // _SHARD_LAYERS + 1 if ".layers." in name else 0
        shards.setdefault(number, {})[name] = RandomPiece(
            tuple(tensor.shape), torch.bfloat16, block
        )
    files: dict[str, str] = {}
    count = len(shards)
    for number, (_, pieces) in enumerate(sorted(shards.items()), start=1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_tensors(folder / file, pieces)
        files |= dict.fromkeys(pieces, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def check(device: str = "cpu") -> None:
    """Raise GateError unless a sweep of a device gives what the way in memory gives."""
    model, batches = tiny_model("llama"), [random_tokens(4, 48, seed=seed) for seed in range(5)]
    run = RunOptions(corrections=1, score_tokens=64, device=device)
    bounds = (1e-5, 1e-4) if device == "cpu" else (1e-3, 2e-2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        cut, report = ghost_model(open_unloaded(folder), batches, 2, run=run)
        smaller, expected = ghost_model(model, batches, 2, run=run)
        cut.save(Path(folder) / "cut")
        tensors = open_unloaded(Path(folder) / "cut").tensors
        ghosts = {n: held.read() for n, held in tensors.items() if n.endswith("ghost.weight")}
    expected_ghosts = {n: w for n, w in smaller.named_parameters() if n.endswith("ghost.weight")}
    if report.removed != expected.removed or ghosts.keys() != expected_ghosts.keys() or not ghosts:
        raise GateError(f"the sweep chose {report.removed}, the way in memory {expected.removed}")
    errors = [item.held_out_error for item in (*report.ghosts, *expected.ghosts)]
    if relative_rms(torch.tensor(errors[:1]), torch.tensor(errors[1:])) > bounds[0]:
        raise GateError(f"the held-out errors differ: {errors}")
    for name, weight in ghosts.items():
        if relative_rms(weight, expected_ghosts[name]) > bounds[1]:
            raise GateError(f"{name} is another, once corrected, than that of the way in memory")


def text_of(tokens: int, length: int, rows: int, vocabulary: int) -> list[torch.Tensor]:
    """Return random tokens in batches of some rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary, (tokens // length, length), generator=generator)
    return list(ids.split(rows))


def data_bytes() -> int:
    """Return the memory of this process that RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmData:\s*(\d+) kB", status)[1])  # type: ignore[index]


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do one piece of work in this process, under its limit, and return what it took."""
    torch.set_num_threads(arguments.threads)
    limit = allowed = parse_bytes(arguments.limit.removeprefix("+"))
    if arguments.limit.startswith("+"):
        check()  # what is imported on the way is part of the program
        limit, allowed = limit + data_bytes(), limit + PROGRAM_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    dense, out = Path(arguments.folder) / "dense", Path(arguments.folder) / arguments.work
    facts: dict[str, Any] = {}
    began = time.perf_counter()
    if arguments.work == "cut":
        prune_folder(dense, range(4, 4 + arguments.remove), out, overwrite=True)
    else:
        unloaded = open_unloaded(dense)
        vocabulary = unloaded.model.config.vocab_size
        batches = text_of(arguments.tokens, arguments.length, arguments.rows, vocabulary)
        if arguments.work == "bare":
            with tempfile.TemporaryDirectory(dir=arguments.folder) as states:
                swept = SweptText.of(iterate_batches(batches), torch.device("cpu"))
                sweep = Sweep(FolderSource(unloaded), swept, FolderShelf(Path(states) / "s"))
                began = time.perf_counter()
                climb(sweep, sweep.source.decoder.num_layers, lambda _: None)
        else:
            run = RunOptions(
                corrections=arguments.corrections,
                memory=allowed,
                state=Path(arguments.folder) / "states",
                score_tokens=arguments.score_tokens,
            )
            asked = Asked(Count(arguments.remove), "ghost", "ghost", GhostOptions(), run)
            plan = asked.plan(unloaded, list(iterate_batches(batches)))
            facts["planned_bytes"] = plan.memory_bytes
            smaller, report = ghost_unloaded(unloaded, batches, asked)
            facts["removed"] = report.removed
            facts["candidate_seconds"] = sum(
                spent["seconds"]
                for path, spent in report.spans.items()
                if path.rsplit("/", 1)[-1] in ("candidates", "scoring")
            )
            smaller.save(out, overwrite=True)
    facts["seconds"] = time.perf_counter() - began
    facts["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts["limit_bytes"] = limit
    return facts


def in_new_process(arguments: argparse.Namespace, what: str, limit: str) -> dict[str, Any]:
    """Return what a piece of work took in a process of its own."""
    command = [sys.executable, __file__, "--work", what, "--limit", limit]
    names = ("folder", "tokens", "length", "rows", "remove", "threads", "score_tokens")
    for name in (*names, "corrections"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    # Large blocks go back when they are freed: what a heap in pieces takes is chance.
    allocator = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    environment = {**os.environ, **allocator}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if finished.returncode:
        raise GateError(f"{what} under {limit} failed: {finished.stderr.strip()[-2000:]}")
    facts: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return facts


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each piece of work, as soon as it is done."""
    check()
    if "compare" in arguments.works:
        yield compare(arguments)
    works = [what for what in arguments.works if what != "compare"]
    if not works:
        return
    dense = Path(arguments.folder) / "dense"
    make_checkpoint(dense, arguments.shape, arguments.layers)
    unloaded = open_unloaded(dense)
    about = {
        "shape": arguments.shape,
        "layers": unloaded.model.config.num_hidden_layers,
        "weight_bytes": unloaded.nbytes,
        "tokens": arguments.tokens,
        "remove": arguments.remove,
        "corrections": arguments.corrections,
        "threads": arguments.threads,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
    }
    assert meta_tensors(unloaded.tensors)
    limits = {"bare": arguments.memory, "fit": arguments.memory, "cut": arguments.cut_memory}
    for what in works:
        yield {"work": what, **in_new_process(arguments, what, limits[what]), **about}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a row with the time of a sweep over that of the way in memory, SmolLM2 in bf16.

    Raises:
        GateError: They chose other layers.
    """
    torch.set_num_threads(arguments.threads)
    assets = fetch_demo_assets()
    dense, tokenizer = load_model(assets.model, dtype="bfloat16")
    texts = load_texts(assets.calibration)
    batches = token_batches(tokenizer, texts, arguments.tokens, arguments.length, arguments.rows)
    run = RunOptions(corrections=0, score_tokens=arguments.score_tokens)
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        works = {
            "loaded": lambda: ghost_model(dense, batches, _COMPARED_REMOVED, run=run)[1],
            "swept": lambda: ghost_model(
                open_unloaded(folder), batches, _COMPARED_REMOVED, run=run
            )[1],
        }
        found = {way: work().removed for way, work in works.items()}
        if found["loaded"] != found["swept"]:
            raise GateError(f"the two ways chose other layers: {found}")
        rounds = in_rounds(works, dense.device, arguments.seconds, _PRECISION)
    return {
        "work": "compare",
        "shape": COMPARED,
        "ratio": rounds.speedup("loaded", over="swept").to_dict(),
        "seconds": rounds.seconds("swept").value,
        "tokens": arguments.tokens,
        "remove": _COMPARED_REMOVED,
        "threads": arguments.threads,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
    }


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--remove", type=int, default=2)
    parser.add_argument("--corrections", type=int, default=0)
    parser.add_argument("--score-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--memory", default="7GB", help="limit of the fit; '+160MB' for so much above the program"
    )
    parser.add_argument("--cut-memory", default="1.5GB", help="limit of the cut")
    parser.add_argument("--works", nargs="+", choices=("bare", "fit", "cut", "compare"),
                        default=["bare", "fit", "cut"])  # fmt: skip
    parser.add_argument("--seconds", type=float, default=600.0, help="of the comparison, at most")
    parser.add_argument("--folder", default="build/bench_sweep")
    parser.add_argument("--output", type=Path, default=machine_folder() / "sweep.jsonl")
    parser.add_argument("--work", choices=("bare", "fit", "cut"), help=argparse.SUPPRESS)
    parser.add_argument("--limit", help=argparse.SUPPRESS)
    return parser.parse_args()


def described(row: dict[str, Any]) -> str:
    """Return a row in words."""
    if row["work"] == "compare":
        ratio = ratio_text(Estimate(**row["ratio"]))
        return f"{row['shape']}: {row['seconds']:.1f} s swept, over the time in memory: {ratio}"
    peak, allowed, weights = (
        row[name] / 1e9 for name in ("peak_bytes", "limit_bytes", "weight_bytes")
    )
    return (
        f"{row['work']}: peak {peak:.2f} GB of {allowed:.2f} allowed, {row['seconds']:.0f} s; "
        f"weights {weights:.2f} GB"
    )


def main() -> None:
    arguments = parsed()
    if arguments.work is not None:
        sys.stdout.write(json.dumps(work(arguments)) + "\n")
        return
    console = Console()
    for row in measure(arguments):
        append_rows(arguments.output, [row])
        console.print(described(row))


if __name__ == "__main__":
    main()
