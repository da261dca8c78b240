"""What the processes of the tests run, each as one rank of a group."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.cli.app import app
from ghosted_fast.fit import walk
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.sweep.shelf import FolderShelf
from ghosted_fast.grid import run_grid
from ghosted_fast.improve.healing import heal
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.models.unloaded.sharded import unshard_weights
from ghosted_fast.options import GhostOptions, HealOptions, PerplexityBound, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.selection.criteria import CRITERIA
from ghosted_fast.selection.select import select_layers
from ghosted_fast.statistics import interval
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text import folds
from ghosted_fast.text.batches import Batch
from support.healed_models import visible
from support.swept_models import Killed, ghosts_of, small_heats


def be_a_rank(
    program: Callable[..., Any],
    rank: int,
    size: int,
    folder: Path,
    timeout_s: float,
    arguments: tuple[Any, ...],
) -> None:
    """Join a group, run a program, and leave its result, or its error, in a file."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store, timeout, world_size=size, rank=rank)
    began = time.monotonic()
    try:
        result = program(*arguments)
    except Exception as error:
        result = (type(error).__name__, str(error))
    torch.save((result, time.monotonic() - began), folder / f"result{rank}")
    if dist.is_initialized():
        dist.destroy_process_group()


def text(batches: int) -> list[Batch]:
    """Return batches of different sizes, with padding, one of them without any token."""
    result = []
    for seed in range(batches):
        rows = 5 - seed % 2
        mask = torch.ones(rows, 24, dtype=torch.int64)
        mask[seed % rows, :7] = 0
        mask[rows - 1, 20:] = 0
        if seed == 1:
            mask[:] = 0
        result.append(Batch(random_tokens(rows, 24, seed), mask))
    return result


def statistics(batches: int, first_state: str) -> list[Tensor]:
    """Return both forms' sums, floors and 13 sequences' first tokens of three intervals."""
    options = GhostOptions(features="auto", first_state=first_state)  # type: ignore[arg-type]
    intervals = [(1, 3), (4, 6), (0, 3)]
    found: list[Tensor] = []
    with patch.object(interval, "_MAX_FIRST_TOKENS", 13):
        collected = collect_statistics(tiny_model("llama"), text(batches), intervals, options)
    for item in collected:
        found += [part for gram in item.grams for part in gram.sums]
        found.append(torch.tensor(item.energy_floor))
        if item.first is not None:
            found += [*item.first.rows(), item.first.mean(), torch.tensor(item.first.count)]
    return found


def choices() -> dict[str, tuple[list[int], list[float]]]:
    """Return what each criterion chooses, with all scores."""
    chosen = {}
    for criterion in CRITERIA:
        found = select_layers(
            tiny_model("llama"), text(9), 2, criterion, run=RunOptions(beam=6, score_tokens=200)
        )
        chosen[criterion] = (found.removed, [item.score for item in [*found.scores, *found.sets]])
    run = RunOptions(score_tokens=200, corrected_candidates=3)
    found = select_layers(tiny_model("llama"), text(16), 2, run=run)
    corrected = [item.corrected for item in found.scores if item.corrected is not None]
    chosen["ghost, a second look"] = found.removed, corrected
    return chosen


def checkpoints(folder: Path) -> None:
    """Save models whose ghosts were fitted and corrected, and one with a rival."""
    rank, model = distributed.index(), tiny_model("llama")
    run = RunOptions(corrections=2)
    smaller, _ = ghost_model(model, text(9), removed=[1, 3, 4], run=run)
    patched, _ = ghost_model(model, text(9), 2, recovery="linearpatch-r", criterion="streamline")
    save_model(smaller, folder / "ghosted")
    if dist.is_initialized():  # in a group, only rank 0 saves
        dist.destroy_process_group()
    save_model(smaller, folder / f"ghosted{rank}")
    save_model(patched, folder / f"patched{rank}")


def swept(
    dense: Path, states: Path | None, corrections: int = 0
) -> tuple[list[int], list[float], list[Tensor]]:
    """Return what a sweep through a folder chooses, with all scores, and its ghost."""
    run = RunOptions(corrections=corrections, score_tokens=200, state=states)
    with pytest.MonkeyPatch.context() as patched:
        small_heats(patched, drop_above=1.0)
        cut, report = ghost_model(open_unloaded(dense), text(9), 2, run=run)
    return report.removed, [item.score for item in report.scores], ghosts_of(cut)


