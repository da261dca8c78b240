"""`python -m docs.generate`: write what is generated, or with `--check` say what is outdated."""

from __future__ import annotations

import argparse
import sys

from docs.generate.pages import outdated, write


def main() -> int:
    """Write or check all pages; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file differs")
    if parser.parse_args().check:
        names = outdated()
        sys.stdout.write("".join(f"outdated: {name} (make docs)\n" for name in names))
        return 1 if names else 0
    sys.stdout.write("".join(f"wrote {name}\n" for name in write()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
