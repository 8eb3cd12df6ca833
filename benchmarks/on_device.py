"""What scripts for one accelerator share: cells within a time, memory, and the largest size that fits."""

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from result_file import ResultFile

Cells = dict[str, tuple[float, Callable[[], dict[str, Any]]]]
"""Section -> (seconds that it may take, what measures it), the most important first."""


def measure_in_order(results: ResultFile, cells: Cells, minutes: float) -> str | None:
    """Measures what is not in the file and still fits the time; in words, what is left for another run, if anything.

    What fails does not keep the rest from being measured, and is not in the file.
    """
    end, skipped, failed = time.monotonic() + 60 * minutes, [], []
    for name, (seconds, measure) in cells.items():
        if name not in results and time.monotonic() + seconds > end:
            skipped.append(name)
            continue
        try:
            results.section(name, measure)
        except Exception as error:
            failed.append(f"{name} ({type(error).__name__}: {' '.join(str(error).split())[:300]})")
        free_memory()
    found = [
        f"{what}: {', '.join(names)}." for what, names in (("Failed", failed), ("No time left for", skipped)) if names
    ]
    return " ".join([*found, "Run the command again."]) if found else None


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def free_memory() -> None:
    """Gives back what lies in cycles, and what the allocator keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def restart_peak(device: str) -> None:
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: str) -> dict[str, int | None]:
    """Most bytes of tensors, and of what the allocator took from the device; None on a CPU."""
    cuda = is_cuda(device)
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
    }


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """A first step, of gradients of zero: out of memory in a later one cannot leave states half made."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def runs(step: Callable[[], Any], model: torch.nn.Module, times: int = 1) -> bool:
    """Whether a step has room; what it left behind is given back, its gradients too."""
    try:
        for _ in range(times):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        model.zero_grad()
        return False
    finally:
        free_memory()


def largest(
    fits: Callable[[int], bool], *, start: int = 1, limit: int = 1024, seconds: float = math.inf
) -> tuple[int, int | None]:
    """(the largest n <= limit that was seen to fit, 0 if none; the smallest that did not, None where all did).

    Doubling from `start`, then halving the interval. The two are neighbours unless time ran out: no attempt is begun
    that would end after `seconds` if it took three times as long as the one before.
    """
    end, took, low, high = time.monotonic() + seconds, 0.0, 0, limit + 1
    failed, size = None, min(start, limit)
    while high - low > 1 and time.monotonic() + 3 * took <= end:
        began = time.monotonic()
        if fits(size):
            low = size
        else:
            high = failed = size
        took = time.monotonic() - began
        size = min(2 * low, limit) if failed is None else (low + high) // 2
    return low, failed
