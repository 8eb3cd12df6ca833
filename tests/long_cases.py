"""Cases of a parametrized test beyond those that every change is tested with: `make test-long` runs them too."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_long(names: Iterable[str], *always: str) -> list[Any]:
    """Parameters of which all but those named are long."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.long) for name in names]
