"""What a ladder says: a power law for each method, where two meet, the ratio to dense, and what a unit of cost buys.

A law is fitted on four axes (`AXES`), to the mean loss of the seeds at each size; "size" is the same x for all methods,
so that curves are compared at equal shape and tokens. A method that diverged at a size is left out there. The
perplexity ratio of a method over dense is e to the difference of their losses; a run is compared with dense's of the
same seed, which read the same text in the same order.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, TypedDict

from ..provenance import Provenance
from .power_law import (
    LARGEST_LOGARITHM,
    Estimate,
    Irreducible,
    Line,
    estimate,
    exponential,
    fit_irreducible,
    fit_line,
    scatter_of_seeds,
)
from .report import MethodResult

REFERENCE = "dense"
FURTHER = 10
"""The trend of the ratio is extrapolated to so many times the largest size."""


class Rung(TypedDict):
    """A size's part of ladder.json.

    `dense_parameters`: of the dense model, without embeddings and head. `epochs`: None for a stream.
    """

    model: dict[str, Any]
    dense_parameters: int
    steps: int
    tokens: int
    epochs: float | None
    tuning: dict[str, int]
    data: dict[str, Any]
    run: Provenance
    methods: dict[str, MethodResult]


@dataclass(frozen=True)
class Axis:
    """What a loss is set against."""

    words: str
    of: Callable[[Rung, MethodResult], float]


AXES = {
    "size": Axis("dense parameters of the size", lambda rung, row: rung["dense_parameters"]),
    "parameters": Axis("own parameters", lambda rung, row: row["parameters_without_embeddings"]),
    "flops": Axis("FLOPs of the training", lambda rung, row: row["flops_per_token"] * rung["tokens"]),
    "bytes": Axis("bytes at the peak", lambda rung, row: sum(row["peak_memory_bytes"].values())),
}
COSTS = ("parameters", "flops", "bytes")
"""The axes on which a method's own cost stands."""


class Law(TypedDict):
    """L = a x^-b; `dof` degrees of freedom are behind the intervals."""

    a: Estimate
    b: Estimate
    dof: int


class Crossing(TypedDict):
    """Where the laws of two methods meet. `at` is None where they do not between the measured x.

    `ahead`: the method with the lower fitted loss at the smallest and at the largest x that both have.
    """

    methods: tuple[str, str]
    axis: str
    at: Estimate | None
    ahead: tuple[str, str]


class RatioAtSize(TypedDict):
    """Perplexity over dense's, and since which tokens a parameter the method is on the side of dense where it ends."""

    ratio: Estimate
    since: float | None
    """By the curves of the runs; None where it was on that side at every point."""


class Ratio(TypedDict):
    """Perplexity over dense's: at each size, on average, the factor of a doubling, and where the trend leads to."""

    sizes: dict[str, RatioAtSize]
    mean: Estimate | None
    doubling: Estimate | None
    extrapolated: Estimate | None
    extrapolated_to: float | None
    """Dense parameters: `FURTHER` times the largest size measured."""


class Bought(TypedDict):
    """How many units of dense a unit of the method replaces at its loss, by dense's law."""

    times: Estimate
    is_extrapolated: bool
    """Dense was not measured on both sides of that loss."""


class Findings(TypedDict):
    """What is fitted. Axes are those of `AXES`."""

    laws: dict[str, dict[str, Law]]
    """Axis -> method -> law."""
    irreducible: dict[str, Irreducible]
    """Method -> law with an irreducible loss against size, from five sizes on."""
    crossings: list[Crossing]
    ratios: dict[str, Ratio]
    """Method -> perplexity over dense's."""
    bought: dict[str, dict[str, dict[str, Bought]]]
    """Method -> axis of cost -> size, or "all sizes" (their geometric mean) -> what a unit buys."""


class Ladder(TypedDict):
    """What ladder.json holds."""

    what: str
    recipe: dict[str, Any]
    options: dict[str, Any]
    run: Provenance
    sizes: dict[str, Rung]
    findings: Findings


def findings_of(rungs: Mapping[str, Rung]) -> Findings:
    """Everything that can be fitted to the sizes that are there."""
    methods = list(dict.fromkeys(name for rung in rungs.values() for name in rung["methods"]))
    points = {(axis, method): _points(rungs, axis, method) for axis in AXES for method in methods}
    lines = {key: line for key, (x, y) in points.items() if (line := fit_line(x, y)) is not None}
    others = [method for method in methods if method != REFERENCE]
    irreducible = {}
    for method in methods:
        x, y = points["size", method]
        if (law := fit_irreducible([*map(math.exp, x)], [math.exp(statistics.mean(group)) for group in y])) is not None:
            irreducible[method] = law
    return {
        "laws": {
            axis: {method: _law(lines[axis, method]) for method in methods if (axis, method) in lines} for axis in AXES
        },
        "irreducible": irreducible,
        "crossings": [
            found
            for axis in ("size", "flops")
            for pair in combinations(methods, 2)
            if (found := _crossing(rungs, axis, pair, lines)) is not None
        ],
        "ratios": {method: _ratio(rungs, method) for method in others if _common(rungs, method, REFERENCE)},
        "bought": {
            method: {
                axis: _bought(rungs, axis, method, lines[axis, method], lines[axis, REFERENCE])
                for axis in COSTS
                if (axis, method) in lines and (axis, REFERENCE) in lines
            }
            for method in others
        },
    }


def _losses(rung: Rung, method: str) -> list[float] | None:
    """Of the seeds; None where the method is not there or a run diverged."""
    losses = rung["methods"][method]["losses"] if method in rung["methods"] else [None]
    return None if None in losses else losses  # type: ignore[return-value]


