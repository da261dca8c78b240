"""`ghosted-fast heal`: a saved model trained to predict what its dense model predicts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ghosted_fast.cli._shared import values
from ghosted_fast.cli._shared.fit_args import RanksArgs
from ghosted_fast.cli._shared.input_args import (
    DeviceOption,
    DtypeOption,
    LearnedTextArgs,
    TrustOption,
)
from ghosted_fast.cli._shared.output_args import NewFolderArgs, heal_state
from ghosted_fast.cli._shared.results import Result, TextTable
from ghosted_fast.cli._shared.verb import usage_error

if TYPE_CHECKING:
    from ghosted_fast.options import HealOptions


@dataclass(frozen=True, kw_only=True)
class PairArgs:
    """The model that is healed, and the one that it comes from."""

    title: ClassVar = "Models"
    folder: Annotated[
        str, typer.Argument(help="The model without some layers: a folder, or a hub id.")
    ]
    dense: Annotated[
        str, typer.Option("--dense", help="The dense model that it comes from: a folder or hub id.")
    ]
    dtype: DtypeOption = "auto"
    device: DeviceOption = "auto"
    trust_remote_code: TrustOption = False

    def check(self, sequence_length: int) -> None:
        """Raise, before any weight is read, unless there are such models."""
        from ghosted_fast.cli._shared.loading import check_ahead

        for spec in (self.folder, self.dense):
            check_ahead(spec, self.device, self.trust_remote_code, sequence_length)

    def open(self) -> tuple[Any, Any, Any]:
        """Return both models, which share what is equal in them, and the folder's tokenizer.

        Raises:
            ArgumentError: Nothing is equal in them.
        """
        from ghosted_fast.cli._shared.loading import open_model
        from ghosted_fast.errors import ArgumentError
        from ghosted_fast.improve.pairs import check_pair, check_same_dtype
        from ghosted_fast.models.structure import share_equal_weights

        how = self.dtype, self.device, self.trust_remote_code
        smaller, tokenizer = open_model(self.folder, *how)
        dense, _ = open_model(self.dense, *how)
        check_pair(smaller, dense)
        check_same_dtype(smaller, dense)
        if not share_equal_weights(smaller, dense):
            raise ArgumentError(
                f"expected the dense model that {self.folder!r} was made of, got {self.dense!r}, "
                "of whose weights none is in the folder: name that very model (a base model and "
                "its instruct version differ)"
            )
        return smaller, dense, tokenizer


@dataclass(frozen=True, kw_only=True)
class HealArgs:
    """What is trained, on how much text, and for how long."""

    title: ClassVar = "Training"
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens",
            parser=values.parse_token_count,
            metavar="TOKENS",
            help="Tokens to learn from at most, such as '100k'; none is read twice.",
        ),
    ] = 1_000_000
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="When to end at the latest; no limit if not given."),
    ] = None
    rank: Annotated[
        Any,
        typer.Option(
            "--rank",
            parser=values.parse_rank,
            metavar="RANK",
            help="Rank of the factors of each linear map; 0 trains the ghosts alone, 'full' whole "
            "weights in the place of factors.",
        ),
    ] = 32
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            help="Learning rate of the first full steps; 1e-3 if not given, 2e-4 for 'full'.",
        ),
    ] = None
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter",
            help="Write what was trained as a PEFT adapter of FOLDER, not as a healed model.",
        ),
    ] = False
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="With torchrun: share the weights of the layers out among the processes, each of "
            "which holds its part of them and one layer at a time.",
        ),
    ] = False

    def __post_init__(self) -> None:
        for option, value in (("--minutes", self.minutes), ("--learning-rate", self.learning_rate)):
            if value is not None and not 0.0 < value < float("inf"):
                raise usage_error(f"expected a number above 0, got {value}", option)

    def options(self, seed: int) -> HealOptions:
        """Return what the library takes."""
        from ghosted_fast.options import HealOptions

        return HealOptions(
            tokens=self.tokens,
            rank=self.rank,
            learning_rate=self.learning_rate,
            minutes=self.minutes,
            seed=seed,
        )


def heal_folder(
    pair: PairArgs,
    text: LearnedTextArgs,
    training: HealArgs,
    output: NewFolderArgs,
    ranks: RanksArgs,
) -> Result | None:
    """Train a saved model without some layers to predict what its dense model predicts.

    The folder may have ghosts or not. Low-rank factors of all linear maps are trained, and the
    ghosts; they are folded into the weights, so that the model computes no more than before. With
    --calibration self the dense model writes the text. With --adapter what was trained stays apart,
    for PEFT to put on the folder's model, which may be quantized then. A run that was killed goes
    on where it was. Where no step helps, the model is written as it was.
    """
    from ghosted_fast.checkpoint.model_card import attach_healing
    from ghosted_fast.checkpoint.save import save_model
    from ghosted_fast.cli._shared.launch import process_group
    from ghosted_fast.facts import healing_text
    from ghosted_fast.improve.adapter import check_adapter
    from ghosted_fast.improve.healing import check_healable, heal
    from ghosted_fast.improve.pairs import check_sharding
    from ghosted_fast.models.loading import load_processor

    options = training.options(text.seed)
    with process_group(ranks.rank_timeout, pair.device) as first:
        if first:
            output.check(pair.folder, pair.dense, *text.shares)
        if training.adapter:
            check_adapter(output.output, options.rank, output.overwrite)
        text.check()
        pair.check(text.sequence_length)
        smaller, dense, tokenizer = pair.open()
        check_sharding(smaller, dense, options.rank, training.shard)
        check_healable(smaller, options, training.adapter)
        batches = text.read(
            dense, tokenizer, text.tokens_to_heal(options), text.sequence_length, first
        )
        state = heal_state(output.output)
        done = heal(
            smaller,
            dense,
            batches,
            options,
            state=state,
            adapter=output.output if training.adapter else None,
            overwrite=output.overwrite,
            shard=training.shard,
            progress=first,
        )
        healed = asdict(done)
        facts = _facts(pair, smaller, dense, text, healed) | {"output": str(output.output)}
        if not training.adapter:
            attach_healing(smaller.config, healed, facts["calibration"])
            processor = load_processor(pair.folder, pair.trust_remote_code) if first else None
            save_model(smaller, output.output, processor or tokenizer, output.overwrite)
        if first:
            state.unlink(missing_ok=True)
    if not first:
        return None
    saved = f"saved {output.output}" + ("" if healed["best_tokens"] else ", unchanged")
    shown: list[TextTable | str] = [f"healing: {healing_text(healed)}", saved]
    if output.report is not None:
        shown.append(output.write(facts))
    return Result(facts, shown)


def _facts(
    pair: PairArgs, smaller: Any, dense: Any, text: LearnedTextArgs, healed: dict[str, Any]
) -> dict[str, Any]:
    """Return what is known of the model and its healing, for the report."""
    from ghosted_fast.checkpoint.record import removal_record
    from ghosted_fast.models.families import num_layers

    _, removed = removal_record(smaller.config, num_layers(smaller))
    return {
        "model": Path(pair.folder).name,
        "dense": pair.dense,
        "num_layers": num_layers(dense),
        "removed": removed,
        "calibration": text.named,
        "healing": healed,
    }
