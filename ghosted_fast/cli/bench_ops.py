"""`ghosted-fast bench-ops`: the operators on this machine, beside their rivals and the roofs."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import typer

from ghosted_fast.cli._shared import values
from ghosted_fast.cli._shared.input_args import OverwriteOption
from ghosted_fast.cli._shared.precision_args import PrecisionArgs, SecondsOption
from ghosted_fast.cli._shared.results import Result, TextTable
from ghosted_fast.cli._shared.verb import usage_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghosted_fast.bench_ops.against import Change
    from ghosted_fast.bench_ops.cases import Plan, Setting
    from ghosted_fast.bench_ops.rows import Run
    from ghosted_fast.bench_ops.runner import Effort

Operator = Literal["gram_update", "ghost_apply", "ghost_solve", "divergence"]
OperandDtype = Literal["bfloat16", "float16", "float32", "bf16", "fp16", "fp32"]
JSON_FILE, CSV_FILE, PLOT_FILE = "operators.json", "operators.csv", "roofline.svg"


@dataclass(frozen=True, kw_only=True)
class CaseArgs:
    """Which cases are measured."""

    title: ClassVar = "What is measured"
    operator: Annotated[
        list[Operator] | None,
        values.words_option(
            "--operator",
            Operator,
            f"An operator; repeat it: {', '.join(get_args(Operator))}. All if not given.",
        ),
    ] = None
    width: Annotated[list[int], typer.Option("--width", min=1, help="Hidden size; repeat it.")] = (
        field(default_factory=lambda: [576, 2048])
    )
    rows: Annotated[
        list[int] | None,
        typer.Option(
            "--rows",
            min=1,
            help="Tokens in a call; repeat it. If not given: 2048 for gram_update, 1, 16 and 512 "
            "for ghost_apply, and 256 for divergence.",
        ),
    ] = None
    words: Annotated[
        list[int],
        typer.Option("--words", min=1, help="Words of divergence's vocabulary; repeat it."),
    ] = field(default_factory=lambda: [49152])
    dtype: Annotated[
        list[OperandDtype] | None,
        values.words_option(
            "--dtype",
            OperandDtype,
            "Dtype of the activations; repeat it. bfloat16 if not given. ghost_solve is fp64 "
            "always.",
            "DTYPE",
        ),
    ] = None
    backend: Annotated[
        str,
        typer.Option(
            "--backend", help="What runs our operators: auto, or native, triton or reference."
        ),
    ] = "auto"
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option("--device", help="Where to compute.")
    ] = "cpu"

    def __post_init__(self) -> None:
        if self.operator is None or set(self.operator) != {"ghost_solve"}:
            return
        if self.rows is not None:
            raise usage_error(
                "expected none with ghost_solve alone, which has as many rows as its width; got "
                f"{', '.join(map(str, self.rows))}",
                "--rows",
            )
        if self.dtype is not None:
            raise usage_error(
                "expected none with ghost_solve alone, which is fp64 always; got "
                f"{', '.join(self.dtype)}",
                "--dtype",
            )

    def plans(self) -> list[Plan]:
        """Return the cases."""
        from ghosted_fast.bench_ops import divergence, ghost_apply, ghost_solve, gram_update
        from ghosted_fast.models.loading import resolve_dtype

        wanted = dict.fromkeys(self.operator or get_args(Operator))
        dtypes = list(dict.fromkeys(resolve_dtype(name) for name in self.dtype or ["bf16"]))
        found: list[Plan] = []
        for width in dict.fromkeys(self.width):
            for dtype in dtypes:
                assert dtype is not None
                if "gram_update" in wanted:
                    for rows in dict.fromkeys(self.rows or gram_update.TOKENS):
                        found += gram_update.plans(width, rows, dtype)
                if "ghost_apply" in wanted:
                    for rows in dict.fromkeys(self.rows or ghost_apply.ROWS):
                        found += ghost_apply.plans(width, rows, dtype)
            if "ghost_solve" in wanted:
                found += ghost_solve.plans(width)
        if "divergence" in wanted:
            for words, rows, dtype in itertools.product(
                dict.fromkeys(self.words), dict.fromkeys(self.rows or divergence.ROWS), dtypes
            ):
                assert dtype is not None
                found += divergence.plans(words, rows, dtype)
        return sorted(found, key=lambda plan: list(wanted).index(plan.operator))

    def setting(self) -> Setting:
        """Return where and by what the cases are computed."""
        import torch

        from ghosted_fast.bench_ops.cases import Setting
        from ghosted_fast.bench_ops.rotation import bytes_past_the_cache

        device = torch.device(self.device)
        return Setting(device, self.backend, bytes_past_the_cache(device))


@dataclass(frozen=True, kw_only=True)
class EffortArgs(PrecisionArgs):
    """How precisely, and how long."""

    title: ClassVar = PrecisionArgs.title
    seconds: SecondsOption = 10.0
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")] = False

    def effort(self) -> Effort:
        """Return what the runner takes."""
        from ghosted_fast.bench_ops.runner import Effort

        return Effort(self.precision, self.seconds)


@dataclass(frozen=True, kw_only=True)
class FilesArgs:
    """Where the results go, and what they are compared with."""

    title: ClassVar = "Files"
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help=f"Folder for all three: {JSON_FILE}, {CSV_FILE} and {PLOT_FILE}."
        ),
    ] = None
    json_file: Annotated[
        Path | None, typer.Option("--json-file", help="File for the results as JSON.")
    ] = None
    csv: Annotated[Path | None, typer.Option("--csv", help="File for the rows as CSV.")] = None
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="File for the roofline as SVG (extra report)."),
    ] = None
    overwrite: OverwriteOption = False
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            help="JSON of an earlier run on this machine; a loss beyond noise is status 1.",
        ),
    ] = None

    def __post_init__(self) -> None:
        single = [option for option, path in self._single() if path is not None]
        if self.output is not None and single:
            raise usage_error(f"expected it or single files, got {', '.join(single)}", "--output")
        if self.plot is not None and self.plot.suffix != ".svg":
            raise usage_error(f"expected a name in .svg, got {str(self.plot)!r}", "--plot")
        if self.output is not None and self.output.exists() and not self.output.is_dir():
            raise usage_error(f"expected a folder, got the file {str(self.output)!r}", "--output")
        seen: set[Path] = set()
        for option, path in self.targets():
            if path.resolve() in seen:
                raise usage_error(f"expected a file of its own, got {str(path)!r} again", option)
            seen.add(path.resolve())
            if path.is_dir():
                raise usage_error(f"expected a file, got the folder {str(path)!r}", option)
            if path.exists() and not self.overwrite:
                raise usage_error(
                    f"expected a new file, got {str(path)!r}, which exists: name another, or give "
                    "--overwrite",
                    option,
                )

    def _single(self) -> list[tuple[str, Path | None]]:
        return [("--json-file", self.json_file), ("--csv", self.csv), ("--plot", self.plot)]

    def targets(self) -> list[tuple[str, Path]]:
        """Return the files that are written, each with the option that asks for it."""
        if self.output is not None:
            return [("--output", self.output / name) for name in (JSON_FILE, CSV_FILE, PLOT_FILE)]
        return [(option, path) for option, path in self._single() if path is not None]

    def check(self) -> None:
        """Raise, before any work, unless all of them can be written.

        Raises:
            MissingExtraError: The plot needs matplotlib, which is absent.
        """
        from ghosted_fast.bench_ops.plot import check_plot

        if self.output is not None or self.plot is not None:
            check_plot()

    def write(self, run: Run, data: dict[str, Any]) -> list[str]:
        """Write the files, each whole or not at all, and return a line for each."""
        from ghosted_fast._atomic_files import write_atomically
        from ghosted_fast.bench_ops.plot import roofline_svg
        from ghosted_fast.bench_ops.report import csv_text

        texts: dict[str, Callable[[], str]] = {
            "--json-file": lambda: json.dumps(data, indent=2, ensure_ascii=False) + "\n",
            "--csv": lambda: csv_text(run),
            "--plot": lambda: roofline_svg(run),
        }
        targets = self.targets()
        if self.output is not None:
            targets = list(zip(texts, (path for _, path in targets), strict=True))
        for option, path in targets:
            write_atomically(path, texts[option]())
        return [str(path) for _, path in targets]


def bench_ops(cases: CaseArgs, effort: EffortArgs, files: FilesArgs) -> Result:
    """Measure the operators beside what torch has for the same, and beside what the machine can do.

    Every result is checked before anything is timed. Variants, rivals and roofs run in the same
    rounds; each ratio has an interval. Ctrl-C shows the cases that are known.
    """
    from ghosted_fast.bench_ops import runner
    from ghosted_fast.bench_ops.against import changes, confirmed, read_earlier, suspects

    plans, setting = cases.plans(), cases.setting()
    files.check()
    earlier = None
    if files.against is not None:
        earlier = read_earlier(files.against)
        earlier.check(runner.machine_of(setting), plans)

    def measured(chosen: list[Plan]) -> Run:
        return runner.run_plans(chosen, setting, effort.effort(), progress=not effort.quiet)

    run = measured(plans)
    found, complete = None, run.complete
    if earlier is not None:
        found = changes(earlier, run)
        suspected = [plan for plan in plans if plan.key in suspects(found)]
        if complete and suspected:
            again = measured(suspected)
            found, complete = confirmed(found, changes(earlier, again)), again.complete
    return _result(run, files, found, complete)


def _result(run: Run, files: FilesArgs, found: list[Change] | None, complete: bool) -> Result:
    from ghosted_fast.bench_ops import report
    from ghosted_fast.bench_ops.against import change_lines, change_table, suspects

    data, shown = run.to_dict(), list[TextTable | str]()
    for title, columns, lines in report.tables(run):
        shown += [TextTable(columns, lines, title, words=report.WORDS), ""]
    shown += report.notes(run)
    if found is not None:
        columns, lines = change_table(found)
        shown += ["", TextTable(columns, lines, f"against {files.against}", words=5), ""]
        shown += change_lines(found)
        data["changes"] = [item.to_dict() for item in found]
    if run.cases:
        shown += files.write(run, data)
    return Result(data, shown, passed=not suspects(found or []), interrupted=not complete)
