"""Kinds of values, and whether a value is of its kind: what the tables of ranges are made of.

The tables stand with the owners of the fields: train/ranges.py for recipes, cli/ranges.py for options of verbs.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Range:
    """What a field may be."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def where(words: str, holds: Callable[[Any], bool]) -> Range:
    """Finite numbers of which `holds` is true."""
    return Range(words, lambda value: _is_number(value) and holds(value))


def whole(least: int, most: int, words: str) -> Range:
    """Whole numbers from `least` to `most`."""
    return where(words, lambda x: least <= x <= most and x == int(x))


def one_of(allowed: Collection[Any]) -> Range:
    """One of a few values."""
    return Range(f"one of {', '.join(map(str, allowed))}", lambda value: value in allowed)


def only(allowed: Any, why: str) -> Range:
    """A field that has to keep its value."""
    return Range(f"{allowed!r} ({why})", lambda value: value == allowed)


def or_text(text: str, kind: Range) -> Range:
    """A kind of number, or a text such as auto."""
    return Range(f"{text}, or {kind.words}", lambda value: value == text or kind.holds(value))


LARGEST = 2**63 - 1
"""What a machine counts with; sources, rows and steps may be as many."""

MOST_TOKENS = 2**24
"""Largest block, vocabulary and width: far above what is in use, and what fits the memory of a machine."""

ABOVE_0 = where("a number above 0", lambda x: x > 0)
AT_LEAST_0 = where("a number of at least 0", lambda x: x >= 0)
COUNT = whole(1, LARGEST, "a whole number of at least 1")
COUNT_OR_0 = whole(0, LARGEST, "a whole number of at least 0")
COUNT_OR_SHARE = where("a whole number of at least 1, or a share in (0, 1)", lambda x: 0 < x < 1 or COUNT.holds(x))
SIZE = whole(1, MOST_TOKENS, f"a whole number from 1 to {MOST_TOKENS}")
LENGTH = whole(2, MOST_TOKENS, f"a whole number from 2 to {MOST_TOKENS}")
SEED = whole(0, 2**32 - 1, "a whole number in [0, 2^32)")
SHARE = where("a number in [0, 1)", lambda x: 0 <= x < 1)
PART = where("a number in (0, 1)", lambda x: 0 < x < 1)
MASS = where("a number in (0, 1]", lambda x: 0 < x <= 1)
NAME = Range("a text that is not empty", bool)


def _are_starts(value: Any) -> bool:
    is_whole = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    return is_whole and value[:1] == [0] and all(low < high for low, high in pairwise(value))


GROUP_STARTS = Range("a list of the blocks at which a group begins, ascending from 0, as [0, 3]", _are_starts)


def out_of_range(values: Mapping[str, Any], ranges: Mapping[str, Range], section: str = "") -> Iterator[str]:
    """A problem in words for each value outside its range; None stands for a default."""
    prefix = f"{section}." if section else ""
    for name, value in values.items():
        allowed = ranges.get(name)
        if value is not None and allowed is not None and not allowed.holds(value):
            yield f"{prefix}{name}={value!r} must be {allowed.words}"
