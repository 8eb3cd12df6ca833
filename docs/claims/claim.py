"""What a claim is, the files that decide it, and how two contenders are told apart."""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import ttest_ind

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

HOLDS, FAILS, CANNOT, OPEN = "holds", "does not hold here", "cannot be tested here", "not run yet"
CRNET, LOR2C, OURS = PARTS = ("CR-Net (arXiv 2509.18993)", "LoR2C (arXiv 2503.00572)", "This package")

Losses = list[float | None]
"""Of the seeds; None where a run diverged."""
Values = dict[str, Any]
"""What fills the placeholders of a row."""
Found = tuple[Values, bool]
"""Values, and whether the claim holds."""


class MissingError(Exception):
    """A result that is not there yet."""


class Results:
    """The result files of a folder by name. `read` lists those that were asked for."""

    def __init__(self, folder: Path = ROOT / "benchmarks" / "results") -> None:
        self.folder = folder
        self.read: list[str] = []

    def load(self, name: str) -> dict[str, Any] | None:
        """A file's content; None where there is none."""
        if name not in self.read:
            self.read.append(name)
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def if_there(self, name: str) -> dict[str, Any] | None:
        """`load`, for a file that the row does without: a missing one is not listed."""
        found = self.load(name)
        if found is None:
            self.read.remove(name)
        return found

    def __call__(self, name: str, *sections: str) -> Any:
        """A file's content, or a section within it. Raises MissingError."""
        found: Any = {name: self.load(name)}
        for section in (name, *sections):
            if found.get(section) is None:
                raise MissingError(section)
            found = found[section]
        return found


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A row of the page. Numbers that were found here stand in `run` and `result` as {placeholders} only.

    Args:
        part: of the page.
        text: the claim, with its own numbers.
        source: where it is made.
        quote: words of README.md, where that is the source.
        command: what repeats the row.
        run: what was run here.
        result: what came of it.
        rule: what has to be so that the claim holds; `measure` decides by it.
        cannot: why it cannot be tested here; there is no `measure` then.
        measure: reads the files.
    """

    part: str
    text: str
    source: str
    command: str
    run: str = ""
    result: str = ""
    rule: str = ""
    quote: str = ""
    cannot: str = ""
    measure: Callable[[Results], Found] | None = None

    def verdict(self, results: Results) -> tuple[str, str, str]:
        """(verdict, what was run, result); the last two are empty where there is none."""
        if self.measure is None:
            return CANNOT, "", ""
        try:
            values, holds = self.measure(results)
        except MissingError:
            return OPEN, "", ""
        return HOLDS if holds else FAILS, self.run.format(**values), self.result.format(**values)


CLAIMS: list[Claim] = []
"""All of them, in the order of the page within a part."""


def claim(part: str, **fields: str) -> Callable[[Callable[[Results], Found]], Callable[[Results], Found]]:
    """A row; the function below measures it."""

    def keep(measure: Callable[[Results], Found]) -> Callable[[Results], Found]:
        CLAIMS.append(Claim(part=part, measure=measure, **fields))
        return measure

    return keep


def untestable(part: str, **fields: str) -> None:
    """A row that nothing here can decide."""
    CLAIMS.append(Claim(part=part, **fields))


def differs(ours: list[float], theirs: list[float]) -> int:
    """-1 or +1 where ours are lower or higher by Welch's t-test at 5 %, 0 where they are level."""
    if ttest_ind(ours, theirs, equal_var=False).pvalue < 0.05:
        return -1 if statistics.mean(ours) < statistics.mean(theirs) else 1
    return 0


def compare(ours: Losses, theirs: Losses) -> int:
    """`differs` of losses, where a method of which more runs diverged is the higher one."""
    if None in ours or None in theirs:
        return (ours.count(None) > theirs.count(None)) - (ours.count(None) < theirs.count(None))
    return differs(ours, theirs)  # type: ignore[arg-type]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def losses(values: Losses) -> str:
    """The same of those that ended, and how many did not."""
    ended = [loss for loss in values if loss is not None]
    shown = spread(ended, 4) if len(ended) > 1 else listed(f"{loss:.4f}" for loss in ended)
    diverged = f"{len(values) - len(ended)} of {len(values)} diverged"
    return ", ".join(filter(None, [shown, diverged if len(ended) < len(values) else ""]))


def listed(texts: Iterable[str]) -> str:
    """a, b, c"""
    return ", ".join(texts)
