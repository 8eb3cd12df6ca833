"""The search for a method's learning rates, one rate for each kind of parameter.

One rate for all handicaps each method by another amount (docs/crnet.md).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from .options import Options
from .recipes import start_rates
from .runs import Job, run_once


class Tried(TypedDict):
    """A run of the search. A loss of None: it diverged."""

    rates: dict[str, float]
    loss: float | None


class Tuning(TypedDict):
    """What a search found."""

    rates: dict[str, float]
    """The best ones."""
    inside: dict[str, bool]
    """Whether each has a worse neighbour on both sides."""
    tried: list[Tried]


def tune(make: Callable[..., Job], folder: Path, options: Options, start_at: dict[str, float] | None = None) -> Tuning:
    """The search for one method; `make` makes a run of it with given rates. It starts at the recipe's, or at these."""
    if start_at is None:
        start = make(rates={})
        start_at = start_rates(start.method, start.recipe)
    if options.tuning_runs == 0:
        return {"rates": start_at, "inside": {}, "tried": []}

    def loss(rates: dict[str, float]) -> float:
        found = run_once(make(rates=rates), folder)["loss"]
        return math.inf if found is None else found

    rates, tried = search_rates(start_at, loss, options.tuning_runs)
    return {
        "rates": rates,
        "inside": has_worse_neighbours(rates, tried),
        "tried": [
            {"rates": dict(zip(rates, key, strict=True)), "loss": None if value == math.inf else value}
            for key, value in tried.items()
        ],
    }


def search_rates(
    start: dict[str, float], loss: Callable[[dict[str, float]], float], limit: int
) -> tuple[dict[str, float], dict[tuple[float, ...], float]]:
    """Coordinate search over factors of two, in the order of `start`, until a whole round changes nothing.

    Returns the best rates and the loss of everything tried; ends early after `limit` tries.
    """
    rates = dict(start)
    tried: dict[tuple[float, ...], float] = {}

    def at(candidate: dict[str, float]) -> float:
        key = tuple(candidate.values())
        if key not in tried:
            if len(tried) >= limit:
                return math.inf
            tried[key] = loss(candidate)
        return tried[key]

    at(rates)
    changed = True
    while changed:
        changed = False
        for kind in start:
            for factor in (0.5, 2.0):
                while at(neighbour := {**rates, kind: rates[kind] * factor}) < at(rates):
                    rates, changed = neighbour, True
    return rates, tried


def has_worse_neighbours(rates: dict[str, float], tried: dict[tuple[float, ...], float]) -> dict[str, bool]:
    """Whether each rate was tried at half and at twice its value, and was no better there."""
    best = tried[tuple(rates.values())]

    def worse(kind: str, factor: float) -> bool:
        return tried.get(tuple({**rates, kind: rates[kind] * factor}.values()), -math.inf) >= best

    return {kind: worse(kind, 0.5) and worse(kind, 2.0) for kind in rates}
