"""What verbs, options and values were called before: each ends with an error that names the new.

Only the words are known here. A verb that never had an option says of it what it says of any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

_VERBS = {"compare": "grid"}
# The new name of an option, and what the old one is told.
_OPTIONS = {
    "--num-layers": ("--remove", "It is --remove now (how many layers to take out)"),
    "--repeats": (
        "--precision",
        "It is --precision now (how narrow the intervals are to be), and --seconds (how long)",
    ),
    "--refine": ("--heal", "It is --heal now (how many tokens to train on: '100k')"),
    "--input": ("--features", "It is --features now: normed, or raw for what was hidden"),
}
_VALUES = {("--features", "hidden"): "raw"}


class Verb(TyperCommand):
    """A verb that knows the old names of its options and their values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the command line apart, unless there is an old name in it."""
        if ctx.resilient_parsing:  # a shell asks how it may go on
            return super().parse_args(ctx, args)
        known = {name for item in self.params for name in item.opts}
        for option, value in _named(args):
            if option in known and value.isdecimal() and not value.isascii():
                ctx.fail(f"Invalid value for '{option}': expected the digits 0-9, got {value!r}.")
            new, said = _OPTIONS.get(option, ("", ""))
            if new in known and option not in known:
                if option == "--num-layers" and "--removed" in known:
                    said += "; which ones is --removed"
                ctx.fail(f"No such option: {option}. {said}.")
            if option in known and (option, value) in _VALUES:
                ctx.fail(
                    f"Invalid value for '{option}': {value!r} is called "
                    f"{_VALUES[option, value]!r} now."
                )
        return super().parse_args(ctx, args)


class Verbs(TyperGroup):
    """The verbs, which knows what they were called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb, unless it is an old name."""
        if args and not ctx.resilient_parsing and (new := _VERBS.get(args[0])):
            ctx.fail(f"No such command {args[0]!r}. It is {new!r} now: ghosted-fast {new} --help.")
        return super().resolve_command(ctx, args)


def _named(args: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of a command line, each with its value, or what might be it."""
    for place, text in enumerate(args):
        if text == "--":
            return
        name, equals, value = text.partition("=")
        yield name, value if equals else "".join(args[place + 1 : place + 2])
