"""What came of the cuts of a model, and of all models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

KINDS = ("causal", "variants", "wrappers")
CUTS = ("first", "middle", "last", "gaps")
OK, REFUSED, FAIL, DENSE = "ok", "refused", "fail", "dense"
WORKS, PARTLY, FAILS = "works", "partly", "fails"


@dataclass
class Outcome:
    """What came of one cut of one model.

    Attributes:
        kind: One of `KINDS`.
        name: The model type, with its variant.
        cut: One of `CUTS`.
        columns: `OK`, `REFUSED`, `FAIL`, or `DENSE` where the dense model fails the same, by name.
        details: What was raised or how far apart the logits are, by column.
    """

    kind: str
    name: str
    cut: str
    columns: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return `WORKS`, `REFUSED` or `FAILS`."""
        found = set(self.columns.values())
        if FAIL in found or not found:
            return FAILS
        return REFUSED if REFUSED in found else WORKS

    @property
    def reason(self) -> str:
        """Return the first refusal or failure, "" if there is none."""
        bad = [c for c, state in self.columns.items() if state in (REFUSED, FAIL)]
        return next((f"{column}: {self.details.get(column, '')}" for column in bad), "")


def summary(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """Return the verdict of each model, by name.

    A model works if every cut does, or is refused since other layers need those, which may be so of
    less than half of them. It is refused if all its cuts are, and works partly if some are for
    another reason, or if not even the dense model comes back as it was saved.
    """
    models: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        models.setdefault(outcome.name, []).append(outcome)
    return {name: _of_one(found) for name, found in sorted(models.items())}


def _of_one(outcomes: list[Outcome]) -> dict[str, Any]:
    verdicts = [outcome.verdict for outcome in outcomes]
    bad = [outcome for outcome in outcomes if outcome.verdict != WORKS]
    others = [outcome for outcome in bad if "to be kept" not in outcome.reason]
    if 2 * len(bad) >= len(outcomes):
        others = bad
    lost = [outcome for outcome in outcomes if outcome.columns.get("reload") == DENSE]
    if FAILS in verdicts:
        verdict = FAILS
    elif WORKS not in verdicts:
        verdict = REFUSED
    else:
        verdict = PARTLY if others or lost else WORKS
    found: dict[str, Any] = {"verdict": verdict}
    worst = [o for o in bad if o.verdict == FAILS] or others
    if worst:
        found["cuts"] = [outcome.cut for outcome in worst]
        found["reason"] = worst[0].reason
    elif lost:
        found["cuts"] = [outcome.cut for outcome in lost]
        found["reason"] = "reload: dense: transformers does not load the dense model as it saved it"
    dense = sorted({c for o in outcomes for c, state in o.columns.items() if state == DENSE})
    if dense:
        found["dense"] = dense  # what the dense model cannot do either
    return found
