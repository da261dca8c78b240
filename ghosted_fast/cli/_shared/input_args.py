"""Options of what is read: models, texts and tasks.

Here and in `fit_args` each option is declared once, in a group by its subject: a verb that takes a
group has all of its options. The fields are what `verb` makes options of, and `title` is what
stands above them in the help. A group refuses values that do not go together as soon as it is made,
and gives what the library takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ghosted_fast.cli._shared import values
from ghosted_fast.cli._shared.verb import usage_error
from ghosted_fast.text.shares import percent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from ghosted_fast.options import HealOptions, HowMany

TEXT = "a .jsonl, .json, .csv or .parquet file, any other text file, a folder, or a hub data set"

DtypeOption = Annotated[
    values.Dtype,
    typer.Option("--dtype", help="Dtype of the weights; 'auto' is the checkpoint's own."),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        autocompletion=values.completing(("auto", "cpu", "cuda")),
        help="Where to compute: auto, cpu, cuda, cuda:1, ...",
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", help="The model: a hub id, a local folder or a .gguf file.")
]
TokensOption = Annotated[int, typer.Option("--tokens", min=1, help="Tokens of calibration text.")]
EvaluationTokensOption = Annotated[
    int, typer.Option("--evaluation-tokens", min=1, help="Tokens of each evaluation text.")
]
EvaluationOption = Annotated[
    str | None,
    typer.Option(
        "--evaluation",
        parser=values.parse_written_text,
        metavar="TEXT",
        help=f"Text to measure perplexity on: {TEXT}.",
    ),
]
LayersOption = Annotated[
    tuple[int, ...],
    typer.Option(
        "--removed",
        parser=values.parse_layers,
        metavar="LAYERS",
        help="Layers by number, ends included: '14-18' or '3,7,8'.",
    ),
]
FolderOption = Annotated[Path, typer.Option("--output", help="The folder to write.")]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with a model; only where you trust who wrote it.",
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is already there.")
]


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """One model."""

    title: ClassVar = "Model"
    model: ModelOption
    dtype: DtypeOption = "auto"
    device: DeviceOption = "auto"
    trust_remote_code: TrustOption = False

    def open(self) -> tuple[Any, Any]:
        """Return the model, on its device, and its tokenizer."""
        from ghosted_fast.cli._shared.loading import open_model

        return open_model(self.model, self.dtype, self.device, self.trust_remote_code)

    def check(self, sequence_length: int, *wanted: HowMany) -> None:
        """Raise, before any weight is read, unless the model can do what is asked.

        Args:
            sequence_length: Of the text.
            wanted: The layers that are to go.
        """
        from ghosted_fast.cli._shared.loading import check_ahead

        check_ahead(self.model, self.device, self.trust_remote_code, sequence_length, *wanted)


@dataclass(frozen=True, kw_only=True)
class ModelsArgs:
    """Several models, of which the first is the dense one."""

    title: ClassVar = "Models"
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            help="A model: a hub id, a local folder or a .gguf file. Repeat it; the first is "
            "dense.",
        ),
    ]
    dtype: DtypeOption = "auto"
    device: DeviceOption = "auto"
    trust_remote_code: TrustOption = False

    def open(self) -> tuple[dict[str, Any], Any]:
        """Return the models by short, distinct names, and the tokenizer of the first."""
        from ghosted_fast.cli._shared.loading import open_models

        return open_models(self.model, self.dtype, self.device, self.trust_remote_code)

    def check(self, sequence_length: int = 0) -> None:
        """Raise, before any weight is read, unless there are such models."""
        from ghosted_fast.cli._shared.loading import check_ahead

        for spec in self.model:
            check_ahead(spec, self.device, self.trust_remote_code, sequence_length)


@dataclass(frozen=True, kw_only=True)
class TextArgs:
    """How texts are read and cut into sequences."""

    title: ClassVar = "How texts are read"
    field: Annotated[
        str | None,
        typer.Option(
            "--field",
            help="Field that holds the text or the conversation; if not given: text, else a "
            "conversation (messages, prompt and completion, ...), else 0, else the only one.",
        ),
    ] = None
    split: Annotated[
        str | None,
        typer.Option("--split", help="Split of a hub data set; train if not given."),
    ] = None
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=2, help="Tokens in a sequence.")
    ] = 512
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at a time.")] = 8
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of all that is random.")] = 0

    def check_tokens(self, num_tokens: int, option: str) -> None:
        """Raise unless so many tokens, which an option asks for, are a sequence or more."""
        if num_tokens < self.sequence_length:
            raise usage_error(
                f"expected at least the {self.sequence_length} of one sequence "
                f"(--sequence-length), got {num_tokens}",
                option,
            )

    def check_there(self, spec: str) -> None:
        """Raise, having read no more than its beginning, unless there is a text of a name.

        Raises:
            SourceError: There is none, or it does not begin as texts do.
        """
        from ghosted_fast.text.loading import check_texts

        check_texts(spec, self.field, self.split)

    def batches_of(
        self,
        tokenizer: Any,
        text: str | Iterable[str],
        tokens: int,
        fewest: int | None = None,
    ) -> list[Tensor]:
        """Return the batches of a text: of one by its name, or of texts as they are.

        Raises:
            SourceError: It cannot be read or is too short; the message names it.
        """
        from ghosted_fast.errors import SourceError
        from ghosted_fast.text.loading import load_texts, token_batches

        size = self.sequence_length, self.batch_size, fewest
        if not isinstance(text, str):
            return token_batches(tokenizer, text, tokens, *size)
        try:
            texts = load_texts(text, self.field, self.split, tokenizer)
            return token_batches(tokenizer, texts, tokens, *size)
        except SourceError as error:
            if text in str(error):
                raise
            raise SourceError(f"text {text!r}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LearnedTextArgs(TextArgs):
    """A text to learn from, or several that are mixed."""

    title: ClassVar = "Text to calibrate on"
    calibration: Annotated[
        list[str],
        typer.Option(
            "--calibration",
            help=f"Text to calibrate on: {TEXT}; or 'self', text that the model itself generates "
            "(with a chat template, conversations). Repeat it to mix texts, in equal shares or in "
            "those that are given: 'web.jsonl:70%' and 'self:30%'.",
        ),
    ]
    temperatures: Annotated[
        tuple[float, ...] | None,
        typer.Option(
            "--temperatures",
            parser=values.parse_temperatures,
            metavar="NUMBERS",
            help="Temperatures at which the model writes 'self', as many texts at each: "
            "'0.7,1,1.3'. 1 if not given.",
        ),
    ] = None

    def __post_init__(self) -> None:
        values.parse_mixture(self.calibration)
        if self.temperatures is not None and not self.from_model:
            raise usage_error(
                f"expected --calibration self with it, got {' and '.join(self.shares)}, which the "
                "model does not write",
                "--temperatures",
            )

    @property
    def shares(self) -> dict[str, float]:
        """The texts by name, and their shares."""
        return values.parse_mixture(self.calibration)

    @property
    def named(self) -> str:
        """What the text is called where it is said what a model was made of."""
        names = [Path(name).name for name in self.shares]
        if len(names) == 1:
            return names[0]
        shares = map(percent, self.shares.values())
        return ", ".join(f"{name} ({share})" for name, share in zip(names, shares, strict=True))

    def check(self) -> None:
        """Raise, before a model is loaded, unless there is such a text."""
        for name in self.shares:
            if name != "self":
                self.check_there(name)

    def tokens_to_heal(self, options: HealOptions) -> int:
        """Return how much text a healing needs, to learn from and to judge on."""
        assert options.tokens is not None
        return options.tokens + options.held_out_tokens + 2 * self.sequence_length

    def read(
        self,
        dense: Any,
        tokenizer: Any,
        tokens: int,
        fewest: int | None = None,
        progress: bool = True,
    ) -> list[Tensor]:
        """Return the batches of the text, or of what the model writes; those of rank 0."""
        from ghosted_fast import distributed
        from ghosted_fast.text.generation import generate_texts
        from ghosted_fast.text.loading import load_texts
        from ghosted_fast.text.mixture import Texts, mix_texts

        def own(wanted: int) -> Iterable[str]:
            how: dict[str, Any] = {"seed": self.seed, "progress": progress}
            if self.temperatures is not None:
                how["temperatures"] = self.temperatures
            return generate_texts(dense, tokenizer, wanted, **how)

        shares = self.shares
        if len(shares) == 1:
            text = own(tokens) if self.from_model else next(iter(shares))
            return distributed.from_first(self.batches_of(tokenizer, text, tokens, fewest))
        sources: dict[str, Texts] = {
            name: own if name == "self" else load_texts(name, self.field, self.split, tokenizer)
            for name in shares
        }
        size = self.sequence_length, self.batch_size, fewest
        return distributed.from_first(
            mix_texts(tokenizer, sources, tokens, shares, *size, seed=self.seed)
        )

    @property
    def from_model(self) -> bool:
        """Whether the model writes the text, or a part of it."""
        return "self" in self.shares


@dataclass(frozen=True, kw_only=True)
class CalibrationArgs(LearnedTextArgs):
    """The text to calibrate on."""

    title: ClassVar = LearnedTextArgs.title
    tokens: TokensOption = 49152

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tokens(self.tokens, "--tokens")

    def load(self, dense: Any, tokenizer: Any, progress: bool = True) -> list[Tensor]:
        """Return the batches of the text, or of what the model writes; those of rank 0.

        Where the text is too short, and a ghost can be fitted on what there is, that is used.
        """
        return self.read(dense, tokenizer, self.tokens, self.fewest(dense), progress)

    def fewest(self, dense: Any) -> int:
        """Return on how many tokens a ghost can be fitted at least."""
        from ghosted_fast.models.decoder import Decoder
        from ghosted_fast.options import GhostOptions

        rows = max(
            GhostOptions().folds, -(-2 * Decoder.of(dense).hidden_size // self.sequence_length)
        )
        return min(self.tokens, rows * self.sequence_length)


@dataclass(frozen=True, kw_only=True)
class EvaluationArgs:
    """A text to measure dense, pruned and ghosted model on."""

    title: ClassVar = "Text to measure on"
    evaluation: EvaluationOption = None
    evaluation_tokens: EvaluationTokensOption = 5120

    def check(self, text: TextArgs) -> None:
        """Raise, before a model is loaded, unless there is such a text."""
        if self.evaluation is not None:
            text.check_tokens(self.evaluation_tokens, "--evaluation-tokens")
            text.check_there(self.evaluation)

    def load(self, text: TextArgs, tokenizer: Any) -> list[Tensor] | None:
        """Return its batches, if it is asked for, read as another text is."""
        if self.evaluation is None:
            return None
        return text.batches_of(
            tokenizer, self.evaluation, self.evaluation_tokens, text.sequence_length
        )


@dataclass(frozen=True, kw_only=True)
class TaskArgs:
    """Tasks to measure accuracy on."""

    title: ClassVar = "Tasks"
    tasks: Annotated[
        tuple[str, ...] | None,
        typer.Option(
            "--tasks",
            parser=values.parse_tasks,
            autocompletion=values.complete_tasks,
            metavar="NAMES",
            help="Tasks to measure accuracy on, with commas between: local/socialiqa, "
            "local/quartz, local/parables, local/logiqa, local/knowledge; 'paper' for the nine of "
            "the paper on ghosts and their mean; or lm-eval's own. The last two need the hub.",
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Samples of each task; all if not given.")
    ] = None

    def names(self) -> list[str]:
        """Return the tasks, each once.

        Raises:
            MissingExtraError: Package lm_eval is absent.
            ArgumentError: There is no task of a name.
        """
        from ghosted_fast.measure.tasks import check_tasks

        return [] if self.tasks is None else check_tasks(self.tasks)
