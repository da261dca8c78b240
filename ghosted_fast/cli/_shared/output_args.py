"""Options of what is written: a folder for a model, and a report.

See `input_args` for what a group is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ghosted_fast.cli._shared.input_args import FolderOption, OverwriteOption
from ghosted_fast.cli._shared.verb import usage_error


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """A report, and whether anything is replaced."""

    title: ClassVar = "Output"
    report: Annotated[
        Path | None, typer.Option("--report", help="Also write a report: .html or .json.")
    ] = None
    overwrite: OverwriteOption = False

    def __post_init__(self) -> None:
        if self.report is not None and self.report.suffix not in (".html", ".json"):
            raise usage_error(f"expected a .html or .json file, got {str(self.report)!r}",
                              "--report")  # fmt: skip

    def check_new(self, folder: Path | None, *read: str | None) -> None:
        """Raise, before any work, if something is there already or cannot be made.

        Args:
            folder: What is written beside the report.
            read: What is read, which is never replaced.
        """
        from ghosted_fast.cli._shared.loading import check_new
        from ghosted_fast.reports.page import page_template

        check_new(folder, self.overwrite, *read)
        check_new(self.report, self.overwrite, *read)
        if self.report is not None and self.report.suffix == ".html":
            page_template("report.html")

    def write(self, facts: dict[str, Any]) -> str:
        """Write the report, and return the line that says so."""
        from ghosted_fast.measure.system import machine_facts
        from ghosted_fast.reports.page import write_report

        assert self.report is not None
        facts["machine"] = machine_facts()
        write_report(self.report, facts, overwrite=self.overwrite)
        return f"report: {self.report}"


@dataclass(frozen=True, kw_only=True)
class OutputArgs(ReportArgs):
    """What is written, if anything is."""

    title: ClassVar = ReportArgs.title
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for the checkpoint; required to save one."),
    ] = None
    profile: Annotated[bool, typer.Option("--profile", help="Also print where the time went.")] = (
        False
    )

    @property
    def folder(self) -> Path:
        """Folder for the checkpoint, where there will be one."""
        assert self.output is not None
        return self.output

    def check(self, *read: str | None) -> None:
        """Raise, before any work, if something is there already or cannot be made."""
        self.check_new(self.output, *read)


@dataclass(frozen=True, kw_only=True)
class NewFolderArgs(ReportArgs):
    """What is written, in any case."""

    title: ClassVar = ReportArgs.title
    output: FolderOption

    def check(self, *read: str | None) -> None:
        """Raise, before any work, if something is there already or cannot be made."""
        self.check_new(self.output, *read)


def heal_state(folder: Path) -> Path:
    """Return the file beside a checkpoint from which a healing that was killed goes on."""
    return folder.with_name(f"{folder.name}.heal")


def states(folder: Path) -> Path:
    """Return the folder beside a checkpoint from which a sweep that was killed goes on."""
    return folder.with_name(f"{folder.name}.states")
