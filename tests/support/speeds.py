"""Speeds as they could have been measured."""

from __future__ import annotations

from ghosted_fast.measure.throughput import SpeedSettings, Throughput
from ghosted_fast.timing.conditions import Conditions
from ghosted_fast.timing.estimates import Estimate


def around(value: float, share: float = 0.01) -> Estimate:
    """An estimate with an interval of so much to either side."""
    return Estimate(value, value * (1 - share), value * (1 + share), 20)


def speed_of(decode: float, **others: float) -> Throughput:
    """A model that decodes so fast, measured beside others, given by their own speeds."""
    relative = {
        name: {"prefill": around(decode / other), "decode": around(decode / other)}
        for name, other in others.items()
    }
    return Throughput(
        prefill_tokens_per_s=around(10 * decode),
        decode_tokens_per_s=around(decode),
        first_token_ms=around(1e3 * 64 / decode),
        token_ms={"p50": 1e3 / decode, "p95": 1.1e3 / decode, "p99": 1.2e3 / decode},
        relative=relative,
        weight_bytes=269 << 20,
        cache_bytes=12 << 20,
        joules_per_token=None,
        settings=SpeedSettings(64, 32),
        ended="precise",
        conditions=Conditions(20.0, 0.0, 0.3, None, None, None),
    )
