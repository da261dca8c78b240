"""What came of cutting tiny models of every class of transformers (`make test-families`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from docs.generate import results
from docs.generate.markdown import table

_SWEPT = {
    "causal": "language models",
    "variants": "variants of them",
    "wrappers": "with pictures or sound",
}


def swept() -> str:
    """Return what came of cutting a tiny model of every class of transformers."""
    found = results.families()
    rows = []
    for kind, said in _SWEPT.items():
        models = found["kinds"][kind]["models"]
        counts = Counter(model["verdict"] for model in models.values())
        numbers = [counts[verdict] for verdict in ("works", "partly", "refused", "fails")]
        rows.append([said, str(len(models)), *map(str, numbers)])
    columns = ["models", "tried", "all cuts", "some cuts", "refused", "wrong"]
    pieces = [
        f"transformers {found['transformers']}, torch {found['torch'].partition('+')[0]}.",
        table(columns, rows, 1),
    ]
    for kind, said in _SWEPT.items():
        models = found["kinds"][kind]["models"]
        works = [f"`{name}`" for name, model in models.items() if model["verdict"] == "works"]
        pieces.append(f"**Every cut works, {said}:** {', '.join(works)}.")
        others = [[f"`{n}`", *_excuse(model)] for n, model in models.items() if "cuts" in model]
        if others:
            pieces.append(table([f"not every cut, {said}", "which not", "why"], others, 3))
    return "\n\n".join(pieces)


def swept_count() -> str:
    """Return the sentence of the front page on families."""
    found = results.families()["kinds"]
    good, all_of = {}, {}
    for kind in ("causal", "wrappers"):
        models = found[kind]["models"].values()
        good[kind] = sum(model["verdict"] == "works" for model in models)
        all_of[kind] = len(models)
    return (
        f"Every cut works for {good['causal']} of transformers' {all_of['causal']} classes of "
        f"language models that can be tried, and for {good['wrappers']} of the "
        f"{all_of['wrappers']} that read pictures or sound too. What is refused of the others, and "
        "why: [docs/families.md](docs/families.md)."
    )


def _excuse(model: Mapping[str, Any]) -> list[str]:
    """Return which cuts do not work, and why, in one line."""
    cuts = "all" if model["verdict"] == "refused" else ", ".join(model["cuts"])
    reason = model["reason"].partition(": ")[2].partition(": ")[2].replace("|", " ")
    first = " ".join(reason.split()).partition(". Add a record")[0]
    return [cuts, first[:200] + ("..." if len(first) > 200 else "")]
