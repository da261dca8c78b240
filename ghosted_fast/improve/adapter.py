"""What healing trained, kept apart: a PEFT adapter that can be put on the model and taken off."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghosted_fast._atomic_files import atomic_folder
from ghosted_fast.checkpoint.save import check_target, written_or_told
from ghosted_fast.errors import ArgumentError, MissingExtraError
from ghosted_fast.facts import HealingFacts, healing_text
from ghosted_fast.improve.factors import Trained
from ghosted_fast.options import Rank


def check_adapter(folder: Path, rank: Rank, overwrite: bool) -> None:
    """Raise, before any work, unless an adapter can be written to a folder.

    Raises:
        MissingExtraError: Package peft is absent.
        ArgumentError: There are no factors to write, or see `check_target`.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("an adapter needs peft: pip install 'ghosted_fast[peft]'")
    if not rank or rank == "full":
        raise ArgumentError(
            f"expected a rank > 0 for an adapter, got {rank!r}: it holds nothing but factors"
        )
    check_target(folder, overwrite, kind="an adapter's folder")


@torch.no_grad()
def save_adapter(model: Any, trained: Trained, facts: HealingFacts, folder: Path) -> None:
    """Write the factors of maps and ghosts as a PEFT adapter of the model, whole or not at all.

    Args:
        model: The model that was healed. It is wrapped, and unwrapped again.
        trained: What was trained of it, apart from its own weights.
        facts: What the healing did, for the adapter's card.
        folder: The folder to make, or to replace.

    Raises:
        OutputError: It cannot be written.
    """
    import peft

    items: list[Any] = [*trained.factors, *trained.ghost_factors]
    # PEFT takes maps by their modules, and by its name any other weight [rows, columns].
    as_maps = [item for item in items if isinstance(item.module, nn.Linear)]
    as_weights = [item for item in items if item not in as_maps]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=facts.rank,
        lora_alpha=facts.rank,
        target_modules=[item.name for item in as_maps],
        target_parameters=[f"{item.name}.weight" for item in as_weights],
    )
    adapted: Any = peft.get_peft_model(model, config)
    try:
        for item in items:
            layer: Any = model.get_submodule(item.name)
            b, a = (item.a.mT, item.b.mT) if item.is_transposed else (item.b, item.a)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
        with written_or_told(folder), atomic_folder(folder) as workspace:
            adapted.save_pretrained(workspace / "new")
            card = workspace / "new" / "README.md"
            said = card.read_text(encoding="utf-8") if card.exists() else ""
            said += f"\n## Healing\n\n{healing_text(vars(facts)).capitalize()}.\n"
            card.write_text(said, encoding="utf-8")
    finally:
        adapted.unload()
