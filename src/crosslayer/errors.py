"""Errors raised on purpose by crosslayer.

Each one is also a built-in error, so callers may catch either. A message says what was given, what is allowed
and what to change; the command line prints it on one line, without a traceback.
"""

from collections.abc import Iterable


class CrossLayerError(Exception):
    """Base of every error that crosslayer raises on purpose."""


class ConfigError(CrossLayerError, ValueError):
    """A recipe, an option or a model configuration asks for something that cannot be done."""


class DataError(CrossLayerError, ValueError):
    """A data source is missing, empty, unreadable or too small."""


class CheckpointError(CrossLayerError, RuntimeError):
    """A checkpoint or an output folder is missing, truncated, not ours, or holds another run."""


class TrainingError(CrossLayerError, RuntimeError):
    """A run had to stop: the loss is no longer finite, or its results could not be written."""


class RunInterruptedError(TrainingError):
    """A run was interrupted from the keyboard."""


class RunStoppedError(TrainingError):
    """A run was asked to end before its last step, by a signal or `max_hours`; its checkpoint is saved."""


def nearest(value: str, allowed: Iterable[str]) -> str | None:
    """The one of `allowed` that `value` was probably meant to be; None where none is near."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(value, list(allowed), n=1, cutoff=0.5)), None)


def nearest_hint(value: str, allowed: Iterable[str]) -> str:
    """The end of a message about a wrong name: "; the nearest is NAME", or nothing."""
    near = nearest(value, allowed)
    return "" if near is None else f"; the nearest is {near}"


def first_line(error: BaseException) -> str:
    """What a library's error says, on one line: its first that is not empty, or the error's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
