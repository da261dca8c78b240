"""Tables of what is lost with layers removed, and of what each recovery brings back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from docs.generate.markdown import measured_ratio, ratio, table
from docs.generate.results import (
    OUR_CLOSED_FORM,
    OUR_CRITERION,
    OUR_RECOVERY,
    Study,
    newest_rows,
    studies,
)
from ghosted_fast.facts import layers_as_text

HEADLINE_COUNT = 5


def relative(row: Mapping[str, Any], study: Study, text: str) -> float:
    """Return the perplexity of a row's model relative to the dense model's."""
    return float(row["perplexity"][text]["value"]) / study.dense[text]


def headline() -> str:
    """Return the numbers of the README."""
    study, _ = studies()
    text = study.texts[0]
    ours = study.row(HEADLINE_COUNT, OUR_CRITERION, OUR_RECOVERY)
    best, pairs = study.best_published(HEADLINE_COUNT), len(study.published(HEADLINE_COUNT))
    pair = f"{best['criterion']} + {best['recovery']}"
    (measured,) = (
        row
        for row in newest_rows("generate")
        if (row["model"], row["dtype"]) == ("ghosted", "bfloat16")
    )
    (fit,) = newest_rows("fit")
    nothing = relative(study.row(HEADLINE_COUNT, "streamline", "none"), study, text)
    rows = [
        ["Perplexity, dense model", f"{study.dense[text]:.2f} (1.00x)"],
        ["Perplexity, layers removed and nothing in their place", ratio(nothing)],
        [
            f"Perplexity, best of {pairs} published pairs ({pair})",
            ratio(relative(best, study, text)),
        ],
        ["Perplexity, `ghosted_fast`", f"**{ratio(relative(ours, study, text))}**"],
        [
            f"Speed of decoding, bf16, relative to dense, {_cores(measured)}",
            f"**{measured_ratio(measured['decode_ratio'])}**",
        ],
        [
            f"Time to choose the layers and to fit, {_cores(fit)}",
            f"{fit['seconds'] / 60:.0f} minutes",
        ],
    ]
    heading = f"{study.name}, {HEADLINE_COUNT} of {study.layer_count} layers removed"
    return table([heading, ""], rows)


def _cores(row: Mapping[str, Any]) -> str:
    """Return what a row was measured with: `2 cores of an Intel Xeon (Emerald Rapids)`."""
    return f"{row['machine']['threads']} cores of an {row['machine']['processor']}"


def recovery_table(study: Study) -> str:
    """Return a row for each number of removed layers and text: rivals and ours."""
    rows = []
    for count in study.counts:
        best = study.best_published(count)
        ours = study.row(count, OUR_CRITERION, OUR_RECOVERY)
        for text in study.texts:
            shown = [
                study.row(count, "streamline", "none"),
                study.row(count, "streamline", "ghost-paper"),
                best,
                study.row(count, OUR_CRITERION, OUR_CLOSED_FORM),
                ours,
            ]
            values = [f"{relative(row, study, text):.2f}" for row in shown]
            values[-1] = f"**{values[-1]}**"
            rows.append(
                [
                    f"{count} of {study.layer_count}",
                    layers_as_text(ours["removed"]),
                    f"{best['criterion']} + {best['recovery']}",
                    text,
                    *values,
                ]
            )
    columns = [
        "removed",
        "our layers",
        "best published pair",
        "text",
        "nothing",
        "streamline + ghost-paper",
        "best published pair",
        "ours, no corrections",
        "ours",
    ]
    dense = ", ".join(f"{value:.2f} on {text}" for text, value in study.dense.items())
    return f"{study.name}. Perplexity of the dense model: {dense}.\n\n" + table(columns, rows, 4)


def smollm2_table() -> str:
    """Return the table of SmolLM2."""
    return recovery_table(studies()[0])


def gemma3_table() -> str:
    """Return the table of Gemma 3."""
    return recovery_table(studies()[1])


def _excess(row: Mapping[str, Any], study: Study, text: str) -> float:
    return relative(row, study, text) - 1


def _published(study: Study, count: int, text: str) -> float:
    """Return the lowest excess perplexity of the published rows, on one text."""
    return min(
        _excess(row, study, text) for row in study.published(count) if row["refused"] is None
    )


def lead() -> str:
    """Return the excess perplexity of ours beside the rivals', as geometric means of all cells."""
    rows = []
    named = {"ours, no corrections": OUR_CLOSED_FORM, "ours": OUR_RECOVERY}
    for name, recovery in named.items():
        best, paper = [], []
        for study in studies():
            for count in study.counts:
                for text in study.texts:
                    own = _excess(study.row(count, OUR_CRITERION, recovery), study, text)
                    pair = study.row(count, "streamline", "ghost-paper")
                    best.append(own / _published(study, count, text))
                    paper.append(own / _excess(pair, study, text))
        rows.append([name, f"{_mean(best):.2f}", f"{_mean(paper):.2f}"])
    columns = [
        "excess perplexity (perplexity / dense - 1)",
        "relative to the best published pair of each cell",
        "relative to streamline + ghost-paper",
    ]
    return table(columns, rows)


def _mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def first_token_gaps() -> str:
    """Return what is lost in gaps that hold the layer in which the first token's state arises."""
    study, _ = studies()
    gaps = [key[1:] for key in study.more if key[0] == "none"]
    rows = []
    for start, stop in gaps:
        for recovery in ("none", "ghost-paper", OUR_CLOSED_FORM, OUR_RECOVERY):
            found = study.more[recovery, start, stop]
            values = [f"{found[text] / study.dense[text]:.2f}" for text in study.texts]
            rows.append([layers_as_text(range(start, stop)), recovery, *values])
    return f"{study.name}, perplexity relative to dense.\n\n" + table(
        ["removed", "recovery", *study.texts], rows, 2
    )


def calibration_texts() -> str:
    """Return perplexities after calibration on other texts and on less text."""
    rows = []
    for study in studies():
        for key, found in study.more.items():
            if key[0] in ("web", "self"):
                tokens = key[1] if key[0] == "web" else study.grid["about"]["calibration_tokens"]
                source = "web text" if key[0] == "web" else "the model's own text"
                values = [f"{found[text] / study.dense[text]:.3f}" for text in study.texts]
                rows.append([study.name, source, f"{tokens:,}", *values])
    return "Perplexity relative to dense, without corrections.\n\n" + table(
        ["model", "calibration", "tokens", *studies()[0].texts], rows, 2
    )
