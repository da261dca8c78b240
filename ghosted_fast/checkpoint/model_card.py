"""The model card of a ghosted model: the README.md of its folder, and of its page on a hub.

All of it comes from the configuration: the record of what was removed, and the report of the fit
where one is attached.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.facts import healing_text, is_hub_id, layers_as_text, shown_name
from ghosted_fast.models.runtime_classes import named_base_of
from ghosted_fast.timing.estimates import Estimate, speed_text

CARD = "README.md"
IMPORTED = "imported"
_ASIDE = f".{CARD}.kept"
_log = logging.getLogger(__name__)
_MARK = "<!-- Written by ghosted_fast. Remove this line to keep the card as it is. -->"
# What transformers writes into the card of a repository that has none.
_PLACEHOLDER = "This model card has been automatically generated."
_REPORTED = ("model", "criterion", "recovery", "calibration", "ghosts", "num_tokens",
             "calibrated_in")  # fmt: skip


def attach_report(config: Any, report: Mapping[str, Any]) -> bool:
    """Keep what a model card says of the fit in the configuration of a ghosted model.

    Args:
        config: The configuration; one without a `ghost` record is left as it is.
        report: What `GhostReport.to_dict()` returns. Two more keys are shown where present:
            `calibration` (the name of the text) and `models` (a list of `ModelRow.to_dict()`).

    Returns:
        Whether it was attached.
    """
    if getattr(config, "ghost", None) is None:
        return False
    kept = {key: report[key] for key in _REPORTED if report.get(key) is not None}
    if "model" in kept:
        kept["model"] = shown_name(kept["model"])
    if report.get("models"):
        kept["models"] = [_measured(row) for row in report["models"]]
    kept["corrections"] = sum(item["accepted"] for item in report.get("corrections") or [])
    if report.get("healing"):
        kept["healed"] = [_healed(report["healing"], kept.get("calibration"))]
    config.ghost["report"] = kept
    return True


def attach_healing(config: Any, healing: Mapping[str, Any], calibration: str | None = None) -> bool:
    """Add a healing to what the configuration of a ghosted model says of its making.

    What was measured of the model before it is dropped, and its recipe, if anything was changed.

    Args:
        config: The configuration; one without a `ghost` record is left as it is.
        healing: A `HealingFacts` as a dict.
        calibration: The name of the text.

    Returns:
        Whether it was attached.
    """
    if getattr(config, "ghost", None) is None:
        return False
    report = dict(config.ghost.get("report") or {})
    report.pop("models", None)
    if healing["best_tokens"]:
        config.ghost.pop("recipe", None)
    report["healed"] = [*report.get("healed", []), _healed(healing, calibration)]
    config.ghost["report"] = report
    return True


def _healed(healing: Mapping[str, Any], calibration: str | None) -> dict[str, Any]:
    """Return what a card says of a healing: all but its curve."""
    kept = {name: value for name, value in healing.items() if name != "curve"}
    return kept if calibration is None else {**kept, "calibration": calibration}


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a `ModelRow` that a card shows."""
    figures = {key: row[key] for key in ("name", "dtype", "layers", "parameters")}
    if row.get("perplexity"):
        figures["perplexity"] = row["perplexity"]["value"]
    if row.get("throughput"):
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            figures[key] = row["throughput"][key]
    return figures


def write_card(config: Any, folder: str | os.PathLike[str]) -> bool:
    """Write the model card into a folder, unless somebody else's is there.

    Args:
        config: The configuration of a ghosted model.
        folder: An existing folder.

    Returns:
        Whether it was written.
    """
    path = Path(folder) / CARD
    if path.exists() and not is_ours(path):
        return False
    write_atomically(path, model_card(config))
    return True


@contextmanager
def own_card_kept(folder: Path) -> Iterator[None]:
    """Keep somebody else's card as it is, whatever is written over it within the context.

    Transformers puts the hub's card, or a placeholder, in its place before it pushes a folder.

    Args:
        folder: An existing folder.
    """
    card = folder / CARD
    if card.is_file() and not is_ours(card):
        shutil.copy2(card, folder / _ASIDE)
    try:
        yield
    finally:
        put_card_back(folder)


def put_card_back(folder: Path) -> None:
    """Put a card that `own_card_kept` keeps in its place, before the folder is pushed.

    It is pushed where the hub has none that somebody wrote; else both stay as they are.

    Args:
        folder: The folder; nothing is done where no card is kept.
    """
    card, own = folder / CARD, folder / _ASIDE
    if not own.exists():
        return
    stays = card.is_file() and not is_ours(card)
    if stays and card.read_bytes() != own.read_bytes():
        _log.warning("the hub's %s and that in %s differ: both are kept", CARD, folder)
    own.replace(card)
    if not stays:
        os.utime(card)  # what is older than the push is not pushed


