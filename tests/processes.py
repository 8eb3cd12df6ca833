"""Several processes of a test, each of which ends where its work ends."""

import os
import sys
from collections.abc import Callable
from typing import Any

from torch import multiprocessing


def spawn(work: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """work(rank, *args) in each of nprocs new processes. Raises what one of them raised.

    DTensor's caches keep a process group beyond destroy_process_group, and with it gloo's threads: one that lets
    go of a tensor while the interpreter is taken down aborts the process. So it is not taken down.
    """
    multiprocessing.spawn(_work_and_leave, (work, args), nprocs=nprocs)


def _work_and_leave(rank: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    work(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
