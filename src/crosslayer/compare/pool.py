"""Runs beside one another."""

from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import active_children, get_context
from typing import ParamSpec, TypeVar

from ..workers import initialize_worker, without_interrupts

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Pool:
    """Processes where there are several workers, calls at once where there is one.

    Args:
        workers: how many.
        initializer: called first in every process.
    """

    def __init__(self, workers: int, initializer: Callable[[], None] | None) -> None:
        self.executor = None
        self.others = set(active_children())
        if workers > 1:
            with without_interrupts():
                self.executor = ProcessPoolExecutor(workers, get_context("spawn"), initialize_worker, (initializer,))

    def submit(self, function: Callable[Given, Result], *arguments: Given.args, **more: Given.kwargs) -> Future[Result]:
        """What `function` will return; its error too, from a process. A call at once raises here."""
        if self.executor is not None:
            with without_interrupts():  # a worker may start here
                return self.executor.submit(function, *arguments, **more)
        done: Future[Result] = Future()
        done.set_result(function(*arguments, **more))
        return done

    def kill(self) -> None:
        """End the workers in the middle of their runs."""
        if self.executor is not None:
            for process in set(active_children()) - self.others:
                process.kill()

    def stop(self) -> None:
        """Begin nothing more, wait for nothing."""
        if self.executor is not None:
            self.executor.shutdown(wait=False, cancel_futures=True)
