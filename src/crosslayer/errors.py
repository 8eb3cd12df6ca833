"""Errors raised on purpose by crosslayer.

Each one is also a built-in error, so callers may catch either. A message says what was given, what is allowed
and what to change; the command line prints it on one line, without a traceback.
"""


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
