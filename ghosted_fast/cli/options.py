"""Options that several verbs take: one name, one type and one help text for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ghosted_fast.cli.verb import usage_error

Criterion = Literal["ghost", "ghost-search", "streamline", "shortgpt", "sleb", "taylor", "angular"]
Recovery = Literal["ghost", "none", "linearpatch-d", "linearpatch-r", "replaceme", "ghost-paper"]
GhostInput = Literal["normed", "hidden"]
FirstState = Literal["auto", "on", "off"]
TokenWeight = Literal["inverse_energy", "capped", "uniform"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]

_TEXT = "a .jsonl or .parquet file, any other text file, or a hub data set"

ModelOption = Annotated[
    str, typer.Option("--model", help="The model: a hub id, a local folder or a .gguf file.")
]
ModelsOption = Annotated[
    list[str],
    typer.Option(
        "--model",
        help="A model: a hub id, a local folder or a .gguf file. Repeat it; the first is dense.",
    ),
]
CalibrationOption = Annotated[
    str,
    typer.Option(
        "--calibration",
        help=f"Text to calibrate on: {_TEXT}; or 'self', text that the model itself generates.",
    ),
]
OptionalTextOption = Annotated[
    str | None, typer.Option("--evaluation", help=f"Text to measure perplexity on: {_TEXT}.")
]
TasksOption = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="Tasks to measure accuracy on, with commas between: local/socialiqa, local/quartz, "
        "local/parables, local/logiqa, local/knowledge, or lm-eval's own, which need the hub.",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Samples of each task; all if not given.")
]
OptionalEvaluationOption = Annotated[
    str | None,
    typer.Option(
        "--evaluation",
        help=f"Also measure the perplexity of dense, pruned and ghosted model on this: {_TEXT}.",
    ),
]
FieldOption = Annotated[
    str | None,
    typer.Option(
        "--field",
        help="Field that holds the text; if not given: text, else 0, else the only one.",
    ),
]
SplitOption = Annotated[
    str | None, typer.Option("--split", help="Split of a hub data set; train if not given.")
]
NumLayersOption = Annotated[
    int | None,
    typer.Option("--num-layers", min=1, help="How many layers to remove; --criterion picks them."),
]
MaxPerplexityIncreaseOption = Annotated[
    str | None,
    typer.Option(
        "--max-perplexity-increase",
        help="Remove as many layers as held-out text allows within this, such as '10%'.",
    ),
]
MinSpeedupOption = Annotated[
    str | None,
    typer.Option(
        "--min-speedup", help="Remove as few layers as make decoding this fast, such as '1.3'."
    ),
]
BeamOption = Annotated[
    int, typer.Option("--beam", min=1, help="Sets of layers that ghost-search compares.")
]
SequentialOption = Annotated[
    bool,
    typer.Option(
        "--sequential/--independent",
        help="Fit the ghosts of several gaps on what the ones below them give, or by themselves.",
    ),
]
RequiredNumLayersOption = Annotated[
    int, typer.Option("--num-layers", min=1, help="How many layers to remove.")
]
RemovedOption = Annotated[
    str | None,
    typer.Option("--removed", help="The layers to remove, ends included: '14-18' or '3,7,8'."),
]
CriterionOption = Annotated[
    Criterion, typer.Option("--criterion", help="What picks the layers to remove.")
]
RecoveryOption = Annotated[
    Recovery, typer.Option("--recovery", help="What takes the place of the removed layers.")
]
InputOption = Annotated[
    GhostInput, typer.Option("--input", help="What the ghost's matrix is applied to.")
]
BiasOption = Annotated[bool, typer.Option("--bias/--no-bias", help="Give ghosts a bias.")]
FirstStateOption = Annotated[
    FirstState,
    typer.Option("--first-state", help="A constant state for the first token of a sequence."),
]
TokenWeightOption = Annotated[
    TokenWeight, typer.Option("--token-weight", help="How much each token counts in the fit.")
]
DampingOption = Annotated[
    str,
    typer.Option("--damping", help="Absolute damping, or 'auto': what held-out text prefers."),
]
CorrectionsOption = Annotated[
    str,
    typer.Option(
        "--corrections",
        help="Steps of the fitted ghosts towards the dense model's predictions: a number, or "
        "'auto': as many as help.",
    ),
]
RefineOption = Annotated[
    int,
    typer.Option(
        "--refine", min=0, help="Steps of training on the ghosts alone, after the corrections."
    ),
]
TokensOption = Annotated[int, typer.Option("--tokens", min=1, help="Tokens of calibration text.")]
TextTokensOption = Annotated[int, typer.Option("--tokens", min=1, help="Tokens of text.")]
EvaluationTokensOption = Annotated[
    int, typer.Option("--evaluation-tokens", min=1, help="Tokens of evaluation text.")
]
SequenceLengthOption = Annotated[
    int, typer.Option("--sequence-length", min=2, help="Tokens in a sequence.")
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at a time.")]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Dtype of the weights; 'auto' is the checkpoint's own.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Where to compute: auto, cpu, cuda, cuda:1, ...")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is already there.")
]
ReportOption = Annotated[
    Path | None, typer.Option("--report", help="Also write a report: .html or .json.")
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Only print the memory that the statistics would take."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of all that is random.")]

RankTimeoutOption = Annotated[
    int,
    typer.Option(
        "--rank-timeout",
        min=1,
        help="With torchrun: seconds to wait for the other processes before giving up.",
    ),
]


def parse_layers(text: str) -> list[int]:
    """Return the layers that a text such as '14-18' or '3,7,8' names.

    Raises:
        typer.BadParameter: It names none, or one twice, or is no such text.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise usage_error(
                f"expected layers such as '14-18' or '3,7,8', got {text!r}", "--removed"
            )
        layers += range(int(first), int(last if dash else first) + 1)
    if not layers or len(set(layers)) < len(layers):
        raise usage_error(
            f"expected every layer once and each range upwards, got {text!r}", "--removed"
        )
    return sorted(layers)


