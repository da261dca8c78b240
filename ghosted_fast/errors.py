"""The errors this library raises on its own account.

Each is also a built-in error of the kind a caller would expect (`ValueError`, `RuntimeError`), so
code that catches those keeps working. Wrong argument types raise `TypeError`, as torch does.
"""

from __future__ import annotations


class GhostedFastError(Exception):
    """The base of every error below; catch it to catch them all."""


class ArgumentError(GhostedFastError, ValueError):
    """An argument has a value that cannot be used: the message says which would do."""


class CalibrationError(GhostedFastError, ValueError):
    """The calibration data cannot determine a ghost (too few tokens, empty text)."""


class NonFiniteError(GhostedFastError, ValueError):
    """Activations hold NaN or infinity. The statistics are as they were before the batch."""


class UnknownFamilyError(GhostedFastError, ValueError):
    """The family is not in the table, and its layers could not be found by structure."""


class UnsupportedModelError(GhostedFastError, ValueError):
    """The family is known, but this configuration of it cannot lose layers."""


class CheckpointError(GhostedFastError, ValueError):
    """A saved model is damaged, incomplete, or of a format this version does not read."""


class BackendError(GhostedFastError, RuntimeError):
    """A backend was named that cannot run here; the message holds the reason."""


class SolveError(GhostedFastError, ValueError):
    """The normal equations could not be solved, even with the largest damping."""


class SourceError(GhostedFastError, ValueError):
    """A model or a text was named that cannot be read."""


class BudgetError(GhostedFastError, ValueError):
    """A bound on quality or speed cannot be kept; the message holds the best that was reached."""


class VersionError(GhostedFastError, ImportError):
    """A package is too old or too new; the message holds the command that installs another."""


class MissingExtraError(GhostedFastError, ImportError):
    """An optional package is needed; the message holds the command that installs it."""


class RankError(GhostedFastError, RuntimeError):
    """Another process of the group that shares the work has failed; the message says why."""


class RanksLostError(RankError):
    """Another process of the group has ended without a word, or does not answer in time."""