def is_ours(path: Path) -> bool:
    """Return whether a card was written by this library, or is transformers' placeholder."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return _MARK in text or _PLACEHOLDER in text


def model_card(config: Any) -> str:
    """Return the model card, Markdown with metadata in YAML."""
    from huggingface_hub import ModelCardData

    record = config.ghost
    report = record.get("report", {})
    base = str(report.get("model") or getattr(config, "_name_or_path", ""))
    metadata = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ghosted_fast", "layer-pruning", config.model_type],
    )
    family = named_base_of(type(config)).__name__.removesuffix("Config")
    removed = layers_as_text(record["removed"])
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# A ghosted {Path(base).name or family}",
        (
            f"{len(record['removed'])} of the {record['num_hidden_layers']} decoder layers of "
            f"{base or 'the dense model'} were removed: {removed}. In the place of each removed "
            "run stands one linear operator, a *ghost*:\n\n"
            "    y = x + M f(x) + b          f(x) = x  or  f(x) = x / rms(x)"
        ),
        _LOADING,
        _ghosts(record),
        _calibration(report),
        _table(report.get("models", [])),
        'Method: Yun et al., "Ghosted Layers", arXiv 2605.15491.',
        _MARK,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_LOADING = """\
## How to load it

With the package `ghosted_fast`, whose compiled operators make the ghosts fast:

```python
import ghosted_fast
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("<this folder or hub id>")
```

Without it, in plain PyTorch, by the code that is stored beside the weights (read it first):

```python
model = AutoModelForCausalLM.from_pretrained("<this folder or hub id>", trust_remote_code=True)
```

With neither, loading fails, rather than lose the ghosts."""


_GHOST_COLUMNS = (
    "removed",
    "stands",
    "features",
    "bias",
    "first-token state",
    "stored",
    "damping",
    "held-out error",
)
_GHOST_NOTE = """\
Layers are numbered from 0: the removed ones as in the dense model, the others as in this one. The
held-out error is the share of the energy of y - x that is left on calibration text the operator was
not fitted on; 1 is what leaving the ghost out gives."""


def _ghosts(record: Mapping[str, Any]) -> str:
    """Return the table of ghosts: their form, and how they were fitted where that is known."""
    if not record["ghosts"]:
        return ""
    facts: Sequence[Mapping[str, Any]] = record.get("report", {}).get("ghosts", [])
    if len(facts) != len(record["ghosts"]):
        facts = [{}] * len(record["ghosts"])
    count, removed = record["num_hidden_layers"], set(record["removed"])
    kept = [layer for layer in range(count) if layer not in removed]
    rows = []
    for ghost, fact in zip(record["ghosts"], facts, strict=True):
        before = ghost["side"] == "input"
        last = ghost["layer"] - before  # the kept layer before the gap
        start = 0 if last < 0 else kept[last] + 1
        stop = next((layer for layer in kept if layer >= start), count)
        rows.append(
            [
                layers_as_text(range(start, stop)),
                f"{'before' if before else 'behind'} layer {ghost['layer']}",
                "raw" if ghost["norm_eps"] is None else "normed",
                "yes" if ghost["bias"] else "no",
                "yes" if ghost["first_state"] else "no",
                ghost["quantization"] or "as the model",
                _figure(fact.get("damping"), ".1e"),
                _figure(fact.get("held_out_error"), ".4f"),
            ]
        )
    return f"## Ghosts\n\n{_markdown(_GHOST_COLUMNS, rows)}\n\n{_GHOST_NOTE}"


def _calibration(report: Mapping[str, Any]) -> str:
    said = [_fit(report)]
    for item in report.get("healed", []):
        text = f" The text was {item['calibration']}." if item.get("calibration") else ""
        said.append(f"Healing: {healing_text(item)}.{text}")
        if item["best_tokens"] and item["maps"]:
            said[-1] += " The factors are folded into the weights."
    sections = [section for section in said if section]
    return "## Calibration\n\n" + "\n\n".join(sections) if sections else ""


def _fit(report: Mapping[str, Any]) -> str:
    """Return how the operators were found, "" where that is not known."""
    if report.get("recovery") == IMPORTED:
        return "The operators were fitted by another code, and imported."
    if not set(report) - {"healed"}:
        return ""
    chosen = report.get("criterion")
    by = f"chosen by the criterion `{chosen}`" if chosen else "given"
    text = f" of {report['calibration']}" if report.get("calibration") else " of text"
    said = (
        f"The layers were {by}. The operators are a closed-form fit (recovery "
        f"`{report.get('recovery', 'ghost')}`) over {report.get('num_tokens', 0):,} tokens{text}."
    )
    if report.get("calibrated_in"):
        said += (
            " All of this was computed in the model with weights quantized by "
            f"{report['calibrated_in']}."
        )
    if report.get("corrections"):
        said += f" {report['corrections']} closed-form corrections moved them afterwards."
    if report.get("refined"):
        said += f" They alone were then trained for {report['refined']} steps."
    return said


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    heading = ["model", "dtype", "layers", "parameters", "perplexity", "prefill tok/s", "decode"]
    cells = [
        [
            str(row["name"]),
            str(row["dtype"]),
            str(row["layers"]),
            f"{row['parameters'] / 1e6:,.1f} M",
            _figure(row.get("perplexity"), ".2f"),
            _speed(row.get("prefill_tokens_per_s")),
            _speed(row.get("decode_tokens_per_s")),
        ]
        for row in rows
    ]
    return "## Measured\n\n" + _markdown(heading, cells)


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _speed(found: Mapping[str, Any] | float | None) -> str:
    """Return a speed for people; older folders have it without an interval."""
    if isinstance(found, Mapping):
        return speed_text(Estimate(**found))
    return _figure(found, ",.1f")
