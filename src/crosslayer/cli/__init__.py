"""The command line: one module per verb. Heavy imports wait until a verb runs."""

from .app import main

__all__ = ["main"]
