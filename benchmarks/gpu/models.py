"""What is measured of a whole model with random weights: speed, graphs, calibration, fit.

The shape decides the speed and the memory, the weights do not; so nothing is fetched. What a ghost
is worth cannot be seen here.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.bench_ops.timers import timer_for
from ghosted_fast.errors import GateError
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.measure.speed import compare_throughput
from ghosted_fast.measure.system import machine_facts, peak_memory, reset_peak_memory
from ghosted_fast.models.boundaries import visit_boundaries
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.selection.criteria.request import candidate_intervals
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.testing import relative_rms
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.timing.stopwatch import warm_sample
from gpu.plan import Setting, result_file

# A decode step in bf16 with another cache and other shapes, against the whole sequence at once.
_GATE = 3e-2
_PROMPT = 16  # tokens before the step that is put into a graph


@dataclass(frozen=True)
class Shape:
    """A model and how much is done with it.

    Attributes:
        config: Of a Llama.
        removed: The layers that are taken out.
        batches: Calibration batches.
        batch: Sequences and tokens of each.
        prompt: Tokens of a prompt.
        new_tokens: Tokens that are written after it.
        batch_sizes: Prompts at a time.
        seconds: Of each measurement of speed, at most.
    """

    config: Mapping[str, int]
    removed: range
    batches: int
    batch: tuple[int, int]
    prompt: int
    new_tokens: int
    batch_sizes: tuple[int, ...]
    seconds: float

    def text(self) -> list[Tensor]:
        """Return random calibration tokens."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.config["vocab_size"]
        return [
            torch.randint(vocabulary, self.batch, generator=generator) for _ in range(self.batches)
        ]


SHAPES = {
    "8b": Shape(
        config={
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
        removed=range(16, 24),
        batches=8,
        batch=(8, 512),
        prompt=512,
        new_tokens=64,
        batch_sizes=(1, 8),
        seconds=60.0,
    ),
    "tiny": Shape(
        config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 256,
            "max_position_embeddings": 256,
        },
        removed=range(3, 5),
        batches=8,
        batch=(2, 64),
        prompt=16,
        new_tokens=4,
        batch_sizes=(1, 2),
        seconds=0.1,
    ),
}


def dense_model(shape: Shape, device: torch.device) -> Any:
    """Return a random Llama of a shape in bf16, made on its device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**shape.config, dtype="bfloat16"))
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def three_models(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the dense model, and without layers, with nothing and with a ghost in their place."""
    dense = dense_model(shape, device)
    width = shape.config["hidden_size"]
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


@torch.no_grad()
def measure_graphs(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the milliseconds of a decode step of each model, in a CUDA graph and by calls."""
    found = {}
    for name, model in three_models(shape, device).items():
        step = decode_step(model, device, shape.prompt + shape.new_tokens)
        timed = timer_for(device)(step)
        samples = sorted(timed.sample() for _ in range(5))
        eager = sorted(warm_sample(step, device, 5) for _ in range(5))
        found[name] = {
            "ms": 1e3 * statistics.median(samples),
            "eager_ms": 1e3 * statistics.median(eager),
            "note": timed.note,
        }
    return {"steps": found}


def _timed(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Return the median seconds of three runs after one, and the most memory that they held."""
    run()
    gc.collect()
    reset_peak_memory(device)
    samples = [warm_sample(run, device, 1, warm_up=False) for _ in range(3)]
    return {"seconds": statistics.median(samples), "peak_bytes": peak_memory(device)}


@torch.no_grad()
def measure_calibration(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the time and memory of the pass over text, for one interval and for all of a length.

    Each is set against the bare layers up to its last boundary.
    """
    dense, text = dense_model(shape, device), shape.text()
    one = (shape.removed.start, shape.removed.stop)
    every = candidate_intervals(len(shape.removed), shape.config["num_hidden_layers"])
    found = {}
    for name, intervals in (("one interval", [one]), ("all intervals", every)):
        last = max(stop for _, stop in intervals)

        def bare(last: int = last) -> None:
            for item in iterate_batches(text):
                visit_boundaries(dense, item, [last], lambda *_: None)

        def collected(intervals: list[tuple[int, int]] = intervals) -> None:
            collect_statistics(dense, text, intervals, GhostOptions())

        alone, whole = _timed(bare, device), _timed(collected, device)
        found[name] = {
            "intervals": len(intervals),
            "bare": alone,
            "collected": whole,
            "ratio": whole["seconds"] / alone["seconds"],
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
}


def run_model_part(name: str, setting: Setting) -> None:
    """Measure one part and write its figures."""
    device = torch.device(setting.device)
    found = PARTS[name](SHAPES[setting.shape], device)
    found["machine"] = {**machine_facts(), "device": setting.device}
    text = json.dumps(found, indent=2, ensure_ascii=False)
    write_atomically(result_file(name, setting), text + "\n")