def bounded(
    dense: Path, texts: list[Any], states: Path | None, bound: float, criterion: str
) -> tuple[list[int], list[tuple[int, float]], list[Tensor]]:
    """Return what a sweep through a folder finds for a bound: layers, trials, and ghosts."""
    run = RunOptions(corrections=0, score_tokens=32, state=states)
    remove = PerplexityBound(bound)
    cut, report = ghost_model(open_unloaded(dense), texts, remove, criterion=criterion, run=run)
    assert report.budget is not None
    tried = [(trial.remove, trial.value) for trial in report.budget.tried]
    return report.removed, tried, ghosts_of(cut)


def stopped_apart(
    dense: Path, texts: list[Any], states: Path, remove: int | PerplexityBound, stops: list[int]
) -> list[tuple[list[int], list[Tensor]]]:
    """Stop sweeps where rank 0 has kept what it came to and rank 1 has not, and go on with each.

    Args:
        dense: The model.
        texts: The text.
        states: Where they are kept.
        remove: What is asked for.
        stops: Which time of keeping it is, for each sweep.

    Returns:
        The layers and ghosts of each.
    """
    found, keep, rank = [], FolderShelf.keep, distributed.index()
    for stop in stops:
        run = RunOptions(corrections=0, score_tokens=70, state=states / str(stop))
        left = stop

        def keep_or_stop(shelf: FolderShelf, facts: dict[str, Any]) -> None:
            nonlocal left
            left -= 1
            if left or rank == 0:
                keep(shelf, facts)
            if not left:
                raise Killed

        with suppress(Killed), patch.object(FolderShelf, "keep", keep_or_stop):
            swept_ghosts(dense, texts, remove, run)
        assert left == 0, "the sweep has ended before"
        found.append(swept_ghosts(dense, texts, remove, run))
    return found


def swept_ghosts(
    dense: Path, texts: list[Any], remove: int | PerplexityBound, run: RunOptions | None = None
) -> tuple[list[int], list[Tensor]]:
    """Return the layers and ghosts that a sweep finds."""
    run = run or RunOptions(corrections=0, score_tokens=70)
    with pytest.MonkeyPatch.context() as patched:
        small_heats(patched, drop_above=1e9)
        cut, report = ghost_model(open_unloaded(dense), texts, remove, run=run)
    return report.removed, ghosts_of(cut)


def healing(folder: Path) -> tuple[dict[str, Tensor], list[float], bool]:
    """Return the weights of a model that was fitted and healed, the judgements, and whether the
    dense model is as it was."""
    model, rank = tiny_model("llama"), distributed.index()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = HealOptions(rank=3, tokens_per_step=480, held_out_tokens=300, learning_rate=5e-3)
    run = RunOptions(corrections=0, heal=options, heal_state=folder / f"state{rank}")
    with patch.object(folds, "PASS_TOKENS", 100):
        smaller, report = ghost_model(model, text(24), removed=[2, 3], run=run)
    assert report.healing is not None
    unchanged = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return smaller.state_dict(), [point.divergence for point in report.healing.curve], unchanged


def sharded_healing(
    family: str, folder: Path, shard: bool, apart: bool = False
) -> tuple[dict[str, Tensor], list[float], dict[str, int]]:
    """Heal with weights that the ranks share out, or not, and save; dense stays as it was.

    Returns:
        The healed weights, the judgements, and bytes: of the matrices of both models' layers
        ("all"), of them and of parts of them at the end ("kept"), of the most that were whole in a
        pass ("most"), and of one layer's ("layer").
    """
    dense = visible(tiny_model(family))
    with distributed.ignoring_group():
        smaller, _ = ghost_model(dense, text(24), removed=[2, 3], run=RunOptions(corrections=0))
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    bytes_: dict[str, int] = {"most": 0}
    gather = distributed.gather_parts

    def watched(parts: list[Tensor], wholes: list[Tensor]) -> None:
        gather(parts, wholes)
        bytes_["most"] = max(bytes_["most"], _storage_bytes(_matrices(smaller, dense)))

    options = HealOptions(rank=3, tokens_per_step=480, held_out_tokens=300, learning_rate=5e-3)
    adapter = folder / "adapter" if apart else None
    with (
        patch.object(folds, "PASS_TOKENS", 100),
        patch.object(distributed, "gather_parts", watched),
    ):
        facts = heal(smaller, dense, text(24), options, adapter=adapter, shard=shard)
    parts = [
        item for item in gc.get_objects() if type(item) is Tensor and item.dtype is torch.uint8
    ]
    matrices = _matrices(smaller, dense)
    bytes_["kept"] = _storage_bytes([*matrices, *parts])
    save_model(smaller, folder / "saved")
    unshard_weights(dense)
    bytes_["all"] = _storage_bytes(matrices)
    bytes_["layer"] = sum(_storage_bytes([item]) for item in _matrices(dense)) // 6
    after = dense.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return smaller.state_dict(), [point.divergence for point in facts.curve], bytes_


