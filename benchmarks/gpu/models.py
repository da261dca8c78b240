"""What is measured of a whole model with random weights: speed, graphs, calibration, fit, sweep.

The shape decides the speed and the memory, the weights do not; so nothing is fetched. What a ghost
is worth cannot be seen here.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _passes import in_rounds, passes
from _shapes import SHAPES, llama_config
from torch import Tensor

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.bench_ops.timers import timer_for
from ghosted_fast.errors import GateError
from ghosted_fast.measure.speed import compare_throughput
from ghosted_fast.measure.system import machine_facts, peak_memory, reset_peak_memory
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.selection.criteria.request import candidate_intervals
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.testing import relative_rms
from ghosted_fast.timing.rounds import time_variants
from ghosted_fast.timing.stopwatch import warm_sample
from gpu.plan import Setting, result_file
from gpu.sweeps import measure_sweep

# A decode step in bf16 with another cache and other shapes, against the whole sequence at once.
_GATE = 3e-2
_BATCHES = 8  # of calibration
_BY_CALLS = " by calls"
_PROMPT = 16  # tokens before the step that is put into a graph
_PREFILL, _DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Shape:
    """A model and how much is done with it.

    Attributes:
        sizes: The name of its sizes.
        removed: The layers that are taken out.
        batch: Sequences and tokens of each calibration batch.
        prompt: Tokens of a prompt.
        new_tokens: Tokens that are written after it.
        batch_sizes: Prompts at a time.
        seconds: Of each measurement of speed, at most.
    """

    sizes: str
    removed: range
    batch: tuple[int, int]
    prompt: int
    new_tokens: int
    batch_sizes: tuple[int, ...]
    seconds: float

    def text(self) -> list[Tensor]:
        """Return random calibration tokens."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = SHAPES[self.sizes]["vocab_size"]
        return [torch.randint(vocabulary, self.batch, generator=generator) for _ in range(_BATCHES)]


WORK = {
    "8b": Shape(
        sizes="8b",
        removed=range(16, 24),
        batch=(8, 512),
        prompt=512,
        new_tokens=64,
        batch_sizes=(1, 8),
        seconds=60.0,
    ),
    "tiny": Shape(
        sizes="tiny",
        removed=range(3, 5),
        batch=(2, 64),
        prompt=16,
        new_tokens=4,
        batch_sizes=(1, 2),
        seconds=0.1,
    ),
}


def dense_model(shape: Shape, device: torch.device) -> Any:
    """Return a random llama of a shape in bf16, made on its device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(llama_config(shape.sizes)).eval()


def three_models(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the dense model, and without layers, with nothing and with a ghost in their place."""
    dense = dense_model(shape, device)
    width = SHAPES[shape.sizes]["hidden_size"]
    ghost = GhostLinear(
        width, norm_eps=Decoder.of(dense).norm_eps, device=device, dtype=torch.bfloat16
    )
    torch.nn.init.normal_(ghost.weight, std=0.1 / width**0.5)
    return {
        "dense": dense,
        "pruned": prune_model(dense, shape.removed),
        "ghosted": remove_layers(dense, shape.removed, [ghost]),
    }


