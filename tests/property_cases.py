"""How many cases property tests try: a share of a minute here, thousands with CROSSLAYER_PROPERTY_CASES=20."""

import os

import pytest
from hypothesis import HealthCheck, settings

TIMES = float(os.environ.get("CROSSLAYER_PROPERTY_CASES", "1"))
"""Factor on the number of cases of every property test."""


long_enough = pytest.mark.timeout(round(300 * max(TIMES, 1)))
"""Mark of the modules with such tests: their time grows with the cases."""


def cases(count: int) -> settings:
    """Settings for `count` cases, the same in every run; or for so many times more, drawn anew. Nothing is kept between
    runs; files are shared by cases."""
    number = max(round(count * TIMES), 1)
    health = list(HealthCheck)
    return settings(
        max_examples=number, derandomize=TIMES == 1, deadline=None, suppress_health_check=health, database=None
    )
