"""Processes that work for this one: quiet when it is interrupted, gone when it is gone."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.connection import wait


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, which a terminal sends to all of them; it reaches this one
    afterwards. Pools belong in here too: they start a process that tidies up, and complains when this one is ended."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    if not hasattr(signal, "pthread_sigmask"):  # not on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def initialize_worker(then: Callable[[], None] | None = None) -> None:
    """First call in a process that works for another: it ends with that one, however that one ends.

    Args:
        then: what else is to be done at the start.
    """
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if then is not None:
        then()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


__all__ = ["initialize_worker", "without_interrupts"]
