"""Options of what is done: which layers go, how ghosts are fitted, and what follows the fit.

See `input_args` for what a group is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from ghosted_fast.cli._shared import values
from ghosted_fast.cli._shared.input_args import CalibrationArgs, ModelArgs
from ghosted_fast.cli._shared.recipe import take_recipe
from ghosted_fast.cli._shared.verb import usage_error

if TYPE_CHECKING:
    from ghosted_fast.options import Bound, GhostOptions, HealOptions, HowMany


@dataclass(frozen=True, kw_only=True)
class SelectionArgs:
    """What picks the layers."""

    title: ClassVar = "Which layers"
    criterion: Annotated[
        values.Criterion, typer.Option("--criterion", help="What picks the layers to remove.")
    ] = "ghost"
    beam: Annotated[
        int, typer.Option("--beam", min=1, help="Sets of layers that ghost-search compares.")
    ] = 16
    corrected_candidates: Annotated[
        int,
        typer.Option(
            "--corrected-candidates",
            min=0,
            help="Compare so many of the best candidates of ghost and ghost-search again, with two "
            "corrections each; 0 for none.",
        ),
    ] = 0


@dataclass(frozen=True, kw_only=True)
class HowManyArgs(SelectionArgs):
    """How many layers go, or which: one of four options says it."""

    title: ClassVar = "How many layers"
    remove: Annotated[
        int | None,
        typer.Option("--remove", min=1, help="How many layers to remove; --criterion picks them."),
    ] = None
    removed: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            "--removed",
            parser=values.parse_layers,
            metavar="LAYERS",
            help="The layers to remove, ends included: '14-18' or '3,7,8'.",
        ),
    ] = None
    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(
            "--max-perplexity-increase",
            parser=values.parse_increase,
            metavar="SHARE",
            help="Remove as many layers as held-out text allows within this, such as '10%'.",
        ),
    ] = None
    min_speedup: Annotated[
        float | None,
        typer.Option(
            "--min-speedup",
            parser=values.parse_speedup,
            metavar="FACTOR",
            help="Remove as few layers as make decoding this fast, such as '1.3'.",
        ),
    ] = None

    def __post_init__(self) -> None:
        asked = {
            "--remove": self.remove,
            "--removed": self.removed,
            "--max-perplexity-increase": self.max_perplexity_increase,
            "--min-speedup": self.min_speedup,
        }
        given = [option for option, value in asked.items() if value is not None]
        if len(given) != 1:
            raise usage_error(
                f"expected one of the four, got {' and '.join(given) or 'none'}",
                " / ".join(asked),
            )

    @property
    def bound_option(self) -> str | None:
        """The option that bounds quality or speed, if the number of layers follows from one."""
        if self.max_perplexity_increase is not None:
            return "--max-perplexity-increase"
        return None if self.min_speedup is None else "--min-speedup"

    def remove_or_bound(self) -> int | Bound | None:
        """Return what `ghost_model` takes as `remove`."""
        from ghosted_fast.options import PerplexityBound, SpeedBound

        if self.max_perplexity_increase is not None:
            return PerplexityBound(self.max_perplexity_increase)
        return self.remove if self.min_speedup is None else SpeedBound(self.min_speedup)

    def how_many(self) -> HowMany:
        """Return what is asked for."""
        from ghosted_fast.options import how_many

        return how_many(self.remove_or_bound(), self.removed)


@dataclass(frozen=True, kw_only=True)
class GhostArgs:
    """How ghosts are fitted."""

    title: ClassVar = "Ghosts"
    features: Annotated[
        values.Features,
        typer.Option(
            "--features",
            help="What the ghost's matrix is applied to; 'auto': what held-out text prefers, at "
            "twice the statistics.",
        ),
    ] = "normed"
    bias: Annotated[bool, typer.Option("--bias/--no-bias", help="Give ghosts a bias.")] = False
    first_state: Annotated[
        values.FirstState,
        typer.Option("--first-state", help="A constant state for the first token of a sequence."),
    ] = "auto"
    token_weight: Annotated[
        values.TokenWeight,
        typer.Option("--token-weight", help="How much each token counts in the fit."),
    ] = "capped"
    damping: Annotated[
        float | Literal["auto"],
        typer.Option(
            "--damping",
            parser=values.parse_damping,
            metavar="NUMBER",
            help="Absolute damping, or 'auto': what held-out text prefers.",
        ),
    ] = "auto"

    def options(self, sequential: bool = True) -> GhostOptions:
        """Return what the library takes."""
        from ghosted_fast.options import GhostOptions

        return GhostOptions(
            features=self.features,
            token_weight=self.token_weight,
            first_state=self.first_state,
            bias=self.bias,
            damping=self.damping,
            sequential=sequential,
        )


@dataclass(frozen=True, kw_only=True)
class ImproveArgs:
    """What is done after the fit."""

    title: ClassVar = "After the fit"
    corrections: Annotated[
        int | Literal["auto"],
        typer.Option(
            "--corrections",
            parser=values.parse_corrections,
            metavar="NUMBER",
            help="Steps of the fitted ghosts towards the dense model's predictions: a number, or "
            "'auto': as many as help. Where a model is swept through, each reads its upper layers "
            "about four times.",
        ),
    ] = "auto"
    heal: Annotated[
        int | None,
        typer.Option(
            "--heal",
            parser=values.parse_token_count,
            metavar="TOKENS",
            help="Then train factors of all linear maps, and the ghosts, towards the dense model's "
            "predictions, on so many tokens: '100k'.",
        ),
    ] = None

    def heal_options(self, seed: int) -> HealOptions | None:
        """Return how the model is healed, None if it is not."""
        from ghosted_fast.options import HealOptions

        return None if self.heal is None else HealOptions(tokens=self.heal, seed=seed)


@dataclass(frozen=True, kw_only=True)
class RanksArgs:
    """How processes work together."""

    title: ClassVar = "This run"
    rank_timeout: Annotated[
        int,
        typer.Option(
            "--rank-timeout",
            min=1,
            help="With torchrun: seconds to wait for the other processes before giving up.",
        ),
    ] = 1800


@dataclass(frozen=True, kw_only=True)
class LaunchArgs(RanksArgs):
    """Whether work is done, and how processes do it together."""

    title: ClassVar = "This run"
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only print the memory, disk, reads and about the time that it would take.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class RecipeArgs(LaunchArgs):
    """What to start from, and how it is done."""

    title: ClassVar = LaunchArgs.title
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            callback=take_recipe,
            is_eager=True,
            help="Take the options that are not given here from a file, or from the folder of a "
            "model that was fitted: recipe.yaml.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RecoveryArgs(ImproveArgs):
    """What takes the place of the removed layers, and what is done to it."""

    title: ClassVar = "In their place"
    recovery: Annotated[
        values.Recovery,
        typer.Option("--recovery", help="What takes the place of the removed layers."),
    ] = "ghost"
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential/--independent",
            help="Fit the ghosts of several gaps on what the ones below them give, or by "
            "themselves.",
        ),
    ] = True

    def __post_init__(self) -> None:
        if self.recovery != "ghost" and self.corrections not in ("auto", 0):
            raise usage_error(
                "expected --recovery ghost with --corrections, got "
                f"{self.recovery!r}, which is put in as it was published",
                "--corrections",
            )

    @property
    def kind(self) -> str:
        """What tables call the model."""
        named = {"ghost": "ghosted", "none": "pruned"}.get(self.recovery, self.recovery)
        return f"{named}, healed" if self.heal else named


@dataclass(frozen=True, kw_only=True)
class FitCalibrationArgs(CalibrationArgs):
    """The text to calibrate on, and the copy of the model to calibrate in."""

    title: ClassVar = CalibrationArgs.title
    calibrate_in: Annotated[
        values.Quantized | None,
        typer.Option(
            "--calibrate-in",
            help="Choose, fit and correct in a copy of the model that bitsandbytes quantizes; the "
            "layers are cut from the model itself.",
        ),
    ] = None

    def check_model(self, model: ModelArgs) -> None:
        """Raise, before any work, unless the model can be quantized as it is asked for."""
        from ghosted_fast.models.quantized.loading import check_quantizable

        if self.calibrate_in is not None:
            check_quantizable(model.model, self.calibrate_in, model.trust_remote_code)

    def open(self, model: ModelArgs) -> tuple[Any, Any]:
        """Return the model to calibrate in, on its device, and its tokenizer."""
        from ghosted_fast.cli._shared.loading import open_quantized

        if self.calibrate_in is None:
            return model.open()
        return open_quantized(
            model.model, self.calibrate_in, model.dtype, model.device, model.trust_remote_code
        )