def _common(rungs: Mapping[str, Rung], *methods: str) -> dict[str, tuple[Rung, list[list[float]]]]:
    """Size -> (the rung, the losses of each method), where all of them have some."""
    found = {name: (rung, [_losses(rung, method) for method in methods]) for name, rung in rungs.items()}
    return {name: (rung, losses) for name, (rung, losses) in found.items() if None not in losses}  # type: ignore[misc]


def _points(rungs: Mapping[str, Rung], axis: str, method: str) -> tuple[list[float], list[list[float]]]:
    """Logarithms of the axis and of the losses."""
    there = _common(rungs, method)
    x = [math.log(AXES[axis].of(rung, rung["methods"][method])) for rung, _ in there.values()]
    return x, [[*map(math.log, losses)] for _, (losses,) in there.values()]


def _law(line: Line) -> Law:
    slope = line.slope_estimate()
    low, high = (None if end is None else -end for end in (slope["high"], slope["low"]))
    return {
        "a": exponential(line.at(0.0)),
        "b": {"value": -slope["value"], "low": low, "high": high},
        "dof": line.scatter.dof,
    }


def _crossing(
    rungs: Mapping[str, Rung], axis: str, pair: tuple[str, str], lines: Mapping[tuple[str, str], Line]
) -> Crossing | None:
    """None where the two share no x to compare them at."""
    if any((axis, method) not in lines for method in pair):
        return None
    if axis == "size":  # the same x: scatter that both share falls out
        there = _common(rungs, *pair)
        x = [math.log(rung["dense_parameters"]) for rung, _ in there.values()]
        difference = fit_line(x, [_differences(*map(_logarithms, losses)) for _, losses in there.values()])
    else:
        difference = lines[axis, pair[0]].minus(lines[axis, pair[1]])
    if difference is None or difference.low >= difference.high:
        return None
    ends = [difference.at(x)["value"] for x in (difference.low, difference.high)]
    at = difference.zero()
    is_within = at is not None and difference.low <= at["value"] <= difference.high
    first, last = (pair[0] if end < 0 else pair[1] for end in ends)
    return {
        "methods": pair,
        "axis": axis,
        "at": exponential(at) if at is not None and is_within else None,
        "ahead": (first, last),
    }


def _logarithms(losses: Sequence[float]) -> list[float]:
    return [*map(math.log, losses)]


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Seed by seed."""
    return [one - other for one, other in zip(ours, theirs, strict=False)]


def _ratio(rungs: Mapping[str, Rung], method: str) -> Ratio:
    there = _common(rungs, method, REFERENCE)
    differences = {name: _differences(*losses) for name, (_, losses) in there.items()}
    scatter = scatter_of_seeds([*differences.values()])
    sizes: dict[str, RatioAtSize] = {}
    for name, values in differences.items():
        error = math.sqrt(scatter.variance / len(values))
        ratio = exponential(estimate(statistics.mean(values), error, scatter.dof))
        sizes[name] = {"ratio": ratio, "since": _since(rungs[name], method)}
    counts = [rung["dense_parameters"] for rung, _ in there.values()]
    line = fit_line([math.log2(count) for count in counts], [*differences.values()])
    further = FURTHER * max(counts)
    is_certain = line is not None and line.scatter.dof > 0  # no extrapolation without an interval
    return {
        "sizes": sizes,
        "mean": exponential(line.at(line.centre)) if line else None,
        "doubling": exponential(line.slope_estimate()) if line else None,
        "extrapolated": exponential(line.at(math.log2(further), new=True)) if line and is_certain else None,
        "extrapolated_to": further if is_certain else None,
    }


def _since(rung: Rung, method: str) -> float | None:
    """Tokens a dense parameter at which the means of the curves of the method and of dense crossed last."""
    ours, theirs = (
        [
            (points[0]["tokens"], statistics.mean(point["loss"] for point in points))
            for points in zip(*curves, strict=False)
        ]
        for curves in (rung["methods"][name]["curves"] for name in (method, REFERENCE))
    )
    gaps = [(tokens, loss - other) for (tokens, loss), (_, other) in zip(ours, theirs, strict=False)]
    changes = [
        earlier + (later - earlier) * before / (before - after)
        for (earlier, before), (later, after) in pairwise(gaps)
        if (before < 0) != (after < 0)
    ]
    return changes[-1] / rung["dense_parameters"] if changes else None


def _bought(rungs: Mapping[str, Rung], axis: str, method: str, ours: Line, dense: Line) -> dict[str, Bought]:
    """x of dense at the method's loss over its own x, at each size and in the middle of the ladder."""
    x, y = _points(rungs, axis, method)
    names = [*_common(rungs, method), "all sizes"]
    places = [
        (at, statistics.mean(values), 1.0 if len(x) > 2 else 1 / len(values)) for at, values in zip(x, y, strict=True)
    ]
    places.append((ours.centre, ours.mean, ours.of_mean))
    found: dict[str, Bought] = {}
    for name, (own, loss, share) in zip(names, places, strict=True):
        equal = dense.minus_value(loss, ours.scatter, share).zero()
        if equal is None or abs(equal["value"] - own) > LARGEST_LOGARITHM:  # dense's law is level
            continue
        low, high = (None if end is None else end - own for end in (equal["low"], equal["high"]))
        found[name] = {
            "times": exponential({"value": equal["value"] - own, "low": low, "high": high}),
            "is_extrapolated": not dense.low <= equal["value"] <= dense.high,
        }
    return found
