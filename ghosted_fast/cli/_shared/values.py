"""The choices that options have, and values that are more than a word or a number.

Each `parse_*` is the `parser=` of an option: typer names the option in the error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, InvalidOperation, Overflow
from pathlib import Path
from typing import Any, Literal, get_args

import typer

from ghosted_fast.errors import ArgumentError
from ghosted_fast.text.shares import checked_shares

Criterion = Literal[
    "ghost",
    "ghost-search",
    "streamline",
    "shortgpt",
    "sleb",
    "taylor",
    "angular",
    "lorp",
    "prunecomp",
]
Recovery = Literal[
    "ghost",
    "none",
    "linearpatch-d",
    "linearpatch-r",
    "replaceme",
    "replaceme-cosine",
    "prunecomp",
    "nbl",
    "ghost-paper",
]
Features = Literal["normed", "raw", "auto"]
FirstState = Literal["auto", "on", "off"]
TokenWeight = Literal["inverse_energy", "capped", "uniform"]
Quantized = Literal["int8", "nf4"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
# More is a slip of the hand: no text and no model is as large.
MOST, MOST_SEED = 10**12, 2**63 - 1
_MOST_LAYERS, _MOST_CORRECTIONS = 10**6, 10**6
_SHARED = re.compile(r"(.+):([0-9]*\.?[0-9]+%?)")
_TOKEN_UNITS = {"k": 10**3, "K": 10**3, "m": 10**6, "M": 10**6}


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layers that a text such as '14-18' or '3,7,8' names.

    Raises:
        typer.BadParameter: It names none, or one twice, or is no such text.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_count(first, _MOST_LAYERS) or (dash and not _is_count(last, _MOST_LAYERS)):
            raise typer.BadParameter(f"expected layers such as '14-18' or '3,7,8', got {text!r}")
        if dash and int(last) < int(first):
            raise typer.BadParameter(
                f"expected each range upwards, got {part.strip()!r}: write '{last}-{first}'"
            )
        layers += range(int(first), int(last if dash else first) + 1)
    if twice := [layer for layer in layers if layers.count(layer) > 1]:
        raise typer.BadParameter(f"expected every layer once, got {twice[0]} twice in {text!r}")
    return tuple(sorted(layers))


def parse_counts(text: str) -> tuple[int, ...]:
    """Return the numbers that a text such as '3,5,7' names.

    Raises:
        typer.BadParameter: One is not above 0, or it is no such text.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(_is_count(part, _MOST_LAYERS) and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"expected numbers above 0 such as '3,5,7', got {text!r}")
    return tuple(int(part) for part in parts)


def parse_token_count(text: str) -> int:
    """Return the number of tokens that a text such as '100k', '1M' or '1_000_000' names.

    Raises:
        typer.BadParameter: It names no whole number above 0.
    """
    text = str(text)  # typer hands the default over as it is
    number = text.strip()
    factor = _TOKEN_UNITS.get(number[-1:], 1)
    if factor > 1:
        number = number[:-1]
    try:
        count = Decimal(number if number.isascii() else "") * factor
    except (InvalidOperation, Overflow):
        count = Decimal(0)
    if not count.is_finite() or not 1 <= count <= MOST or count != count.to_integral_value():
        raise typer.BadParameter(
            f"expected a number of tokens such as '100k', '1M' or '1_000_000', got {text!r}"
        )
    return int(count)


def parse_rank(text: str) -> Any:
    """Return the rank that a text such as '32' or 'full' names, see `HealOptions`.

    Raises:
        typer.BadParameter: It is neither a whole number nor 'full'.
    """
    text = str(text).strip()  # typer hands the default over as it is
    if text == "full":
        return text
    if not (text.isascii() and text.isdigit()):
        raise typer.BadParameter(f"expected a whole number of 0 or more, or 'full', got {text!r}")
    return int(text)


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as '7GB', '500 MB' or '16GiB' names.

    Raises:
        typer.BadParameter: It names none above 0.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)(i?)b?", text.strip(), re.IGNORECASE)
    try:
        number = Decimal(match[1]) if match else Decimal(0)
    except InvalidOperation:
        number = Decimal(0)
    power = " kmgt".index(match[2].lower() or " ") if match else 0
    count = int(number * (1024 if match and match[3] else 1000) ** power)
    if count < 1:
        raise typer.BadParameter(f"expected a size such as '7GB' or '500MB', got {text!r}")
    return count


def parse_damping(text: str) -> float | Literal["auto"]:
    """Return the damping as a number, or "auto".

    Raises:
        typer.BadParameter: It is neither.
    """
    if text == "auto":
        return "auto"
    try:
        damping = float(text if text.isascii() else "")
    except ValueError:
        damping = -1.0
    if not 0 <= damping < float("inf"):
        raise typer.BadParameter(f"expected 'auto' or a number >= 0, got {text!r}")
    return damping


def parse_corrections(text: str) -> int | Literal["auto"]:
    """Return the number of corrections, or "auto".

    Raises:
        typer.BadParameter: It is neither.
    """
    if text == "auto":
        return "auto"
    if not _is_count(text, _MOST_CORRECTIONS):
        raise typer.BadParameter(f"expected 'auto' or a number >= 0, got {text!r}")
    return int(text)