def _matrices(*models: Any) -> list[Tensor]:
    """Return the matrices of the layers of models, but those of ghosts."""
    layers = [layer for model in models for layer in decoder_layers(model)]
    modules = [module for layer in layers for module in layer.modules()]
    kept = [module for module in modules if not isinstance(module, GhostLinear)]
    own = [item for module in kept for item in module.parameters(recurse=False)]
    return [item for item in own if item.dim() > 1]


def _storage_bytes(tensors: list[Tensor]) -> int:
    storages = {item.untyped_storage()._cdata: item.untyped_storage() for item in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def sharded_poisoned() -> None:
    """Fail in a layer on rank 1 alone, while the others wait for its part of the weights."""
    dense = tiny_model("llama")
    with distributed.ignoring_group():
        smaller, _ = ghost_model(dense, text(24), removed=[2, 3], run=RunOptions(corrections=0))

    def spoil(*_: Any) -> None:
        raise ValueError("this layer is broken")

    if distributed.index() == 1:
        decoder_layers(dense)[2].mlp.register_forward_hook(spoil)
    heal(smaller, dense, text(24), HealOptions(rank=3, held_out_tokens=300), shard=True)


def healed_as_it_is(what: str) -> None:
    """Heal models whose weights are spread over the ranks already, by torch or by a healing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes seconds to import

    dense = tiny_model("llama")
    with distributed.ignoring_group():
        smaller, _ = ghost_model(dense, text(24), removed=[2, 3], run=RunOptions(corrections=0))
    options = HealOptions(rank=3, held_out_tokens=300)
    if what == "fsdp":
        for layer in decoder_layers(smaller):
            fully_shard(layer, mesh=init_device_mesh("cpu", (distributed.count(),)))
    else:
        heal(smaller, dense, text(24), options, shard=True)
    heal(smaller, dense, text(24), options, shard=True)


def poisoned() -> None:
    """Meet NaN on rank 1 alone, in text of some length."""
    model = tiny_model("llama")

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if output.shape[1] > 8 else output

    if distributed.index() == 1:
        decoder_layers(model)[2].register_forward_hook(spoil)
    ghost_model(model, text(9), removed=[2, 3])


def too_little_text() -> None:
    """Give all ranks one batch, of which only rank 0 has anything."""
    ghost_model(tiny_model("llama"), [random_tokens(2, 20)], removed=[2, 3])


def called_differently(what: str) -> None:
    """Give rank 1 other arguments than the others."""
    odd = distributed.index() == 1
    model = tiny_model("llama", seed=int(odd and what == "model"))
    batches = text(8 if odd and what == "text" else 9)
    if odd and what == "function":
        collect_statistics(model, batches, [(2, 4)])
    ghost_model(model, batches, removed=[2] if odd and what == "removed" else [2, 3])


def leave_in(batches: int, how: Callable[[], None]) -> None:
    """Make this process leave when it has run so many batches of a pass."""
    visit, left = walk.visit_intervals, iter(range(batches))

    def leave(*arguments: Any) -> None:
        if next(left, None) is None:
            how()
        visit(*arguments)

    walk.visit_intervals = leave


def dies(batches: int) -> None:
    """End rank 1 without a word."""
    if distributed.index() == 1:
        leave_in(batches, lambda: os._exit(9))
    ghost_model(tiny_model("llama"), text(9), removed=[2, 3])


def falls_silent(seconds: float) -> None:
    """Let rank 1 take longer than the others wait."""
    if distributed.index() == 1:
        leave_in(1, lambda: time.sleep(seconds))
    ghost_model(tiny_model("llama"), text(9), removed=[2, 3])


def one_alone(folder: Path) -> list[int]:
    """Work on rank 1 only; then call what does not run in a group."""
    if distributed.index() == 1:
        with distributed.ignoring_group():
            return ghost_model(tiny_model("llama"), text(9), removed=[2, 3])[1].removed
    run_grid(tiny_model("llama"), text(9), {"text": text(2)}, [1], folder / "grid")
    return []


def command_line(
    rank: int, size: int, port: int, arguments: list[str], dies_in: int | None, folder: Path
) -> None:
    """Run the command line as `torchrun` does, and leave its status and streams in a file."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))  # fmt: skip
    if dies_in is not None and rank == 1:
        leave_in(dies_in, lambda: os._exit(9))
    status: object = 0
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            app(arguments)
        except SystemExit as end:
            status = end.code
    torch.save((status, out.getvalue(), err.getvalue()), folder / f"result{rank}")
