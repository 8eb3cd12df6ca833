"""From spectra and a number of parameters to a `rank_pattern`.

The increment of linear i with rank r leaves the error e_i(r)^2 = sum over k > r of sigma_ik^2 / |Y_i|_F^2 and costs
r (in + out) parameters. Ranks are raised, a step at a time, where a step removes the most error per parameter; the
squares fall with k, so that this greedy rule is the best choice for the sum of the errors. (Our choice: the paper,
arXiv 2509.18993, leaves choosing ranks open.)
"""

import heapq
import re
from dataclasses import dataclass
from typing import Any

import torch

from ..crnet.positions import Position
from ..errors import ConfigError
from .spectra import LinearSpectra, Spectra


@dataclass
class SuggestedRanks:
    """`ranks[layer, position]`, the `rank_pattern` that says the same, and what it costs."""

    ranks: dict[tuple[int, str], int]
    rank_pattern: dict[str, int]
    parameters: int
    budget: int
    multiple: int
    basis: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        ranks = {f"layers.{layer}.{position}": rank for (layer, position), rank in self.ranks.items()}
        return {
            "rank_pattern": self.rank_pattern,
            "parameters": self.parameters,
            "budget": self.budget,
            "multiple": self.multiple,
            "basis": self.basis,
            "ranks": ranks,
        }


def suggest_ranks(spectra: Spectra, budget: int | None = None, multiple: int | None = None) -> SuggestedRanks:
    """Ranks for the increments of the second layer on.

    Args:
        budget: parameters of all A and B together, in_features and out_features times the rank each. None: what the
            model has if it is a CR-Net, else what the default ranks take.
        multiple: ranks are multiples of it. None: 8, less for models narrower than 256.

    The singular values are those of Y_l - b Y_{l-1} with a CR-Net's own b, of Y_l - b0 Y_{l-1} in other models. A
    CR-Net of rank r has r of them; beyond, the power law through the upper half of them stands for what it could not
    show.
    No rank is raised to in out / (in + out), where a full matrix is no dearer. Raises ConfigError for a budget that
    does not buy the smallest rank everywhere, and says which one does, and for a multiple that saves nothing somewhere.
    """
    linears = [linear for linear in spectra.linears if "least_squares" in linear.squares]
    learned = all("learned" in linear.squares for linear in linears)
    kind = "learned" if learned else "least_squares"
    smallest = min(linears, key=largest_rank)
    multiple = multiple or max(1, min(8, spectra.quarter // 8, largest_rank(smallest)))
    if multiple > largest_rank(smallest):
        raise ConfigError(
            f"rank_multiple={multiple} saves nothing in layers.{smallest.layer}.{smallest.position}, "
            f"{smallest.in_features} x {smallest.width}: give at most {largest_rank(smallest)}"
        )
    cost = {key(x): x.in_features + x.width for x in linears}
    if budget is None:
        budget = sum(((x.rank if learned else None) or default_rank(x, spectra)) * cost[key(x)] for x in linears)
    ranks = {key(x): multiple for x in linears}
    spent = sum(multiple * cost[name] for name in ranks)
    if budget < spent:
        raise ConfigError(
            f"a budget of {budget} parameters is too small: rank {multiple} in all {len(linears)} linears from the "
            f"second layer on takes {spent}; give at least that, or a smaller rank_multiple"
        )
    gains = {key(x): _gains(x, kind, multiple) for x in linears}

    def gain(name: tuple[int, str]) -> float:
        return float(gains[name][ranks[name] // multiple]) / cost[name]

    waiting = [(-gain(name), name) for name in ranks if len(gains[name]) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        if spent + multiple * cost[name] > budget:
            continue  # a cheaper one may still fit
        ranks[name] += multiple
        spent += multiple * cost[name]
        if ranks[name] // multiple < len(gains[name]):
            heapq.heappush(waiting, (-gain(name), name))
    return SuggestedRanks(ranks, as_pattern(ranks), spent, budget, multiple, kind)


def key(linear: LinearSpectra) -> tuple[int, str]:
    """Layer and position, which the ranks are kept by."""
    return linear.layer, linear.position


def largest_rank(linear: LinearSpectra) -> int:
    """The largest rank at which factors have fewer parameters than the matrix."""
    return Position("", linear.in_features, linear.width).largest_rank


def default_rank(linear: LinearSpectra, spectra: Spectra) -> int:
    """What CRNetConfig takes for it: a quarter of the width, less in narrow matrices."""
    return Position("", linear.in_features, linear.width).default_rank(4 * spectra.quarter)


def _gains(linear: LinearSpectra, kind: str, multiple: int) -> torch.Tensor:
    """Relative squared error that each step of `multiple` ranks removes, first step first."""
    steps = max(1, largest_rank(linear) // multiple)
    squares = linear.squares[kind].clone()
    if kind == "learned" and linear.rank is not None:
        squares = continue_power_law(squares, linear.rank)
    squares = torch.nn.functional.pad(squares, (0, max(0, steps * multiple - len(squares))))
    return squares[: steps * multiple].view(steps, multiple).sum(1) / max(linear.energy, 1e-300)


def continue_power_law(squares: torch.Tensor, rank: int) -> torch.Tensor:
    """squares[k] from k = rank on, replaced by C (k + 1)^-a fitted to the upper half of the first `rank`."""
    known = squares[rank // 2 : rank]
    if len(known) < 2 or not known[-1] > 0:
        return squares
    x = torch.log(torch.arange(rank // 2, rank, dtype=torch.float64) + 1)
    y = known.log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    beyond = torch.log(torch.arange(rank, len(squares), dtype=torch.float64) + 1)
    continued = torch.exp(known[-1].log() + slope.clamp_max(0) * (beyond - x[-1]))
    return torch.cat([squares[:rank], continued])


def as_pattern(ranks: dict[tuple[int, str], int]) -> dict[str, int]:
    r"""{regex over "layers.N.position": rank}, one key per position and rank: "layers\.(1|4)\.q"."""
    layers: dict[tuple[str, int], list[int]] = {}
    for (layer, position), rank in ranks.items():
        layers.setdefault((position, rank), []).append(layer)
    return {
        rf"layers\.({'|'.join(map(str, sorted(at)))})\.{re.escape(position)}": rank
        for (position, rank), at in layers.items()
    }


__all__ = ["SuggestedRanks", "as_pattern", "suggest_ranks"]
