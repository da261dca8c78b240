"""What healing brings for how many tokens: from a ghost, from corrected ghosts, from nothing.

SmolLM2-135M-Instruct in bf16 loses 5 of its 30 layers, those that the default chooses. Each point
of a curve is a healing of its own, whose learning rate falls to nothing at its end: no point
is a look at a longer run. Models are judged on three kinds of text that none of it saw: passages of
Wikipedia, stories and the manual of Python; by perplexity, which says how well a model predicts the
text, and by the divergence of its predictions from the dense model's, which says how much of that
model is there. Each point also has the time it took, in passes of the dense model over as many
tokens. Rivals get the same text: LoRA without a
teacher, at the better of two learning rates, and the matrix of LinearPatch, distilled. The dense
model gets the LoRA too. Points that are in the file already are not made again.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _lora import train_on_text

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.assets.downloads import fetch_demo_assets, fetch_stories
from ghosted_fast.improve.exits import Exit, exit_divergence
from ghosted_fast.improve.healing import heal
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.measure.system import machine_facts, peak_memory, reset_peak_memory
from ghosted_fast.models.loading import load_model
from ghosted_fast.models.structure import share_copy
from ghosted_fast.options import HealOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.loading import load_texts, token_batches

CALIBRATION_TOKENS, EVALUATION_TOKENS, LENGTH = 49152, 5120, 512
HELD_OUT_TOKENS = 4096
REMOVED = [14, 15, 16, 17, 18]
FROM_GHOST, FROM_CORRECTED, FROM_NOTHING = "a ghost", "corrected ghosts", "nothing"
FROM_LINEARPATCH = "linearpatch-d"
# Whose own loss on such text falls by training on it, too.
FROM_DENSE = "the dense model"
HEALED, TEXT_ALONE = "healed", "LoRA on the text, rate "
# Of LoRA on the text; healing has the first.
RATES = (1e-3, 2e-4)


def _texts(tokenizer: Any) -> dict[str, list[torch.Tensor]]:
    """Return the texts that models are judged on."""
    read = {
        "Wikipedia": load_texts(str(fetch_demo_assets().evaluation)),
        "stories": load_texts(str(fetch_stories())),
        "manual of Python": pydoc_data.topics.topics.values(),
    }
    return {
        name: token_batches(tokenizer, texts, EVALUATION_TOKENS, LENGTH)
        for name, texts in read.items()
    }


class Study:
    """The models that healings start from, and the file of what they became.

    Args:
        path: The file.
        dense: The dense model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, path: Path, dense: Any, tokenizer: Any) -> None:
        self._path, self._dense, self._tokenizer = path, dense, tokenizer
        self._texts = _texts(tokenizer)
        self.found: dict[str, Any] = {"points": []}
        if path.exists():
            self.found = json.loads(path.read_text(encoding="utf-8"))
        self._starts: dict[str, Any] = {}
        # Behind the dense model's last layer, by text.
        self._expected: dict[str, list[torch.Tensor]] = {}

    def begin(self) -> None:
        """Judge the dense model, unless that is done."""
        if "dense" in self.found:
            return
        self.found["machine"] = machine_facts()
        self.found["dense"] = self._perplexities(self._dense)
        self.found["removed"] = REMOVED
        self._write()

    def point(self, start: str, tokens: int, trained: str = HEALED) -> None:
        """Train a model on so many tokens, unless that is done; 0 judges it as it starts."""
        about = {"start": start, "tokens": tokens, "trained": trained}
        if any(about.items() <= item.items() for item in self.found["points"]):
            return
        smaller, seconds = self._start(start)
        record: dict[str, Any] = {**about, "start_seconds": seconds}
        if machine_facts()["processor"] != self.found["machine"]["processor"]:
            record["processor"] = machine_facts()["processor"]
        if tokens:
            smaller = share_copy(smaller)
            reset_peak_memory(torch.device("cpu"))
            batches, began = self._learned(tokens), time.perf_counter()
            if trained == HEALED:
                rank = 0 if start == FROM_LINEARPATCH else HealOptions.rank
                options = HealOptions(tokens=tokens, rank=rank, held_out_tokens=HELD_OUT_TOKENS)
                learned = heal(smaller, self._dense, batches, options, progress=True).tokens
            else:
                rate = float(trained.removeprefix(TEXT_ALONE))
                learned = train_on_text(smaller, batches, tokens, HealOptions.rank, rate)
            spent = time.perf_counter() - began
            record |= {
                "seconds": spent,
                "passes": spent / (self._seconds_of_a_pass(batches[0]) * learned),
                "peak_memory": peak_memory(torch.device("cpu")),
                "learned": learned,
            }
        judged = {
            "perplexity": self._perplexities(smaller),
            "divergence": self._divergences(smaller),
        }
        self.found["points"].append(record | judged)
        self._write()

    def _start(self, name: str) -> tuple[Any, float]:
        """Return what a healing starts from, and the seconds that it took."""
        if name not in self._starts:
            began = time.perf_counter()
            make: dict[str, Callable[[], Any]] = {
                FROM_NOTHING: lambda: prune_model(self._dense, REMOVED),
                FROM_GHOST: lambda: self._ghosted(0),
                FROM_CORRECTED: lambda: self._ghosted("auto"),
                FROM_DENSE: lambda: self._dense,
                FROM_LINEARPATCH: lambda: self._ghosted(0, FROM_LINEARPATCH),
            }
            self._starts[name] = (make[name](), time.perf_counter() - began)
        model, seconds = self._starts[name]
        return model, seconds

    def _ghosted(self, corrections: Any, recovery: str = "ghost") -> Any:
        run = RunOptions(corrections=corrections, progress=True)
        return ghost_model(
            self._dense, self._calibration(), removed=REMOVED, recovery=recovery, run=run
        )[0]

    def _calibration(self) -> list[torch.Tensor]:
        texts = load_texts(fetch_demo_assets().calibration)
        return token_batches(self._tokenizer, texts, CALIBRATION_TOKENS, LENGTH)

    def _learned(self, tokens: int) -> list[torch.Tensor]:
        texts = load_texts(fetch_demo_assets().calibration)
        wanted = tokens + HELD_OUT_TOKENS + 8 * LENGTH
        return token_batches(self._tokenizer, texts, wanted, LENGTH)

    def _seconds_of_a_pass(self, batch: torch.Tensor) -> float:
        """Return the dense model's seconds per token, the median of five passes."""
        seconds = []
        with torch.inference_mode():
            for _ in range(6):
                began = time.perf_counter()
                self._dense(batch[:2], use_cache=False)
                seconds.append((time.perf_counter() - began) / batch[:2].numel())
        return sorted(seconds[1:])[2]

    def _perplexities(self, model: Any) -> dict[str, float]:
        return {name: perplexity(model, batches).value for name, batches in self._texts.items()}

    @torch.inference_mode()
    def _divergences(self, model: Any) -> dict[str, float]:
        """Return KL(dense || model) per token of each text, nats."""
        dense, smaller = Exit(self._dense), Exit(model)
        found = {}
        for name, tokens in self._texts.items():
            batches = list(iterate_batches(tokens))
            if name not in self._expected:
                self._expected[name] = [dense.states(batch) for batch in batches]
            sums = [
                exit_divergence(
                    dense, smaller, theirs, smaller.states(batch), batch.attention_mask.bool()
                )
                for batch, theirs in zip(batches, self._expected[name], strict=True)
            ]
            found[name] = sum(sums) / sum(batch.num_tokens for batch in batches)
        return found

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self.found, indent=1) + "\n")


def main() -> None:
    """Make the points that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("healing.json"))
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[12288, 24576, 49152, 98304],
        help="tokens of the points",
    )  # fmt: skip
    parser.add_argument("--rival-tokens", type=int, default=24576, help="tokens that rivals get")
    arguments = parser.parse_args()
    dense, tokenizer = load_model(fetch_demo_assets().model, dtype="bfloat16")
    study = Study(arguments.output, dense, tokenizer)
    study.begin()
    counts = (0, *arguments.tokens)
    for start in (FROM_GHOST, FROM_NOTHING):
        for tokens in counts:
            study.point(start, tokens)
    for tokens in (0, arguments.rival_tokens):
        study.point(FROM_LINEARPATCH, tokens)
    for start in (FROM_NOTHING, FROM_GHOST, FROM_DENSE):
        for rate in RATES:
            study.point(start, arguments.rival_tokens, f"{TEXT_ALONE}{rate:g}")
    for tokens in counts:
        study.point(FROM_CORRECTED, tokens)


if __name__ == "__main__":
    main()
