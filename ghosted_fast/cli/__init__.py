"""The command line `ghosted-fast`. Importing it loads neither torch nor transformers."""

from __future__ import annotations


def main() -> None:
    """Run the command line with the process's arguments."""
    from ghosted_fast.cli.app import app

    app(prog_name="ghosted-fast")
