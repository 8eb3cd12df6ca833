"""Power laws through a few sizes: known laws come back, intervals hold what they should, scipy agrees."""

import math
import random

import pytest

from crosslayer.compare.power_law import (
    T_95,
    Scatter,
    exponential,
    fit_irreducible,
    fit_line,
    scatter_of_seeds,
    student_t,
)

SIZES = (0.3e6, 1e6, 2.6e6, 5.8e6)
X = [math.log(size) for size in SIZES]


def line_through(values):
    """Of one value at each of `X`."""
    return fit_line(X, [[value] for value in values])


def test_quantiles_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    assert [stats.t.ppf(0.975, dof) for dof in range(1, 31)] == pytest.approx(T_95, abs=6e-5)
    for dof in (31, 60, 1000):
        assert student_t(dof) == pytest.approx(stats.t.ppf(0.975, dof), rel=1e-4)


def test_a_known_law_comes_back():
    line = line_through([math.log(9.2 * size**-0.075) for size in SIZES])
    assert line.slope == pytest.approx(-0.075)
    assert exponential(line.at(0.0))["value"] == pytest.approx(9.2)
    other = line_through([math.log(8.5 * size**-0.07) for size in SIZES])
    crossing = exponential(line.minus(other).zero())
    assert crossing["value"] == pytest.approx((9.2 / 8.5) ** (1 / 0.005))
    assert crossing["low"] == pytest.approx(crossing["high"], rel=1e-6)  # no scatter


def test_errors_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    y = [2.0, 1.7, 1.75, 1.4]
    line, theirs = line_through(y), stats.linregress(X, y)
    half = stats.t.ppf(0.975, 2)
    slope, start = line.slope_estimate(), line.at(0.0)
    assert slope["high"] - slope["value"] == pytest.approx(half * theirs.stderr, rel=1e-4)
    assert start["value"] == pytest.approx(theirs.intercept)
    assert start["value"] - start["low"] == pytest.approx(half * theirs.intercept_stderr, rel=1e-4)
    moved = line.moved(3.0)
    for one, other in ((moved.at(1.0), line.at(1.0)), (moved.slope_estimate(), slope)):
        assert one == pytest.approx(other)
    assert line.at(1.0, new=True)["high"] > line.at(1.0)["high"]


def share_covered(interval, truth, trials=500):
    """How many of the intervals that `interval(rng)` gives hold the truth."""
    rng = random.Random(5)
    return sum(found["low"] <= truth <= found["high"] for found in (interval(rng) for _ in range(trials))) / trials


def noisy(rng, law, scatter=0.004):
    return line_through([law(x) + rng.gauss(0, scatter) for x in X])


def dense(x):
    return 2.2 - 0.075 * x


COVERED = pytest.approx(0.95, abs=0.035)  # three and a half standard deviations of 500 draws


def test_intervals_of_exponents_and_of_new_sizes():
    assert share_covered(lambda rng: noisy(rng, dense).slope_estimate(), -0.075) == COVERED
    at = math.log(60e6)
    assert share_covered(lambda rng: noisy(rng, dense).at(at), dense(at)) == COVERED

    def new(rng):
        found, measured = noisy(rng, dense).at(at, new=True), rng.gauss(0, 0.004)
        return {end: found[end] - measured for end in ("low", "high")}

    assert share_covered(new, dense(at)) == COVERED


def test_intervals_of_crossings():
    """Of a paired difference, and of two lines over different x."""
    truth = math.log(1.5e6)

    def everywhere(found):
        unbounded = {"low": -math.inf, "high": math.inf}
        return unbounded if found is None or found["low"] is None else found

    paired = share_covered(lambda rng: everywhere(noisy(rng, lambda x: 0.03 * (x - truth)).zero()), truth)
    assert paired == COVERED

    def apart(rng):
        there = [x - 0.6 for x in X]
        other = fit_line(there, [[dense(x) - 0.05 * (x - truth) + rng.gauss(0, 0.004)] for x in there])
        return everywhere(noisy(rng, dense).minus(other).zero())

    assert share_covered(apart, truth) == COVERED


def test_intervals_of_the_same_loss():
    """The x at which a law reaches a loss that was measured once."""
    truth = math.log(2e6)

    def interval(rng):
        ours = noisy(rng, lambda x: dense(x) + 0.02)
        return noisy(rng, dense).minus_value(dense(truth) + rng.gauss(0, 0.004), ours.scatter, 1.0).zero()

    assert share_covered(interval, truth) == COVERED


def test_a_slope_that_may_be_zero_bounds_no_crossing():
    found = line_through([0.01, -0.02, 0.015, -0.01]).zero()
    assert found["low"] is None
    assert found["high"] is None
    assert line_through([0.0, 0.0, 0.0, 0.0]).zero() is None


def test_two_sizes_have_the_scatter_of_the_seeds():
    rng = random.Random(0)
    groups = [[dense(x) + rng.gauss(0, 0.01) for _ in range(3)] for x in X[:2]]
    line = fit_line(X[:2], groups)
    pooled = scatter_of_seeds(groups)
    assert line.scatter == pooled
    assert pooled.dof == 4
    error = math.sqrt(pooled.variance * 2 / 3) / (X[1] - X[0])  # of a difference of two means of three
    slope = line.slope_estimate()
    assert slope["high"] - slope["value"] == pytest.approx(T_95[3] * error)
    alone = fit_line(X[:2], [group[:1] for group in groups]).slope_estimate()
    assert alone["low"] is None
    assert alone["high"] is None
    assert fit_line(X[:1], groups[:1]) is None
    assert fit_line([1.0, 1.0], groups) is None


def test_scatters_are_pooled_by_their_degrees_of_freedom():
    assert Scatter(4.0, 1).pooled(Scatter(1.0, 2)) == Scatter(2.0, 3)
    assert Scatter(0.0, 0).pooled(Scatter(0.0, 0)).dof == 0


def test_an_irreducible_loss_comes_back():
    sizes = [3e5 * 2**step for step in range(6)]
    losses = [1.5 + 40 * size**-0.25 for size in sizes]
    found = fit_irreducible(sizes, losses)
    assert found["b"]["value"] == pytest.approx(0.25)
    assert found["E"] == pytest.approx(1.5)
    assert found["a"] == pytest.approx(40)
    assert fit_irreducible(sizes[:4], losses[:4]) is None
    rng = random.Random(2)
    found = fit_irreducible(sizes, [loss * math.exp(rng.gauss(0, 0.002)) for loss in losses])
    assert found["b"]["low"] < 0.25 < found["b"]["high"]
    assert found["E_low"] < 1.5 < found["E_high"]
    level = fit_irreducible(sizes, [size**-0.075 for size in sizes])  # no irreducible loss: no lower bound
    assert level["b"]["low"] is None
    assert level["E_low"] is None


def test_what_no_number_holds_is_no_end():
    assert exponential({"value": 0.0, "low": -1e4, "high": 1e4}) == {"value": 1.0, "low": None, "high": None}