def parse_damping(text: str) -> float | Literal["auto"]:
    """Return the damping as a number, or "auto".

    Raises:
        typer.BadParameter: It is neither.
    """
    if text == "auto":
        return "auto"
    try:
        damping = float(text)
    except ValueError:
        damping = -1.0
    if not 0 <= damping < float("inf"):
        raise usage_error(f"expected 'auto' or a number >= 0, got {text!r}", "--damping")
    return damping


def parse_corrections(text: str) -> int | Literal["auto"]:
    """Return the number of corrections, or "auto".

    Raises:
        typer.BadParameter: It is neither.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise usage_error(f"expected 'auto' or a number >= 0, got {text!r}", "--corrections")
    return int(text)


def parse_increase(text: str | None) -> float | None:
    """Return the share that a text such as '10%' or '0.1' names.

    Raises:
        typer.BadParameter: It names none above 0.
    """
    if text is None:
        return None
    option = "--max-perplexity-increase"
    number = text.strip().removesuffix("%")
    share = _number_above(0.0, number, text, "a share above 0 such as '10%'", option)
    return share / 100.0 if text.strip().endswith("%") else share


def parse_speedup(text: str | None) -> float | None:
    """Return the factor that a text such as '1.3' or '1.3x' names.

    Raises:
        typer.BadParameter: It names none above 1.
    """
    if text is None:
        return None
    number = text.strip().removesuffix("x")
    return _number_above(1.0, number, text, "a factor above 1 such as '1.3'", "--min-speedup")


def _number_above(least: float, number: str, text: str, expected: str, option: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = least
    if not least < value < float("inf"):
        raise usage_error(f"expected {expected}, got {text!r}", option)
    return value


def check_layer_choice(
    num_layers: int | None,
    removed: str | None,
    increase: float | None = None,
    speedup: float | None = None,
) -> list[int] | None:
    """Return the layers of `--removed`, after checking that exactly one of the four is given."""
    if sum(value is not None for value in (num_layers, removed, increase, speedup)) != 1:
        raise usage_error(
            "expected one of these, got several or none",
            "--num-layers / --removed / --max-perplexity-increase / --min-speedup",
        )
    return None if removed is None else parse_layers(removed)
