"""Load saved folders with trust_remote_code where `ghosted_fast` cannot be imported.

    python load_remote.py FOLDER ANSWERS NAME ...

Each name is a folder in FOLDER that holds `expected.pt`; a line of ANSWERS is its name and how far
its logits are from those, or what was raised.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["ghosted_fast"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

AUTO = {"wrappers": (AutoModelForImageTextToText, AutoModelForMultimodalLM)}


def distance(folder: Path) -> float:
    """Return how far the logits of a loaded model are from those it must give."""
    kind, ids, expected = torch.load(folder / "expected.pt")
    for auto in AUTO.get(kind, (AutoModelForCausalLM,)):
        try:
            model = auto.from_pretrained(folder, trust_remote_code=True).eval()
            break
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
    with torch.inference_mode():
        got = model(input_ids=ids, use_cache=False).logits.float()
    return float((got - expected).abs().max() / expected.abs().max())


def main() -> None:
    """Check the folders, one after the other."""
    folder, answers, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        found: float | str
        try:
            found = distance(Path(folder) / name)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:600]
        with Path(answers).open("a") as file:
            file.write(json.dumps([name, found]) + "\n")


if __name__ == "__main__":
    main()
