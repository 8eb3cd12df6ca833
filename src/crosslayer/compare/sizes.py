"""Sizes of a ladder: the recipe's shape made smaller or larger in its own proportions, and steps from a budget.

| field | at HIDDENxLAYERS |
|---|---|
| hidden_size, num_hidden_layers | HIDDEN, LAYERS |
| num_attention_heads, num_key_value_heads | their share of hidden_size: the width of a head stays |
| intermediate_size | its share of hidden_size, to the nearest multiple of 4 |
| rank, first_layer_rank, where the recipe has them | their share of hidden_size |
| everything else | the recipe's |

A hidden size for which heads or rank would not be whole is refused.
"""

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..accounting import count_parameters, dense_counterpart
from ..errors import ConfigError
from ..ranges import ABOVE_0, out_of_range
from ..train.recipe import Recipe, build_recipe
from ..train.run import build_arguments, build_model_config, rows_per_step
from .options import Options

MULTIPLE = 4  # of intermediate_size


@dataclass(frozen=True)
class Size:
    """Width and depth."""

    hidden_size: int
    num_hidden_layers: int

    def __str__(self) -> str:
        return f"{self.hidden_size}x{self.num_hidden_layers}"


@dataclass(kw_only=True)
class LadderOptions:
    """How a ladder is made. Raises ConfigError."""

    sizes: tuple[Size, ...]
    """At least two, all different."""

    tokens_per_parameter: float
    """Tokens of a final run, for each parameter of the dense model of the size without embeddings and head."""

    comparisons: tuple[Options, ...]
    """How the comparison at each size is made; the methods are the same."""

    def __post_init__(self) -> None:
        problems = list(out_of_range({"tokens_per_parameter": self.tokens_per_parameter}, RANGES))
        if len(set(self.sizes)) < max(2, len(self.sizes)):
            problems.append(f"sizes={','.join(map(str, self.sizes))!r} must be two or more, each given once")
        if len(self.comparisons) != len(self.sizes):
            problems.append(f"{len(self.comparisons)} comparisons are given for {len(self.sizes)} sizes; give as many")
        if len({options.methods for options in self.comparisons}) > 1:
            problems.append("the methods differ from size to size; give the same")
        if problems:
            raise ConfigError("; ".join(problems))


RANGES = {"tokens_per_parameter": ABOVE_0}


def parse_sizes(text: str) -> tuple[Size, ...]:
    """64x6,96x9 -> sizes. Raises ConfigError."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d{0,6})[xX]([1-9]\d{0,6})\s*", part, re.ASCII)
        if match is None:
            raise ConfigError(f"sizes: {part.strip()!r} is not HIDDENxLAYERS; write 64x6,96x9,128x13")
        found.append(Size(int(match[1]), int(match[2])))
    return tuple(found)


def for_each(name: str, numbers: Sequence[int], sizes: Sequence[Size]) -> list[int]:
    """One number for all sizes, or one for each; without sizes one. Raises ConfigError for any other count."""
    wanted = max(1, len(sizes))
    if len(numbers) not in (1, wanted):
        shown, allowed = ",".join(map(str, numbers)), f"one or {wanted}" if sizes else "one, or --sizes"
        raise ConfigError(f"{name}={shown!r} are {len(numbers)} numbers for {len(sizes)} sizes; give {allowed}")
    return list(numbers) * (wanted // len(numbers))


def recipe_of_size(base: Recipe, size: Size) -> Recipe:
    """The base recipe at another size, by the table above. Raises ConfigError."""
    if "base" in base.model or base.model.get("rank_pattern"):
        name = "base" if "base" in base.model else "rank_pattern"
        raise ConfigError(f"sizes: model.{name} of the recipe belongs to one shape; give a recipe without it")
    config = build_model_config(base)
    width = config.hidden_size
    names = ["num_attention_heads", "num_key_value_heads"]
    names += [name for name in ("rank", "first_layer_rank") if base.model.get(name) is not None]
    shares = {name: Fraction(getattr(config, name), width) for name in names}
    step = math.lcm(*(share.denominator for share in shares.values()))
    if size.hidden_size % step:
        below = size.hidden_size // step * step
        near = " or ".join(f"{hidden}x{size.num_hidden_layers}" for hidden in (below, below + step) if hidden)
        raise ConfigError(
            f"sizes: hidden {size.hidden_size} of {size} is no multiple of {step}, with which the recipe's heads and "
            f"rank keep their share of it; give {near}"
        )
    content = base.to_dict()
    intermediate = Fraction(config.intermediate_size, width) * size.hidden_size
    content["model"] |= {
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_hidden_layers,
        "intermediate_size": max(MULTIPLE, round(intermediate / MULTIPLE) * MULTIPLE),
        **{name: int(share * size.hidden_size) for name, share in shares.items()},
    }
    return build_recipe(content, ran=True)


def dense_parameters(recipe: Recipe) -> int:
    """Parameters of the dense model of this shape, without embeddings and head."""
    counts = count_parameters(dense_counterpart(build_model_config(recipe)))
    return sum(counts.values()) - counts["embeddings"] - counts["head"]


def tokens_per_step(recipe: Recipe) -> int:
    """That one optimizer step reads."""
    with tempfile.TemporaryDirectory() as unused:
        return rows_per_step(recipe, build_arguments(recipe, Path(unused))) * recipe.data.block_size


def with_budget(recipe: Recipe, tokens_per_parameter: float) -> Recipe:
    """The recipe with as many steps as make so many tokens a parameter of the dense model, to the nearest step.

    Warm-up, logging, evaluation and checkpoints keep their share of the recipe's steps, the last two in multiples of
    logging. Raises ConfigError.
    """
    tokens = tokens_per_step(recipe)
    steps = round(tokens_per_parameter * dense_parameters(recipe) / tokens)
    if steps < 1:
        raise ConfigError(
            f"tokens_per_parameter={tokens_per_parameter:g} is less than half a step of {tokens} tokens; give more, or "
            "lower per_device_train_batch_size"
        )
    content = recipe.to_dict()
    content["training"] |= {**_shares_kept(content["training"], steps), "max_steps": steps}
    return build_recipe(content, ran=True)


def _shares_kept(training: Mapping[str, Any], steps: int) -> dict[str, int]:
    """Warm-up and intervals that are numbers of steps, for another number of steps."""
    before = training.get("max_steps", -1)
    counts = {
        name: training[name]
        for name in ("warmup_steps", "logging_steps", "eval_steps", "save_steps")
        if (training.get(name) or 0) >= 1  # below it is a share
    }
    if counts and before < 1:
        name, value = next(iter(counts.items()))
        raise ConfigError(f"training.{name}={value:g} is a share of no max_steps; give a share such as 0.1")
    scaled = {name: round(value * steps / before) for name, value in counts.items()}
    interval = scaled["logging_steps"] = max(1, scaled.get("logging_steps", 1))
    for name in ("eval_steps", "save_steps"):
        if name in scaled:
            scaled[name] = max(1, round(scaled[name] / interval)) * interval
    return {name: value for name, value in scaled.items() if name in counts}
