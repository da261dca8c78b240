"""The verbs of the command line, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from ghosted_fast import __version__
from ghosted_fast.cli._shared.old_names import Verb, Verbs
from ghosted_fast.cli._shared.recipe import RecipeVerb
from ghosted_fast.cli._shared.verb import verb
from ghosted_fast.cli.bench import bench
from ghosted_fast.cli.bench_ops import bench_ops
from ghosted_fast.cli.demo import demo
from ghosted_fast.cli.doctor import doctor
from ghosted_fast.cli.eval import evaluate
from ghosted_fast.cli.export import export
from ghosted_fast.cli.fit import fit
from ghosted_fast.cli.grid import grid
from ghosted_fast.cli.heal import heal_folder
from ghosted_fast.cli.import_ghosts import import_operators
from ghosted_fast.cli.prune import prune
from ghosted_fast.cli.select import select

app = typer.Typer(
    help="Remove decoder layers from a language model and put closed-form ghosts in their place.",
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", cls=Verb)(verb(demo))
app.command("select", cls=Verb)(verb(select, shares=True))
app.command("fit", cls=RecipeVerb)(verb(fit, shares=True))
app.command("heal", cls=Verb)(verb(heal_folder, shares=True))
app.command("prune", cls=Verb)(verb(prune))
app.command("import", cls=Verb)(verb(import_operators))
app.command("eval", cls=Verb)(verb(evaluate))
app.command("grid", cls=Verb)(verb(grid))
app.command("bench", cls=Verb)(verb(bench))
app.command("bench-ops", cls=Verb)(verb(bench_ops))
app.command("export", cls=Verb)(verb(export))
app.command("doctor", cls=Verb)(verb(doctor))


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ghosted-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass
