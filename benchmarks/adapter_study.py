"""What studies of adapters share: runs that are made once, and the search for each method's learning rate."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

FACTOR, MOST_RATES = 4.0, 6


class Runs:
    """Runs as files of a folder: what is there is not made again, and no file is half written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            found = make()
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(found))
            unfinished.replace(path)
            print(f"{name}: {found['loss']} in {found['seconds']} s", flush=True)
        return json.loads(path.read_text())


def tune(run: Callable[[float], dict[str, Any]], centre: float) -> dict[str, Any]:
    """The rate of the lowest `loss` (None: it diverged) of three, a factor of four apart.

    While the best is at an edge, a further rate beyond it is tried, up to six in all.
    """
    tried = {rate: run(rate)["loss"] for rate in (centre / FACTOR, centre, centre * FACTOR)}
    while True:
        best = min(tried, key=lambda rate: math.inf if tried[rate] is None else tried[rate])
        inside = min(tried) < best < max(tried)
        if inside or len(tried) == MOST_RATES:
            return {"rate": best, "inside": inside, "tried": [[rate, tried[rate]] for rate in sorted(tried)]}
        beyond = best * FACTOR if best == max(tried) else best / FACTOR
        tried[beyond] = run(beyond)["loss"]
