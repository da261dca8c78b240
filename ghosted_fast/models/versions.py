"""The versions of transformers that models can be cut and loaded with."""

from __future__ import annotations

from ghosted_fast.errors import VersionError

OLDEST, FIRST_UNKNOWN = (5, 19), (6,)
REQUIREMENT = "transformers>=5.19,<6"


def check_transformers() -> None:
    """Raise unless the installed transformers is one that this library was made for.

    Raises:
        VersionError: It is older or newer; the message holds the command that installs another.
    """
    import transformers

    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not OLDEST <= found < FIRST_UNKNOWN:
        raise VersionError(
            f"expected {REQUIREMENT} for ghosted models, got {transformers.__version__}: "
            f"pip install '{REQUIREMENT}'"
        )
