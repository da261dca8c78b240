"""What a sweep takes: computed for well-known shapes, as a dry run does, and measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from docs.generate.markdown import by_machine, measured_ratio, table
from ghosted_fast.fit.sweep.correcting import Correcting
from ghosted_fast.fit.sweep.heats import Heats
from ghosted_fast.fit.sweep.plan import SweepPlan, Work, plan_sweep, resident_bytes
from ghosted_fast.fit.sweep.shape import Shape
from ghosted_fast.improve.correction import (
    DEFAULT_HELD_OUT_TOKENS,
    DEFAULT_TOKENS,
    MOST_CORRECTIONS,
)
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.selection.criteria.ghost import TOKENS_FOR_THE_BEST
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.folds import PASS_TOKENS

TOKENS, LENGTH, ROWS = 32768, 512, 8
_ITEMSIZE = 2  # bf16


@dataclass(frozen=True)
class Model:
    """The sizes of a model: the width, layers, and so on as configurations name them."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False

    def shape(self) -> Shape:
        """Return the sizes that the plan asks for."""
        width, keys = self.hidden_size, 2 * self.key_value_heads
        attention = width * self.head_size * (2 * self.heads + keys)
        layer = attention + 3 * width * self.intermediate_size + 2 * width
        words = self.vocabulary * width
        return Shape(
            hidden_size=width,
            num_layers=self.num_layers,
            vocabulary=self.vocabulary,
            itemsize=_ITEMSIZE,
            layer_bytes=layer * _ITEMSIZE,
            layer_parameters=layer,
            all_bytes=_ITEMSIZE * (layer * self.num_layers + words * (1 if self.tied else 2)),
            beside=(words * _ITEMSIZE, words * _ITEMSIZE),
            on_device=(layer * _ITEMSIZE, 0),
        )

    @property
    def removed(self) -> int:
        """How many layers go: a quarter."""
        return self.num_layers // 4


MODELS = (
    Model("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, tied=True),
    Model("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    Model("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128, 128256, tied=True),
    Model("Qwen3-4B", 2560, 9728, 36, 32, 8, 128, 151936, tied=True),
    Model("Mistral-7B-v0.3", 4096, 14336, 32, 32, 8, 128, 32768),
    Model("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256),
    Model("Qwen3-14B", 5120, 17408, 40, 40, 8, 128, 151936),
    Model("Qwen3-32B", 5120, 25600, 64, 64, 8, 128, 151936),
    Model("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, 128256),
    Model("Qwen2.5-72B", 8192, 29568, 80, 64, 8, 128, 152064),
)


def planned(model: Model) -> tuple[int, SweepPlan, SweepPlan]:
    """Return the memory that a model takes with its pass, and what sweeps take.

    The first is the processor's, the second a GPU's.
    """
    options, shape, removed = GhostOptions(), model.shape(), model.removed
    count = model.num_layers - removed + 1
    correcting = Correcting(
        steps=MOST_CORRECTIONS,
        ghosts=1,
        layers=model.num_layers - removed,
        tokens=DEFAULT_TOKENS,
        judged=DEFAULT_HELD_OUT_TOKENS,
        pass_tokens=PASS_TOKENS,
    )
    ids = torch.empty(ROWS, LENGTH, dtype=torch.int64, device="meta")
    batches, scored = [Batch(ids, ids)] * (TOKENS // ids.numel()), RunOptions().score_tokens
    on_processor, on_gpu = (
        Heats.of(batches, TOKENS_FOR_THE_BEST * scored, torch.device(device))
        for device in ("cpu", "cuda")
    )
    work = Work(
        tokens=TOKENS,
        batch_tokens=LENGTH * ROWS,
        row_tokens=LENGTH,
        heats=on_processor,
        candidates=count,
        length=removed,
        statistics=count + 1,
        boundaries=model.num_layers + 1,
        correcting=correcting,
    )
    on_host, on_device = (
        plan_sweep(
            shape,
            replace(work, heats=heats),
            options,
            memory=1 << 62,
            on_disk=True,
            device_memory=memory,
        )
        for memory, heats in ((None, on_processor), (1 << 62, on_gpu))
    )
    return resident_bytes(shape, work, options), on_host, on_device


def shapes() -> str:
    """Return the table of models."""
    rows = []
    for model in MODELS:
        resident, plan, on_gpu = planned(model)
        weights = model.shape().all_bytes
        fit, on_gpu_fit = (
            item.read_bytes - item.corrections * item.correction_bytes for item in (plan, on_gpu)
        )
        read = (fit, on_gpu_fit, plan.correction_bytes)
        memory = (plan.memory_bytes, on_gpu.device_bytes, on_gpu.memory_bytes)
        sizes = (weights, resident, *memory, plan.disk_bytes, *read)
        layers = f"{model.removed} of {model.num_layers}"
        rows.append([model.name, layers, *(f"{size / 1e9:.1f}" for size in sizes)])
    columns = ["shape", "layers removed", "weights, bf16", "memory, model loaded"]
    columns += ["memory, swept", "swept by a GPU: its memory", "the host's beside it"]
    columns += ["disk for states", "read to fit", "by a GPU", "read by a correction"]
    return table(columns, rows)


_WORKS = {
    "bare": "the text through all layers",
    "fit": "choosing the layers, fitting the ghost, writing the folder",
    "cut": "cutting the folder, no ghost",
}


def measured() -> str:
    """Return what sweeps took, each in a process that the operating system gave no more to."""
    return by_machine(lambda machine: machine.newest("sweep"), _measured_of)


def _measured_of(found: list[dict[str, Any]]) -> str:
    of_shapes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        of_shapes.setdefault((row["shape"], row.get("layers")), []).append(row)
    return "\n".join(map(_measured_shape, of_shapes.values()))


def _measured_shape(found: list[dict[str, Any]]) -> str:
    first = found[0]
    if first["work"] == "compare":
        return (
            f"{first['shape']} in bf16, {first['tokens']:,} tokens, {first['remove']} layers "
            f"chosen and their ghost fitted, no corrections: {first['seconds']:.0f} s swept, "
            f"over the time in memory: {measured_ratio(first['ratio'])}; "
            f"{first['threads']} threads, {first['date'][:10]}.\n"
        )
    bare = next((row["seconds"] for row in found if row["work"] == "bare"), None)
    rows = []
    for row in found:
        sizes = (row["peak_bytes"], row["limit_bytes"])
        ratio = f"{row['seconds'] / bare:.2f}x" if bare and row["work"] == "fit" else ""
        rows.append([_WORKS[row["work"]], *(f"{size / 1e9:.1f}" for size in sizes)])
        own = row.get("candidate_seconds", 0.0)
        without = f"{(row['seconds'] - own) / bare:.2f}x" if ratio and own else ""
        rows[-1] += [f"{row['seconds'] / 60:.1f}", ratio, without]
    heading = (
        f"Llama of the {first['shape']} shape, {first['layers']} layers, random weights in bf16, "
        f"{first['weight_bytes'] / 1e9:.1f} GB of files; {first['tokens']:,} tokens, "
        f"{first['remove']} layers removed, {first['corrections']} corrections; "
        f"{first['threads']} threads, {first['date'][:10]}.\n\n"
    )
    columns = ["what a process did", "peak memory, GB", "limit", "minutes", "over the bare text"]
    columns.append("without the candidates' own way up")
    return heading + table(columns, rows, 1)
