"""The names of all methods, each spelled one way everywhere, and what people call them.

What a method means stands with those who use it, in tables by these names: what it costs (accounting/methods.py), how
LoR2C is set up for it (lor2c/methods.py), how it is attached to a model (train/methods.py), how it is compared
(compare/options.py) and measured (bench/contenders.py).
"""

import warnings
from collections.abc import Iterable

from .errors import ConfigError, nearest_hint

PRETRAINING = {
    "llama": "transformers Llama",
    "dense": "dense",
    "dense_checkpointing": "dense + checkpointing",
    "crnet": "CR-Net",
    "crnet_invert": "CR-Net, invert",
    "crnet_replay": "CR-Net, replay",
    "crnet_reversible": "CR-Net, reversible",
    "crnet_silu": "CR-Net, silu in the increment",
    "cola": "CoLA",
    "cola_checkpointing": "CoLA + checkpointing",
    "cola_m": "CoLA-M",
    "cola_invert": "CoLA, invert",
    "low_rank": "plain low rank",
    "relora": "ReLoRA",
    "sltrain": "SLTrain",
    "adamw_8bit": "dense, 8-bit AdamW",
    "galore": "dense, GaLore",
    "galore_8bit": "dense, 8-bit GaLore",
    "apollo": "dense, APOLLO",
    "apollo_mini": "dense, APOLLO-Mini",
}
FINETUNING = {
    "lor2c": "LoR2C",
    "sharelor2c": "ShareLoR2C",
    "mergelor2c": "MergeLoR2C",
    "injectlor2c": "InjectLoR2C",
    "imlor2c": "IMLoR2C",
    "lora": "LoRA",
    "full": "all weights",
    "head": "the head alone",
}
METHODS = {**PRETRAINING, **FINETUNING}
"""Name -> what it is called in tables."""

MATRIX_OPTIMIZERS = {"muon": "Muon", "spectron": "Spectron"}
"""Optimizers of matrices by their whole, beside AdamW for the rest: name -> what it is called in tables."""

RENAMED = {
    "crnet_low_rank": "crnet_invert",
    "dense_checkpointed": "dense_checkpointing",
    "cola_checkpointed": "cola_checkpointing",
    "plain_low_rank": "low_rank",
    "share_lor2c": "sharelor2c",
    "merge_lor2c": "mergelor2c",
    "inject_lor2c": "injectlor2c",
    "im_lor2c": "imlor2c",
}
"""Spellings of 0.1 -> the present ones."""


def current_method(name: str) -> str:
    """The name of a method; a spelling of 0.1 is taken with a warning."""
    if name in RENAMED:
        message = f"method {name!r} is called {RENAMED[name]!r} now; the old name goes in the next release."
        warnings.warn(message, FutureWarning, stacklevel=2)
    return RENAMED.get(name, name)


def method_problem(name: str, allowed: Iterable[str]) -> str | None:
    """What is wrong with a method's name, in words; None where it is one of `allowed`."""
    allowed = list(allowed)
    if name in allowed:
        return None
    return f"method={name!r} is none of {', '.join(allowed)}{nearest_hint(name, allowed)}"


def check_method(name: str, allowed: Iterable[str]) -> str:
    """The present name of a method. Raises ConfigError for one that is not among `allowed`, with the nearest."""
    name = current_method(name)
    problem = method_problem(name, allowed)
    if problem is not None:
        raise ConfigError(problem)
    return name


__all__ = [
    "FINETUNING",
    "MATRIX_OPTIMIZERS",
    "METHODS",
    "PRETRAINING",
    "RENAMED",
    "check_method",
    "current_method",
    "method_problem",
]
