"""The peak of a training step on a CPU, as it happens: by part (torch's MemTracker) and by torch's allocator."""

import torch
from torch.distributed._tools.mem_tracker import MemTracker

CPU = torch.device("cpu")


def make_step(model, ids, optimizer=None, dtype=None):
    """Forward, backward and the optimizer, if any; under autocast where a dtype is given."""

    def step():
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def allocated_peak(step) -> int:
    """Most bytes that the allocator had handed out at once during the step, beyond what there was before."""
    return allocated(step)[0]


def allocated(step) -> tuple[int, int]:
    """(peak, what is left) of the bytes that the allocator hands out during a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now


def tracked_peak(model, optimizer, step) -> dict[str, int]:
    """MemTracker's parts at the peak of the second step, when the optimizer has its states."""
    step()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    snapshot = tracker.get_tracker_snapshot("peak")[CPU]
    return {str(kind).rpartition(".")[2]: size for kind, size in snapshot.items()}
