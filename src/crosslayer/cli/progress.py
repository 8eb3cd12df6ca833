"""How far a verb has come: a bar on a terminal, plain lines in a file or a pipe."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

LINES = 10
"""Lines of one progress whose end is known; 100 batches a line where it is not."""


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
        yield lambda done, total: _line(what, done, total)


def counted(batches: Iterable[Any], what: str, *, hidden: bool = False) -> Iterator[Any]:
    """The batches, with their progress."""
    total = len(batches) if hasattr(batches, "__len__") else None
    with progress(what, hidden=hidden) as on_batch:
        for done, batch in enumerate(batches, 1):
            yield batch
            on_batch(done, total)


def _line(what: str, done: int, total: int | None) -> None:
    if total is None:
        if done % 100 == 0:
            print(f"crosslayer: {what}: {done:,} batches", file=sys.stderr, flush=True)
    elif done == total or done * LINES // total > (done - 1) * LINES // total:
        print(f"crosslayer: {what}: {done:,} of {total:,} batches", file=sys.stderr, flush=True)


__all__ = ["counted", "progress"]
