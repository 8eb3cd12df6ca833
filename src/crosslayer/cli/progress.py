"""How far a verb has come: a bar on a terminal, plain lines in a file or a pipe."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

TENTHS = 10
SILENCE_S = 10.0
"""In a file there is a line for every tenth of the way, and after so many seconds without one."""


@contextmanager
def progress(what: str, *, hidden: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """Yields what is to be called with (batches done, batches in all) after each batch."""
    if hidden:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=what, unit="batch", leave=False) as bar:

            def show(done: int, total: int | None) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield show
    else:
        yield _Lines(what)


def counted(batches: Iterable[Any], what: str, *, hidden: bool = False) -> Iterator[Any]:
    """The batches, with their progress."""
    total = len(batches) if isinstance(batches, Sized) else None
    with progress(what, hidden=hidden) as on_batch:
        for done, batch in enumerate(batches, 1):
            yield batch
            on_batch(done, total)


class _Lines:
    def __init__(self, what: str) -> None:
        self.what = what
        self.last_at = time.monotonic()
        self.last_done = 0

    def __call__(self, done: int, total: int | None) -> None:
        is_tenth = total is not None and done * TENTHS // total > self.last_done * TENTHS // total
        if is_tenth or time.monotonic() - self.last_at > SILENCE_S:
            of = "" if total is None else f" of {total:,}"
            print(f"crosslayer: {self.what}: {done:,}{of} batches", file=sys.stderr, flush=True)
            self.last_at, self.last_done = time.monotonic(), done


__all__ = ["counted", "progress"]