def measure_speed(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return prefill and decode speed of the three models, in rounds, for each batch size."""
    models = three_models(shape, device)
    found = {}
    for size in shape.batch_sizes:
        speeds = compare_throughput(
            models, shape.prompt, shape.new_tokens, size, seconds=shape.seconds
        )
        found[str(size)] = {name: speed.to_dict() for name, speed in speeds.items()}
    return {"batch sizes": found}


def decode_step(model: Any, device: torch.device, length: int) -> Callable[[], Tensor]:
    """Return a step that writes the same token after the same prompt each time it is called.

    A static cache counts its tokens on the device; the step takes its own away again, so that it
    can be replayed any number of times.

    Raises:
        GateError: The step's logits are not those of the whole sequence.
    """
    from transformers import StaticCache

    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, _PROMPT + 1), generator=generator).to(device)
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(ids[:, :-1], past_key_values=cache)
    token = ids[:, -1:].clone()
    counts = [layer.cumulative_length for layer in cache.layers]

    def step() -> Tensor:
        logits: Tensor = model(token, past_key_values=cache).logits
        torch._foreach_sub_(counts, 1)
        return logits

    whole = model(ids, use_cache=False).logits[:, -1:]
    for _ in range(2):
        error = relative_rms(step(), whole)
        if not error <= _GATE:
            raise GateError(f"a step with a static cache is off by {error:.1e}, above {_GATE:.0e}")
    return step


def prefill_step(model: Any, device: torch.device, length: int) -> Callable[[], Tensor]:
    """Return what reads a prompt of a length and gives the logits of its last token."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)

    def step() -> Tensor:
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
        return logits

    return step


def _race(
    steps: dict[str, Callable[[], Tensor]], tokens: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Return the speed of a step of each model, in a CUDA graph and by calls."""
    variants: dict[str, Callable[[], float]] = {}
    notes = {}
    for name, step in steps.items():
        timed = timer_for(device)(step)
        notes[name] = timed.note
        variants[name] = timed.sample
        variants[name + _BY_CALLS] = partial(warm_sample, step, device, 5)
    rounds = time_variants(variants, seconds=seconds)
    return {
        name: {
            "tokens_per_s": rounds.seconds(name).inverse.times(tokens).to_dict(),
            "ms": rounds.seconds(name).times(1e3).to_dict(),
            "to_dense": None if name == "dense" else rounds.speedup(name, "dense").to_dict(),
            "eager_ms": rounds.seconds(name + _BY_CALLS).times(1e3).to_dict(),
            "note": note,
        }
        for name, note in notes.items()
    }


@torch.no_grad()
def measure_graphs(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the speed of prefill and of a decode step, in a CUDA graph and by calls."""
    models, length = three_models(shape, device), shape.prompt + shape.new_tokens
    prefills = {name: prefill_step(model, device, shape.prompt) for name, model in models.items()}
    found = {_PREFILL: _race(prefills, shape.prompt, device, shape.seconds)}
    decodes = {name: decode_step(model, device, length) for name, model in models.items()}
    found[_DECODE] = _race(decodes, 1, device, shape.seconds)
    return {"steps": found}


@torch.no_grad()
def measure_calibration(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the time and memory of the pass over text, for one interval and for all of a length.

    Each is raced with the bare layers up to its last boundary.
    """
    dense, text = dense_model(shape, device), shape.text()
    one = (shape.removed.start, shape.removed.stop)
    layers = SHAPES[shape.sizes]["num_hidden_layers"]
    every = candidate_intervals(len(shape.removed), layers)
    found = {}
    for name, intervals in (("one interval", [one]), ("all intervals", every)):
        works = passes(dense, text, intervals, GhostOptions())
        for work in works.values():
            work()
        gc.collect()
        reset_peak_memory(device)
        works["collected"]()
        memory = peak_memory(device)
        rounds = in_rounds(works, device, shape.seconds)
        found[name] = {
            "intervals": len(intervals),
            "bare_seconds": rounds.seconds("bare").to_dict(),
            "seconds": rounds.seconds("collected").to_dict(),
            "ratio": rounds.speedup("bare").to_dict(),
            "peak_bytes": memory,
        }
    return {"tokens": sum(batch.numel() for batch in text), "passes": found}


def measure_fit(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return where the time of a fit goes, without corrections and with one, and its memory."""
    dense, text = dense_model(shape, device), shape.text()
    found = {}
    for corrections in (0, 1):
        gc.collect()
        reset_peak_memory(device)
        reports: list[Any] = []

        def fit(corrections: int = corrections, reports: list[Any] = reports) -> None:
            run = RunOptions(corrections=corrections)
            reports.append(ghost_model(dense, text, removed=list(shape.removed), run=run)[1])

        seconds = warm_sample(fit, device, 1, warm_up=False)
        found[f"{corrections} corrections"] = {
            "seconds": seconds,
            "phases": reports[0].seconds,
            "peak_bytes": peak_memory(device),
        }
    return {"tokens": sum(batch.numel() for batch in text), "fits": found}


PARTS: dict[str, Callable[[Shape, torch.device], dict[str, Any]]] = {
    "speed": measure_speed,
    "graphs": measure_graphs,
    "calibration": measure_calibration,
    "fit": measure_fit,
    "sweep": measure_sweep,
}


def run_model_part(name: str, setting: Setting) -> None:
    """Measure one part and write its figures."""
    device = torch.device(setting.device)
    found = PARTS[name](WORK[setting.shape], device)
    found["machine"] = {**machine_facts(), "device": setting.device}
    text = json.dumps(found, indent=2, ensure_ascii=False)
    write_atomically(result_file(name, setting), text + "\n")
