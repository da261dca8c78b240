"""Tables of what smaller models still answer and write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from docs.generate.markdown import table
from docs.generate.results import RESULTS
from ghosted_fast.assets.questions import PREFIX
from ghosted_fast.facts import layers_as_text
from ghosted_fast.measure.paired import paired_difference

NOT_YET = "Not measured yet.\n"
# By the names of `benchmarks/behaviour_table.py`, in the order of the tables.
LABELS = {
    "nothing": "nothing",
    "paper": "streamline + ghost-paper",
    "published": "best published pair: {criterion} + {recovery}",
    "closed form": "ours, no corrections",
    "ours": "ours",
    "healed": "ours, healed on {learned:,} tokens",
}
Record = dict[str, Any]


def accuracy() -> str:
    """Return the tables of right answers, and of others than the dense model's."""
    return _by_model(_accuracy_of)


def generation() -> str:
    """Return the tables of likeness to the dense model, and of problems solved."""
    return _by_model(_generation_of)


def _by_model(show: Callable[[Record], str]) -> str:
    """Return what is shown of each model, under its name; a sentence where there is none."""
    path = RESULTS / "behaviour.json"
    models = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else {}
    # What a killed run left is no table.
    whole = [model for model in models.values() if model["points"]]
    return "\n".join(f"**{model['name']}.** {show(model)}" for model in whole) or NOT_YET


def _accuracy_of(model: Record) -> str:
    tasks, dense = list(model["chance"]), model["dense"]
    asked = [_values(dense["tasks"][task]["right"]) for task in tasks]
    chances = [model["chance"][task] for task in tasks]
    rows = [["", "", "chance", *map(_percent, [*chances, _mean(chances)]), ""]]
    means = [_mean(values) for values in asked]
    rows += [["", "", "dense", *map(_percent, [*means, _mean(means)]), ""]]
    for about, point in _points(model):
        own = [_values(point["tasks"][task]["right"]) for task in tasks]
        cells = [_compared([mine], [theirs]) for mine, theirs in zip(own, asked, strict=True)]
        rows.append([*about, *cells, _compared(own, asked), _percent(_flips(point, dense, tasks))])
    heads = [f"{task.removeprefix(PREFIX)}, %" for task in tasks]
    columns = ["removed", "layers", "in their place", *heads, "mean, %", "other answers, %"]
    counts = ", ".join(
        f"{len(values):,} of {task.removeprefix(PREFIX)}"
        for task, values in zip(tasks, asked, strict=True)
    )
    return f"Questions: {counts}.\n\n{table(columns, rows, 3)}"


def _generation_of(model: Record) -> str:
    dense = model["dense"]["problems"]
    solved = {kind: _values(text) for kind, text in dense.items()}
    rows = [["", "", "dense", *[""] * 4, *(_percent(_mean(right)) for right in solved.values())]]
    for about, point in _points(model):
        cells = [
            _compared([_values(point["problems"][kind])], [right]) for kind, right in solved.items()
        ]
        rows.append([*about, *_likeness(point["fidelity"]), *cells])
    columns = ["removed", "layers", "in their place", "same likeliest token, %", "KL, nats"]
    columns += ["tokens until they part (median)", "prompts on which they never part, %"]
    columns += [f"{kind}, %" for kind in solved]
    given = model["points"][0]["fidelity"]
    through = "through the chat template" if model["template"] else "without a chat template"
    problems = len(next(iter(solved.values())))
    return (
        f"{given['num_prompts']} prompts {through}, {given['num_tokens']:,} tokens of answers of "
        f"up to {given['new_tokens']}; {problems:,} problems of each kind.\n\n"
        f"{table(columns, rows, 3)}"
    )


def _points(model: Record) -> Iterator[tuple[list[str], Record]]:
    """Yield how each row begins, and its point: few removed layers first, then as in `LABELS`."""
    order = list(LABELS)
    points = sorted(model["points"], key=lambda item: (item["remove"], order.index(item["row"])))
    for point in points:
        removed = f"{point['remove']} of {model['layers']}"
        label = LABELS[point["row"]].format(**point)
        yield [removed, layers_as_text(point["removed"]), label], point


def _flips(point: Record, dense: Record, tasks: Sequence[str]) -> float:
    """Return the share of all questions for which another answer is chosen."""
    changed = [
        own != other
        for task in tasks
        for own, other in zip(
            point["tasks"][task]["chosen"], dense["tasks"][task]["chosen"], strict=True
        )
    ]
    return _mean(changed)


def _likeness(found: Record) -> list[str]:
    parts = found["parts_after"]
    return [
        _percent(found["agreement"]),
        f"{found['divergence']:.3f}",
        f"over {found['new_tokens']}" if parts is None else f"{parts:g}",
        f"{100 * found['never_parts']:.0f}",
    ]


def _values(digits: str) -> list[int]:
    return [int(digit) for digit in digits]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _compared(own: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]) -> str:
    """Return the mean of some sets in percent, and the interval of its difference in points."""
    found = paired_difference(own, dense)
    score = _percent(_mean([_mean(values) for values in own]))
    return f"{score} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
