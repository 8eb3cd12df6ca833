"""Processes that work for this one: quiet when it is interrupted, gone when it is gone."""

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.connection import wait
from types import FrameType


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, which a terminal sends to all of them; it reaches this one
    afterwards. Pools belong in here too: they start a process that tidies up, and complains when this one is ended."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    if not hasattr(signal, "pthread_sigmask"):  # not on Windows
        yield
        return
    with _interrupts_afterwards():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which processes inherit
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _interrupts_afterwards() -> Iterator[None]:
    """Blocking the signal in one thread keeps nothing away: another thread takes it, and Python still raises in the
    main one, where a process that has begun may wait for what it is to do."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


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


def hear_parent_alone(signals: Collection[signal.Signals]) -> None:
    """In a forked worker: these signals, which schedulers send to all processes of a job, end it when its parent sends
    them (as loaders do), and are the parent's business when others do."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=_end_at_word_of, args=(os.getppid(), signals), daemon=True).start()


def _end_at_word_of(parent: int, signals: Collection[signal.Signals]) -> None:
    while signal.sigwaitinfo(signals).si_pid != parent:
        pass
    os._exit(0)  # torch takes anything else for a failure


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


__all__ = ["hear_parent_alone", "initialize_worker", "without_interrupts"]
