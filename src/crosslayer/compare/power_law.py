"""Power laws through a few sizes, and how certain they are.

    L = a N^-b            a straight line in logarithms: log L = log a - b log N; least squares there
    L = E + a N^-b        with an irreducible loss E, from five sizes on; least squares of (L - fit) / L

The first is Kaplan et al. (arXiv 2001.08361), equation 1.1; the second Hoffmann et al. (arXiv 2203.15556), section 3.3,
where the number of tokens is a multiple of N and both of its terms fall alike.

All intervals are of 95 %, by Student's t. Where there are three sizes or more the scatter is that of the sizes around
the line, which holds seeds, tuning and lack of fit; with two sizes it is that of the seeds alone. Where two lines meet
the interval is Fieller's (1954): all places at which their difference may be zero.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
"""Student's t, two-sided 95 %, for 1 to 30 degrees of freedom."""

EXPONENTS = [step / 1000 for step in range(5, 3001)]
"""Where the exponent of a law with an irreducible loss is looked for."""

SIZES_FOR_IRREDUCIBLE = 5


class Estimate(TypedDict):
    """A value and its 95 % interval. An end of None: the figures set no bound there, or nothing tells the scatter."""

    value: float
    low: float | None
    high: float | None


def student_t(dof: int) -> float:
    """Half the width of a 95 % interval in standard errors; above 30 degrees by its expansion around the normal."""
    return T_95[dof - 1] if dof <= len(T_95) else 1.95996 + 2.3723 / dof + 2.8225 / dof**2


def estimate(value: float, error: float, dof: int) -> Estimate:
    """value ± t * error; without ends where there are no degrees of freedom."""
    if dof < 1:
        return {"value": value, "low": None, "high": None}
    half = student_t(dof) * error
    return {"value": value, "low": value - half, "high": value + half}


LARGEST_LOGARITHM = 700.0  # that a float has an exponential of


def exponential(found: Estimate) -> Estimate:
    """e to the power of an estimate made in logarithms; an end that no number holds is none."""
    low, high = (
        None if end is None or abs(end) > LARGEST_LOGARITHM else math.exp(end) for end in (found["low"], found["high"])
    )
    return {"value": math.exp(found["value"]), "low": low, "high": high}


@dataclass(frozen=True)
class Scatter:
    """A variance and the degrees of freedom that it rests on; 0: it is not known."""

    variance: float
    dof: int

    def pooled(self, other: "Scatter") -> "Scatter":
        """One variance for both."""
        dof = self.dof + other.dof
        total = self.dof * self.variance + other.dof * other.variance
        return Scatter(total / dof if dof else 0.0, dof)


def scatter_of_seeds(groups: Sequence[Sequence[float]]) -> Scatter:
    """The variance between runs that differ in the seed alone, over the groups together."""
    dof = sum(len(group) - 1 for group in groups)
    total = sum((value - statistics.mean(group)) ** 2 for group in groups for value in group)
    return Scatter(total / dof if dof else 0.0, dof)


@dataclass(frozen=True)
class Line:
    """y = mean + slope (x - centre).

    `of_mean`, `of_slope`, `of_both`: variances and covariance of the two, in units of the scatter's variance.
    """

    centre: float
    mean: float
    slope: float
    scatter: Scatter
    of_mean: float
    of_slope: float
    of_both: float
    low: float
    high: float
    """The x that it was fitted to."""

    def at(self, x: float, *, new: bool = False) -> Estimate:
        """The line at x. `new`: the interval is that of a further size measured there, not of the line alone."""
        u = x - self.centre
        variance = self.of_mean + 2 * u * self.of_both + u * u * self.of_slope + (1.0 if new else 0.0)
        return estimate(self.mean + self.slope * u, math.sqrt(self.scatter.variance * variance), self.scatter.dof)

    def slope_estimate(self) -> Estimate:
        """The slope and its interval."""
        return estimate(self.slope, math.sqrt(self.scatter.variance * self.of_slope), self.scatter.dof)

    def moved(self, centre: float) -> "Line":
        """The same line, said around another x."""
        u = centre - self.centre
        return replace(
            self,
            centre=centre,
            mean=self.mean + self.slope * u,
            of_mean=self.of_mean + 2 * u * self.of_both + u * u * self.of_slope,
            of_both=self.of_both + u * self.of_slope,
        )

    def minus(self, other: "Line") -> "Line":
        """The difference of two lines that were fitted apart, with their scatter pooled."""
        there = other.moved(self.centre)
        return replace(
            self,
            mean=self.mean - there.mean,
            slope=self.slope - there.slope,
            scatter=self.scatter.pooled(other.scatter),
            of_mean=self.of_mean + there.of_mean,
            of_slope=self.of_slope + there.of_slope,
            of_both=self.of_both + there.of_both,
            low=max(self.low, other.low),
            high=min(self.high, other.high),
        )

    def minus_value(self, value: float, scatter: Scatter, share: float) -> "Line":
        """The difference from a measured value, whose variance is `share` of the scatter's."""
        return replace(self, mean=self.mean - value, scatter=self.scatter.pooled(scatter), of_mean=self.of_mean + share)

    def zero(self) -> Estimate | None:
        """Where the line is zero, by Fieller's theorem; None where it is level.

        No ends where the slope cannot be told from zero: the places then reach beyond all bounds.
        """
        if self.slope == 0:
            return None
        value = self.centre - self.mean / self.slope
        if self.scatter.dof < 1:
            return {"value": value, "low": None, "high": None}
        threshold = student_t(self.scatter.dof) ** 2 * self.scatter.variance
        # a u^2 + 2 b u + c <= 0
        a = self.slope**2 - threshold * self.of_slope
        b = self.mean * self.slope - threshold * self.of_both
        c = self.mean**2 - threshold * self.of_mean
        if a <= 0:
            return {"value": value, "low": None, "high": None}
        root = math.sqrt(max(0.0, b * b - a * c))
        return {"value": value, "low": self.centre + (-b - root) / a, "high": self.centre + (-b + root) / a}


