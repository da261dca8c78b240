"""How much memory a run may take, and what is done with a model that needs more.

See `input_args` for what a group is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ghosted_fast.cli._shared import values
from ghosted_fast.cli._shared.input_args import CalibrationArgs, ModelArgs
from ghosted_fast.cli._shared.verb import usage_error

if TYPE_CHECKING:
    from ghosted_fast.fit.sweep.plan import SweepPlan
    from ghosted_fast.models.unloaded.opening import Unloaded
    from ghosted_fast.swept.asked import Asked
    from ghosted_fast.text.batches import Batch


@dataclass(frozen=True, kw_only=True)
class SweptModelArgs(ModelArgs):
    """One model, which need not fit in memory."""

    title: ClassVar = "Memory"
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory",
            parser=values.parse_bytes,
            metavar="SIZE",
            help="What all may take: '7GB', with --device cuda of the GPU's memory. A model that "
            "takes more stays in its files and is swept through layer by layer. If not given: four "
            "fifths of what is free.",
        ),
    ] = None
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            help="Folder that such a sweep keeps its states in, to go on after it was stopped.",
        ),
    ] = None

    @property
    def place(self) -> str:
        """What computes, as `RunOptions` takes it; each process finds its own GPU by it."""
        from ghosted_fast.cli._shared.loading import choose_device

        return str(choose_device("auto")) if self.device == "auto" else self.device

    def left_in_files(self) -> Unloaded | None:
        """Return the model without its weights; None if it can only be loaded."""
        from ghosted_fast.cli._shared.loading import choose_device
        from ghosted_fast.swept.run import left_in_files

        if choose_device(self.device).type not in ("cpu", "cuda") or self.trust_remote_code:
            return None
        return left_in_files(self.model, self.memory, self.dtype)


def swept(
    model: SweptModelArgs, calibration: CalibrationArgs, asked: Asked, beside: Path | None
) -> tuple[Unloaded, Asked] | None:
    """Return a model that is to be swept through and how, None for one that is to be loaded.

    Args:
        model: Which model.
        calibration: Which text.
        asked: What is asked for.
        beside: Folder for states, where some must go to files and none was named.

    Raises:
        ArgumentError: It has to be swept through, and that cannot do what is asked.
        CalibrationError: Too little memory is allowed for that.
    """
    from ghosted_fast.swept.run import fits

    unloaded, batches = model.left_in_files(), text_shape(calibration)
    if unloaded is None or fits(unloaded, batches, asked):
        return None
    if calibration.from_model:
        raise usage_error(
            "expected a text for a model that is swept through layer by layer, got 'self': text "
            "that the model generates needs it in memory",
            "--calibration",
        )
    asked.check()
    if asked.plan(unloaded, batches).disk_bytes and asked.run.state is None:
        asked = replace(asked, run=replace(asked.run, state=beside))
    return unloaded, asked


def text_shape(calibration: CalibrationArgs) -> list[Batch]:
    """Return batches without memory, as many and as large as those of a text will be."""
    import torch

    from ghosted_fast.text.batches import Batch

    length, rows = calibration.sequence_length, calibration.tokens // calibration.sequence_length
    sizes = [calibration.batch_size] * (rows // calibration.batch_size)
    sizes += [rows % calibration.batch_size] if rows % calibration.batch_size else []
    empty = [torch.empty(size, length, dtype=torch.int64, device="meta") for size in sizes]
    return [Batch(ids, ids) for ids in empty]


def read_text(unloaded: Unloaded, calibration: CalibrationArgs, first: bool) -> list[Any]:
    """Return the batches of a text for a model that stays in its files."""
    from ghosted_fast.models.loading import tokenizer_of

    return calibration.load(unloaded.model, tokenizer_of(unloaded.spec), first)


def dry_run(
    model: SweptModelArgs, calibration: CalibrationArgs, asked: Asked
) -> tuple[Any, dict[str, Any], list[str]]:
    """Return a model for a dry run, which is not loaded if that can be, and what it would take.

    Returns:
        The model; facts and lines for people, none where it had to be loaded.

    Raises:
        ArgumentError: There are no such layers.
    """
    from ghosted_fast.errors import GhostedFastError
    from ghosted_fast.fit.sweep.plan import operations_per_second, resident_bytes
    from ghosted_fast.fit.sweep.shape import Shape
    from ghosted_fast.models.decoder import Decoder

    unloaded = model.left_in_files()
    if unloaded is None:
        return model.open()[0], {}, []
    shape, batches = Shape.of(unloaded), text_shape(calibration)
    needed = resident_bytes(shape, asked.work(batches, shape), asked.options)
    facts: dict[str, Any] = {"resident_bytes": needed}
    whose = "memory" if asked.device.type == "cpu" else f"the memory of {asked.device}"
    lines = [f"{needed / 1e9:.1f} GB of {whose} with the model in it"]
    try:
        asked.check()
        plan = asked.plan(unloaded, batches)
    except GhostedFastError as error:
        return unloaded.model, facts, [*lines, f"no sweep: {error}"]
    dtype = Decoder.of(unloaded.model).dtype
    seconds = plan.operations / operations_per_second(dtype, shape.hidden_size, asked.device)
    facts["sweep"] = plan.to_dict() | {"seconds": seconds}
    return unloaded.model, facts, [*lines, sweep_line(plan, seconds)]


def sweep_line(plan: SweepPlan, seconds: float) -> str:
    """Return what a sweep takes, for people."""
    about = f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
    with_corrections = f", with {plan.corrections} corrections" if plan.corrections else ""
    tried = f", {plan.numbers_tried} numbers of layers tried" if plan.numbers_tried else ""
    device, spent = "", "on this machine"
    if plan.device_bytes:  # whose time is often that of the reads
        device, spent = f"{plan.device_bytes / 1e9:.1f} GB of the GPU's memory, ", "of computing"
    return (
        f"swept through layer by layer: {device}{plan.memory_bytes / 1e9:.1f} GB of memory, "
        f"{plan.disk_bytes / 1e9:.1f} GB of disk, {plan.read_bytes / 1e9:.1f} GB of reads, about "
        f"{about} {spent}{with_corrections}{tried}"
    )
