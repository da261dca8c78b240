"""Speed of models in tokens per second, as rounds have found it: each figure with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ghosted_fast.errors import ArgumentError
from ghosted_fast.facts import notebook_table
from ghosted_fast.timing.conditions import Conditions
from ghosted_fast.timing.estimates import Estimate, ratio_text, speed_text
from ghosted_fast.timing.rounds import PRECISION, Rounds

Phase = Literal["prefill", "decode"]
# Why a measurement ended.
Ended = Literal["precise", "time", "interrupted"]
# Until which time a comparison goes on, in seconds.
SECONDS = 60.0


@dataclass(frozen=True)
class SpeedSettings:
    """What is measured, and how precisely.

    Attributes:
        prompt_length: Tokens of each prompt.
        new_tokens: Tokens decoded after it.
        batch_size: Prompts at a time.
        precision: Half of the interval of a ratio to the first model, as a share, at which a
            measurement ends.
        seconds: When it ends at the latest.

    Raises:
        ArgumentError: A number is too small.
    """

    prompt_length: int = 512
    new_tokens: int = 64
    batch_size: int = 1
    precision: float = PRECISION
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        # Two samples, one for each half of a pair of rounds, share a cache.
        for name, least in (("prompt_length", 1), ("new_tokens", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"expected {name} >= {least}, got {getattr(self, name)}")
        for name in ("precision", "seconds"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"expected {name} above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Throughput:
    """Speed of one model, measured in rounds beside others.

    Attributes:
        prefill_tokens_per_s: Prompt tokens of the whole batch per second of the first call.
        decode_tokens_per_s: New tokens of the whole batch per second, with a dynamic cache.
        first_token_ms: Time to the first token.
        token_ms: Time of a decoding step in milliseconds: its 50th, 95th and 99th percentile under
            "p50", "p95" and "p99"; None where the engine does not tell.
        relative: How many times as fast as each of the other models it is, by name and phase; made
            of ratios within a pair of rounds.
        weight_bytes: Bytes of its weights, shared ones once; None where they are not known.
        cache_bytes: Bytes of its cache after the last token; likewise.
        joules_per_token: Energy of the processor's packages or of the device, for each new token of
            the batch; None where the machine does not tell.
        settings: What was measured, and how precisely.
        ended: Whether the intervals are as narrow as asked, or the time was spent before.
        conditions: What else the machine did meanwhile.
    """

    prefill_tokens_per_s: Estimate
    decode_tokens_per_s: Estimate
    first_token_ms: Estimate
    token_ms: dict[str, float] | None
    relative: dict[str, dict[str, Estimate]]
    weight_bytes: int | None
    cache_bytes: int | None
    joules_per_token: float | None
    settings: SpeedSettings
    ended: Ended
    conditions: Conditions | None

    def _repr_html_(self) -> str:
        rows = [
            ("prefill", f"{speed_text(self.prefill_tokens_per_s)} tokens/s"),
            ("decode", f"{speed_text(self.decode_tokens_per_s)} tokens/s"),
            ("first token", f"{speed_text(self.first_token_ms)} ms"),
        ]
        for name, ratios in self.relative.items():
            rows += [(f"{phase} to {name}", ratio_text(ratio)) for phase, ratio in ratios.items()]
        return notebook_table("Speed", rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Throughput:
        """Return what `to_dict` made a record of."""
        figures = ("prefill_tokens_per_s", "decode_tokens_per_s", "first_token_ms")
        relative = {
            name: {phase: Estimate(**ratio) for phase, ratio in phases.items()}
            for name, phases in record["relative"].items()
        }
        conditions = record["conditions"]
        return cls(
            **{
                **record,
                **{name: Estimate(**record[name]) for name in figures},
                "relative": relative,
                "settings": SpeedSettings(**record["settings"]),
                "conditions": None if conditions is None else Conditions(**conditions),
            }
        )


@dataclass
class ModelFacts:
    """What is known of a measured model besides its samples; see `Throughput`.

    Attributes:
        step_seconds: Seconds of single decoding steps.
        weight_bytes: Bytes of weights.
        cache_bytes: Bytes of the full cache.
        joules: Energy of the decoding steps that count.
        joule_tokens: New tokens that it was measured for.
    """

    step_seconds: list[float] = field(default_factory=list)
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    joules: float | None = None
    joule_tokens: int = 0


def throughputs_of(
    prefill: Rounds,
    decode: Rounds,
    settings: SpeedSettings,
    ended: Ended,
    conditions: Conditions | None = None,
    facts: Mapping[str, ModelFacts] | None = None,
) -> dict[str, Throughput]:
    """Return the speed of each model.

    Args:
        prefill: Seconds of prefills.
        decode: Seconds of decoding steps, each for one token of every prompt.
        settings: What was measured.
        ended: Why it ended.
        conditions: What else the machine did.
        facts: What else is known of the models.
    """
    found = {}
    tokens = settings.batch_size * settings.prompt_length
    for name in prefill.names:
        known = (facts or {}).get(name, ModelFacts())
        first = prefill.seconds(name)
        found[name] = Throughput(
            prefill_tokens_per_s=first.inverse.times(tokens),
            decode_tokens_per_s=decode.seconds(name).inverse.times(settings.batch_size),
            first_token_ms=first.times(1e3),
            token_ms=_percentiles(known.step_seconds),
            relative={
                other: {
                    "prefill": prefill.speedup(name, other),
                    "decode": decode.speedup(name, other),
                }
                for other in prefill.names
                if other != name
            },
            weight_bytes=known.weight_bytes,
            cache_bytes=known.cache_bytes,
            joules_per_token=None
            if known.joules is None or not known.joule_tokens
            else known.joules / known.joule_tokens,
            settings=settings,
            ended=ended,
            conditions=conditions,
        )
    return found


def run_both_phases(
    names: Sequence[str],
    sample: Callable[[str], tuple[float, float]],
    settings: SpeedSettings,
    clock: Callable[[], float],
) -> tuple[Rounds, Rounds, Ended]:
    """Run rounds of an engine that always reads a prompt before it writes.

    Args:
        names: The models.
        sample: Runs a model, and returns the seconds of the prefill and of one decoding step.
        settings: How precisely, and until when.
        clock: What `settings.seconds` is measured by.

    Returns:
        The rounds of both phases, and why they ended.
    """
    prefill, decode = (Rounds(names, settings.precision) for _ in range(2))
    began = clock()
    while True:
        steps: dict[str, list[float]] = {name: [] for name in names}

        def first(name: str) -> float:
            seconds, step = sample(name)
            steps[name].append(step)  # noqa: B023
            return seconds

        try:
            prefill.run_pair(first)
        except KeyboardInterrupt:
            if not prefill.pairs:
                raise
            return prefill, decode, "interrupted"
        decode.run_pair(lambda name: steps[name].pop(0))  # noqa: B023
        if prefill.is_settled and decode.is_settled:
            return prefill, decode, "precise"
        if clock() - began >= settings.seconds:
            return prefill, decode, "time"


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = np.quantile(np.asarray(seconds) * 1e3, (0.5, 0.95, 0.99))
    return dict(zip(("p50", "p95", "p99"), map(float, values), strict=True))
