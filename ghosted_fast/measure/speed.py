"""Speed of transformers models: prefill and decoding, in rounds that models take part in by turns.

Decoding is a plain greedy loop, one token at a time, so the figures hold the cost of the model and
of its cache and nothing else. A round of decoding is a few steps of each model, so that all meet
the same moment of the machine; the first step of a sample is not timed where there are several,
since it fetches what the model before displaced.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError
from ghosted_fast.measure.throughput import (
    SECONDS,
    Ended,
    ModelFacts,
    SpeedSettings,
    Throughput,
    throughputs_of,
)
from ghosted_fast.models.decoder import evaluating
from ghosted_fast.text.progress import progress_bar
from ghosted_fast.timing.conditions import Watch
from ghosted_fast.timing.energy import joules
from ghosted_fast.timing.rounds import PRECISION, Rounds
from ghosted_fast.timing.stopwatch import Stopwatch, calls_per_sample

# A sample of decoding lasts about so long, in seconds, if there are tokens enough.
_DECODE_SAMPLE = 0.1
# From so many steps on the first of a sample is not timed.
_STEPS_TO_WARM = 4
_BAR_STEPS = 1000


def throughput(
    model: Any,
    prompt_length: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    precision: float = PRECISION,
    seconds: float = SECONDS,
) -> Throughput:
    """Measure one model's prefill and decoding speed. To compare models: `compare_throughput`.

    Args:
        model: A causal language model.
        prompt_length: As in `compare_throughput`, as the others.
        new_tokens: Likewise.
        batch_size: Likewise.
        precision: Likewise, of the model's own speed.
        seconds: Likewise.

    Raises:
        ArgumentError: As there.
    """
    return compare_throughput(
        {"model": model}, prompt_length, new_tokens, batch_size, precision, seconds
    )["model"]


@torch.inference_mode()
def compare_throughput(
    models: Mapping[str, Any],
    prompt_length: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    precision: float = PRECISION,
    seconds: float = SECONDS,
    *,
    seed: int = 0,
    progress: bool = False,
    interruptible: bool = True,
) -> dict[str, Throughput]:
    """Measure several models by turns, until it is known how fast they are relative to the first.

    All models' caches are in memory at the same time.

    Args:
        models: The models by name; the others are compared with the first.
        prompt_length: Tokens of each prompt.
        new_tokens: Tokens to decode after it, 2 at least.
        batch_size: Prompts at a time.
        precision: Half of the interval of a ratio, as a share, at which it is known.
        seconds: When to stop at the latest, once every model has been measured twice.
        seed: Of the order of models, and of the prompts.
        progress: Show a progress bar on stderr.
        interruptible: Whether Ctrl-C ends the measurement alone, and what is known by then is
            returned; else it is raised, for work that goes on with the figures.

    Returns:
        The speed of each model, by name.

    Raises:
        ArgumentError: A number is too small, or the positions of a model do not suffice.
    """
    settings = SpeedSettings(prompt_length, new_tokens, batch_size, precision, seconds)
    _check(models, settings)
    with ExitStack() as stack:
        runs = {}
        for name, model in models.items():
            stack.enter_context(evaluating(model))
            runs[name] = Run(model, settings, seed)
        bar = stack.enter_context(progress_bar("speed", progress, of=_BAR_STEPS, share=True))
        watch, began = Watch(), time.perf_counter()
        prefill, decode, ended = _rounds(runs, settings, seed, bar, began, interruptible)
        facts = {name: run.facts for name, run in runs.items()}
        return throughputs_of(prefill, decode, settings, ended, watch.conditions(), facts)


def _check(models: Mapping[str, Any], settings: SpeedSettings) -> None:
    if not models:
        raise ArgumentError("expected a model to measure, got none")
    needed = f"{settings.prompt_length} + {settings.new_tokens}"
    for name, model in models.items():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and settings.prompt_length + settings.new_tokens > limit:
            raise ArgumentError(
                f"expected prompt_length + new_tokens <= {limit}, the positions of {name}, "
                f"got {needed}"
            )


def _rounds(
    runs: Mapping[str, Run],
    settings: SpeedSettings,
    seed: int,
    bar: Any,
    began: float,
    interruptible: bool,
) -> tuple[Rounds, Rounds, Ended]:
    """Run pairs of rounds of both phases until both are known, or the time is spent.

    Each phase gets half of the time, as long as it is not known.
    """
    prefill = Rounds(list(runs), settings.precision, seed)
    decode = Rounds(list(runs), settings.precision, seed + 1)
    step = max(min(run.warm_up() for run in runs.values()), 1e-9)
    samples, steps = _samples_of_a_cache(step, settings.new_tokens)

    def pairs() -> Iterator[None]:
        reading = writing = 0.0
        while True:
            if prefill.is_settled:
                for run in runs.values():
                    run.prefill()
            more = not prefill.is_settled
            while more:
                reading += _seconds_of_pair(prefill, lambda name: runs[name].prefill())
                yield
                more = reading < writing and not prefill.is_settled
            for _ in range(samples // 2):
                if not decode.is_settled:
                    writing += _seconds_of_pair(decode, lambda name: runs[name].decode(steps))
                    yield

    try:
        for _ in pairs():
            spent = (time.perf_counter() - began) / settings.seconds
            done = min(prefill.share_done, decode.share_done) if decode.pairs else 0.0
            bar.update(int(_BAR_STEPS * min(max(spent, done), 1.0)) - bar.n)
            if prefill.is_settled and decode.is_settled:
                return prefill, decode, "precise"
            if spent >= 1.0 and decode.pairs:
                return prefill, decode, "time"
    except KeyboardInterrupt:
        if not (interruptible and decode.pairs):
            raise
        return prefill, decode, "interrupted"
    raise AssertionError("pairs do not end")


def _seconds_of_pair(rounds: Rounds, sample: Callable[[str], float]) -> float:
    """Run a pair of rounds, and return how long it took with all that is not timed."""
    began = time.perf_counter()
    rounds.run_pair(sample)
    return time.perf_counter() - began


def _samples_of_a_cache(step: float, new_tokens: int) -> tuple[int, int]:
    """Return how many samples share a cache, an even number, and the steps of each."""
    wanted = 1 + math.ceil(_DECODE_SAMPLE / step)
    samples = max(2, new_tokens // wanted // 2 * 2)
    return samples, new_tokens // samples


class Run:
    """One model with its prompt and its cache.

    Args:
        model: In eval mode.
        settings: What is measured.
        seed: Of the prompt.
    """

    def __init__(self, model: Any, settings: SpeedSettings, seed: int = 0) -> None:
        vocabulary = model.config.get_text_config().vocab_size
        shape = (settings.batch_size, settings.prompt_length)
        generator = torch.Generator().manual_seed(seed)
        self._model, self._settings = model, settings
        self._prompt = torch.randint(vocabulary, shape, generator=generator).to(model.device)
        # As `generate` does: the head is applied to the last position alone.
        known = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._calls = 1
        self._token: Tensor
        self._cache: Any = None
        self.facts = ModelFacts(weight_bytes=_bytes_in([*model.parameters(), *model.buffers()]))

    def warm_up(self) -> float:
        """Run both phases once untimed, then again; return the seconds of a decoding step."""
        self.prefill()
        self._calls = calls_per_sample(self.prefill())
        step = min(self._steps(1)[0] for _ in range(2))
        self.facts.step_seconds.clear()
        return step

    def prefill(self) -> float:
        """Read the prompt into a new cache, and return the seconds it took."""
        stopwatch = Stopwatch(self._prompt.device)
        self._cache = None  # never two of them
        stopwatch.mark()
        for _ in range(self._calls):
            output = self._model(input_ids=self._prompt, use_cache=True, **self._options)
            self._token = output.logits[:, -1:].argmax(-1)
        stopwatch.mark()
        self._cache = output.past_key_values
        return stopwatch.seconds()[0] / self._calls

    def decode(self, steps: int) -> float:
        """Write some tokens after what is in the cache; return the seconds of a step."""
        before = joules(self._prompt.device)
        seconds = self._steps(steps)
        after = joules(self._prompt.device)
        if before is not None and after is not None and after >= before:
            self.facts.joules = (self.facts.joules or 0.0) + after - before
            self.facts.joule_tokens += steps * self._settings.batch_size
        timed = seconds[1:] if steps >= _STEPS_TO_WARM else seconds
        self.facts.step_seconds += timed
        size = _bytes_in(_tensors_of(self._cache))
        self.facts.cache_bytes = max(self.facts.cache_bytes or 0, size)
        return sum(timed) / len(timed)

    def _steps(self, steps: int) -> list[float]:
        stopwatch = Stopwatch(self._prompt.device)
        stopwatch.mark()
        for _ in range(steps):
            output = self._model(input_ids=self._token, past_key_values=self._cache, use_cache=True)
            self._cache = output.past_key_values
            self._token = output.logits[:, -1:].argmax(-1)
            stopwatch.mark()
        return stopwatch.seconds()


def _bytes_in(tensors: list[Tensor]) -> int:
    """Return the bytes of tensors, those of a shared storage once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), str(tensor.device)] = storage.nbytes()
    return sum(storages.values())


def _tensors_of(cache: Any) -> list[Tensor]:
    """Return all tensors in a cache, whatever it is made of."""
    found: list[Tensor] = []
    seen: set[int] = set()
    open_: list[Any] = [cache]
    while open_:
        item = open_.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict):
            open_ += item.values()
        elif isinstance(item, list | tuple):
            open_ += item
        elif type(item).__module__.startswith("transformers") and hasattr(item, "__dict__"):
            open_ += vars(item).values()
    return found