def parse_increase(text: str) -> float:
    """Return the share that a text such as '10%' or '0.1' names.

    Raises:
        typer.BadParameter: It names none above 0.
    """
    number = text.strip().removesuffix("%")
    share = _number_above(0.0, number, text, "a share above 0 such as '10%'")
    return share / 100.0 if text.strip().endswith("%") else share


def parse_temperatures(text: str) -> tuple[float, ...]:
    """Return the temperatures that a text such as '0.7,1,1.3' names.

    Raises:
        typer.BadParameter: One is not above 0, or it is no such text.
    """
    expected = "temperatures above 0 such as '0.7,1,1.3'"
    return tuple(_number_above(0.0, part.strip(), text, expected) for part in text.split(","))


def parse_precision(text: str) -> float:
    """Return the share that a text such as '2%' or '0.02' names.

    Raises:
        typer.BadParameter: It names none between 0 and 1.
    """
    text = str(text)  # typer hands the default over as it is
    number = text.strip().removesuffix("%")
    expected = "a share between 0 and 1 such as '2%'"
    share = _number_above(0.0, number, text, expected)
    share = share / 100.0 if text.strip().endswith("%") else share
    if share >= 1.0:
        raise typer.BadParameter(f"expected {expected}, got {text!r}")
    return share


def parse_speedup(text: str) -> float:
    """Return the factor that a text such as '1.3' or '1.3x' names.

    Raises:
        typer.BadParameter: It names none above 1.
    """
    number = text.strip().removesuffix("x")
    return _number_above(1.0, number, text, "a factor above 1 such as '1.3'")


def parse_written_text(text: str) -> str:
    """Return the name of a text to measure on.

    Raises:
        typer.BadParameter: It is the model's own.
    """
    if text == "self":
        raise typer.BadParameter(
            "expected a text to measure on, got 'self': what the model itself writes can only be "
            "calibrated on (--calibration self)"
        )
    return text


def parse_mixture(texts: Sequence[str]) -> dict[str, float]:
    """Return the texts that such as 'web.jsonl:70%' and 'self:0.3' name, and their shares.

    Where none has a share, all have the same. What may be a configuration of a hub data set is part
    of its name.

    Raises:
        typer.BadParameter: A text is there twice, or some have shares and some none, or they do not
            add up.
    """
    shares: dict[str, float | None] = {}
    for text in texts:
        name, share = _shared(text)
        if name in shares:
            raise _mixture_error(f"expected different texts, got {name!r} twice")
        shares[name] = share
    known = {name: share for name, share in shares.items() if share is not None}
    if not known:
        return dict.fromkeys(shares, 1 / len(shares))
    if missing := [name for name in shares if name not in known]:
        raise _mixture_error(
            f"expected a share of each text or of none, such as '{missing[0]}:30%', got none of "
            f"{missing[0]!r}"
        )
    try:
        return checked_shares(known)
    except ArgumentError as error:
        raise _mixture_error(str(error)) from error


def _shared(text: str) -> tuple[str, float | None]:
    """Return the name of a text and its share, None where it has none."""
    match = _SHARED.fullmatch(text)
    if match is None:
        return text, None
    name, number = match[1], match[2]
    share = float(number.rstrip("%")) / (100.0 if number.endswith("%") else 1.0)
    if number.endswith("%") or share < 1.0:
        return name, share
    if name == "self" or Path(name).exists():
        raise _mixture_error(f"expected a share such as '70%' or '0.7' of {name!r}, got {number!r}")
    return text, None


def _mixture_error(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="'--calibration'")


def parse_tasks(text: str) -> tuple[str, ...]:
    """Return the names of tasks between commas.

    Raises:
        typer.BadParameter: There is none.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise typer.BadParameter(f"expected names with commas between, got {text!r}")
    return names


def completing(words: Iterable[str]) -> Callable[[], list[str]]:
    """Return what tells a shell the values of an option whose type does not list them."""
    known = list(words)
    return lambda: known


def complete_tasks(incomplete: str) -> list[str]:
    """Return how names between commas may go on: the tasks that need no hub."""
    from ghosted_fast.assets.questions import PREFIX, SETS

    before, comma, _ = incomplete.rpartition(",")
    given = before.split(",")
    return [f"{before}{comma}{PREFIX}{name}" for name in SETS if PREFIX + name not in given]


def words_option(option: str, words: Any, help_text: str, metavar: str = "NAME") -> Any:
    """Return an option that can be repeated and takes the words of a `Literal`.

    A shell is told them too, which a `Literal` in a list does not do.
    """
    return typer.Option(
        option,
        parser=one_of(words),
        autocompletion=completing(get_args(words)),
        metavar=metavar,
        help=help_text,
    )


def one_of(choices: Any) -> Callable[[str], str]:
    """Return what parses one of the words of a `Literal`, for options that can be repeated."""
    known = get_args(choices)

    def parse(text: str) -> str:
        if text not in known:
            raise typer.BadParameter(f"expected one of {', '.join(known)}, got {text!r}")
        return text

    return parse


def _is_count(text: str, most: int) -> bool:
    """Return whether a text is a whole number in digits that are ours, and no larger than that."""
    return text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= most


def _number_above(least: float, number: str, text: str, expected: str) -> float:
    try:
        value = float(number if number.isascii() else "")
    except ValueError:
        value = least
    if not least < value < float("inf"):
        raise typer.BadParameter(f"expected {expected}, got {text!r}")
    return value