def fit_line(x: Sequence[float], y: Sequence[Sequence[float]]) -> Line | None:
    """Least squares through the mean of each group of y, every group counting alike; None below two different x.

    Args:
        x: one for each group.
        y: the values of the seeds there.
    """
    if len(set(x)) < 2:
        return None
    means = [statistics.mean(group) for group in y]
    centre, mean = statistics.mean(x), statistics.mean(means)
    squares = sum((each - centre) ** 2 for each in x)
    pulls = [(each - centre) / squares for each in x]
    slope = sum(pull * value for pull, value in zip(pulls, means, strict=True))
    if len(x) > 2:
        left = [value - mean - slope * (each - centre) for each, value in zip(x, means, strict=True)]
        scatter, shares = Scatter(sum(r * r for r in left) / (len(x) - 2), len(x) - 2), [1.0] * len(x)
    else:
        scatter, shares = scatter_of_seeds(y), [1 / len(group) for group in y]
    return Line(
        centre=centre,
        mean=mean,
        slope=slope,
        scatter=scatter,
        of_mean=sum(shares) / len(x) ** 2,
        of_slope=sum(pull**2 * share for pull, share in zip(pulls, shares, strict=True)),
        of_both=sum(pull * share for pull, share in zip(pulls, shares, strict=True)) / len(x),
        low=min(x),
        high=max(x),
    )


class Irreducible(TypedDict):
    """L = E + a N^-b: the least squares, and the ranges of b and E that fit about as well."""

    E: float
    a: float
    b: Estimate
    E_low: float | None
    E_high: float | None


def fit_irreducible(sizes: Sequence[float], losses: Sequence[float]) -> Irreducible | None:
    """Least squares of relative deviations with E >= 0; None below five sizes or where no exponent fits.

    The range of b is that of the profile: sums of squares up to 1 + t^2 / (sizes - 3) times the least; E's is what
    belongs to it. An end of None: the range reaches the end of `EXPONENTS` or E = 0.
    """
    dof = len(sizes) - 3
    if len(sizes) < SIZES_FOR_IRREDUCIBLE:
        return None
    middle = math.exp(statistics.mean(map(math.log, sizes)))
    found = []
    for b in EXPONENTS:
        z = [(size / middle) ** -b / loss for size, loss in zip(sizes, losses, strict=True)]
        w = [1 / loss for loss in losses]
        zz, zw, ww = (sum(p * q for p, q in zip(*pair, strict=True)) for pair in ((z, z), (z, w), (w, w)))
        determinant = zz * ww - zw * zw
        if determinant <= 0:
            continue
        a = (ww * sum(z) - zw * sum(w)) / determinant
        E = (zz * sum(w) - zw * sum(z)) / determinant
        if a > 0 and E >= 0:
            found.append((sum((1 - E * wi - a * zi) ** 2 for wi, zi in zip(w, z, strict=True)), b, E, a * middle**b))
    if not found:
        return None
    least, b, E, a = min(found)
    near = [each for each in found if each[0] <= least * (1 + student_t(dof) ** 2 / dof)]
    low, high = min(each[1] for each in near), max(each[1] for each in near)
    is_first, is_last = low == min(each[1] for each in found), high == EXPONENTS[-1]
    return {
        "E": E,
        "a": a,
        "b": {"value": b, "low": None if is_first else low, "high": None if is_last else high},
        "E_low": None if is_first else min(each[2] for each in near),
        "E_high": None if is_last else max(each[2] for each in near),
    }
