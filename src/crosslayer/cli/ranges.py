"""What the options of all verbs may be: one table, looked at before a verb does anything.

A name means the same in every verb. Every number is here (a test looks); texts that are not have to hold something.
"""

import functools
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError
from ..ranges import (
    ABOVE_0,
    COUNT,
    COUNT_OR_0,
    COUNT_OR_SHARE,
    LENGTH,
    MASS,
    NAME,
    PART,
    SEED,
    SHARE,
    SIZE,
    Range,
    out_of_range,
    where,
)


def _list_of(*names: str) -> Range:
    return Range(
        f"some of {', '.join(names)}, with commas", lambda value: {*map(str.strip, value.split(","))} <= {*names}
    )


def _names(value: Any) -> bool:
    return all(part.strip() for part in value.split(","))


def _each(kind: Range) -> Range:
    """Numbers of a kind, with commas."""

    def holds(value: Any) -> bool:
        parts = [part.strip() for part in value.split(",")]
        return all(part.isascii() and part.isdigit() and len(part) < 20 and kind.holds(int(part)) for part in parts)

    return Range(f"{kind.words}, or one for each size, with commas", holds)


OPTIONS: dict[str, Range] = {
    # what is read
    **dict.fromkeys(("max_documents", "max_tokens"), COUNT),
    "validation_fraction": PART,
    # models and steps
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "rank",
            "rank_multiple",
            "batch_size",
            "sequence",
            "decode_batch",
            "new_tokens",
            "gpus",
            "gpus_per_node",
            "tensor_parallel",
            "fsdp",
            "micro_batch",
            "workers",
        ),
        SIZE,
    ),
    "block_size": LENGTH,
    **dict.fromkeys(("step", "recompute_interval", "resume_from", "turns", "validation_blocks"), COUNT),
    **dict.fromkeys(("warm_up", "top_k"), COUNT_OR_0),
    "seeds": _each(COUNT),
    "tuning_runs": _each(COUNT_OR_0),
    "tuning_steps": COUNT_OR_SHARE,
    "tokens_per_parameter": ABOVE_0,
    **dict.fromkeys(("methods", "positions"), Range("names with commas between them", _names)),
    "parts": _list_of("training", "generation", "memory"),
    "dtypes": _list_of("float32", "tf32", "bfloat16"),
    "utilisation": MASS,
    "reserve": SHARE,
    # text that is made
    "prompt": Range("text, or a number of tokens", lambda value: isinstance(value, str) or SIZE.holds(value)),
    "max_new_tokens": COUNT,
    "temperature": where("0 (the likeliest token) or a number of at least 0.001", lambda x: x == 0 or x >= 0.001),
    "top_p": MASS,
    "seed": SEED,
}
"""Name of an option or argument -> what it may be."""


def checked(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that raises ConfigError with every option outside its range, before it does anything."""

    @functools.wraps(verb)
    def call(**given: Any) -> None:
        texts = {name: NAME for name, value in given.items() if isinstance(value, str)}
        problems = list(out_of_range(given, texts | OPTIONS))
        if problems:
            raise ConfigError("; ".join(problems))
        verb(**given)

    return call
