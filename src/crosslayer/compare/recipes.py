"""The recipe of each method of a comparison: the base recipe, changed as little as the method asks."""

import re
from typing import Any

from ..accounting import count_parameters
from ..train.recipe import Recipe, build_recipe
from ..train.run import build_model_config
from .options import contender_of

FACTORS = {"embedding": "embedding_lr_factor", "low_rank": "low_rank_lr_factor", "full_rank": "full_rank_lr_factor"}
"""Which factor of ParameterGroups a tuned rate stands for."""


def recipe_of(method: str, base: Recipe) -> dict[str, Any]:
    """The base recipe as a mapping, changed to this method. Raises ConfigError."""
    contender = contender_of(method)
    content = base.to_dict()
    content["model"] = {**content["model"], **contender.model}
    if contender.equal_parameters:
        content["model"].pop("rank_pattern", None)
        content["model"]["rank"] = equal_rank(base, contender.model["factorization"])
    training = content["training"]
    if contender.optim not in (None, training.get("optim")):
        training = {
            name: value for name, value in training.items() if name not in ("optim_args", "optim_target_modules")
        }
        content["training"] = {**training, "optim": contender.optim}
    if contender.package is not None:  # of projections
        rank = content["model"].get("rank") or build_model_config(base).hidden_size // 4
        content["training"] |= {
            "optim_args": f"rank={rank}, update_proj_gap=200, scale={0.25 if method == 'galore' else 1.0}",
            "optim_target_modules": rf".*\.({'|'.join(map(re.escape, _modules(base)))})",
        }
    return content


def _modules(base: Recipe) -> list[str]:
    """Where the positions of the base's blocks lie, "self_attn.q_proj" and so on."""
    config = build_model_config(base)
    places = (place for layer in range(config.num_hidden_layers) for place in config.positions(layer).values())
    return list(dict.fromkeys(place.module for place in places))


def equal_rank(base: Recipe, factorization: str) -> int:
    """The rank with which this factorization comes closest to CR-Net's parameters, embeddings and head aside."""

    def body(**changes: Any) -> int:
        content = base.to_dict()
        content["model"] = {**content["model"], **changes}
        counts = count_parameters(build_model_config(build_recipe(content, ran=True)))
        return sum(counts.values()) - counts["embeddings"] - counts["head"]

    wanted = body(factorization="cross_layer")
    at = {rank: body(factorization=factorization, rank=rank, rank_pattern={}) for rank in (1, 2)}
    slope = at[2] - at[1]  # parameters are linear in the rank
    return max(1, round(1 + (wanted - at[1]) / slope))


def start_rates(method: str, recipe: dict[str, Any]) -> dict[str, float]:
    """Where the search starts: the recipe's own rates."""
    rate = float(recipe["training"].get("learning_rate", 5e-5))
    return {kind: rate * recipe["parameter_groups"][FACTORS[kind]] for kind in contender_of(method).rates}
