"""Peak memory of a training step by part: parameters, gradients, optimizer, activations, temporary.

Every storage that an operation makes is noted with its size, and again when it dies; what it was is decided
afterwards, when it is known how long it lived:

    parameters, optimizer, other (buffers, the batch)    there before the step
    gradients                                            became some parameter's .grad
    activations                                          made by the forward, alive when it ended: kept for the backward
    temporary                                            the rest, recomputed activations and rebuilt states included

On a CPU the peak equals that of torch's profiler, which asks the allocator, but for a kernel's own scratch memory.
torch's MemTracker finds the same peak under plain autograd; under a memory policy its hooks kept states alive that were
dropped (5 to 8 % too much at 12 layers), and it names storages by when they were made, so that what a forward drops at
once is an activation: tests/parity/test_peak_memory_witnesses.py. On CUDA the allocator has the last word on the peak:
`temporary` is corrected by what kernels take within themselves and by rounding.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..private import storage_address

PARTS = ("parameters", "gradients", "optimizer", "activations", "temporary", "other")
PHASES = ("forward", "backward", "optimizer")


@dataclass
class PeakMemory:
    """What `measure_peak_memory` found: bytes by part at the highest moment of each phase of a step.

    Args:
        tokens: of the batch.
        phases: {"forward", "backward", "optimizer"} -> {part of `PARTS`: bytes}.
    """

    tokens: int
    phases: dict[str, dict[str, int]]

    @property
    def phase(self) -> str:
        """The phase in which the step is highest."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the peak of the step. Gradients are those there at that moment."""
        return self.phases[self.phase]

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"total": self.total_bytes, "phase": self.phase, **self.parts}


class StorageWatch(TorchDispatchMode):
    """Notes when storages are made and when they die, while it is entered.

    A fused kernel's own scratch memory, taken and given back within one operation, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (storage number, bytes: positive when made, negative when dead)
        self._living: dict[int, tuple[weakref.ref, int, int]] = {}  # by address: (storage, number, bytes)
        self._made = 0

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage, noted now if it is new."""
        storage = tensor.untyped_storage()
        address = storage_address(storage)
        known = self._living.get(address)
        if known is not None and known[0]() is storage:
            self._note_resize(address, storage.nbytes())
            return known[1]
        number, self._made = self._made, self._made + 1
        self.events.append((number, storage.nbytes()))
        self._living[address] = (weakref.ref(storage, self._dies(address, number)), number, storage.nbytes())
        return number

    def living(self) -> set[int]:
        """Numbers of the storages that are alive."""
        return {number for _, number, _ in self._living.values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.number(tensor)
        return result

    def _dies(self, address: int, number: int) -> Callable[[Any], None]:
        def note(_) -> None:
            _, current, size = self._living.get(address, (None, None, 0))
            if current == number:
                del self._living[address]
                self.events.append((number, -size))

        return note

    def _note_resize(self, address: int, size: int) -> None:
        reference, number, before = self._living[address]
        if size != before:
            self.events.append((number, size - before))
            self._living[address] = (reference, number, size)


def measure_peak_memory(
    model: nn.Module, input_ids: torch.Tensor, optimizer: torch.optim.Optimizer | None = None, **arguments
) -> PeakMemory:
    """Peak memory of one training step, in the model's current mode, policy and autocast.

    Two steps run, three on CUDA: the first one makes the optimizer's states. Gradients are set to None before each.
    Compiled models cannot be watched from inside; see the allocator there.

    Args:
        model: a causal language model that takes `labels`; call `.train()` on it.
        input_ids: [B, T], labels as well.
        optimizer: over the model's parameters; it makes real steps. None: AdamW that changes nothing (rate 0).
        arguments: further arguments of the model. `use_cache` is off.
    """
    if optimizer is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

    step = _Step(model, input_ids, arguments, optimizer)
    optimizer.zero_grad()
    for phase in PHASES:
        step.run(phase)
    optimizer.zero_grad()
    parts: dict[str, list[torch.Tensor]] = {
        "parameters": list(model.parameters()),
        "optimizer": list(_states(optimizer)),
        "other": [*model.buffers(), input_ids],
    }
    found = PeakMemory(input_ids.numel(), _watch(step, parts))
    if input_ids.is_cuda:
        _correct_by_allocator(found, step, input_ids.device)
    return found


@dataclass
class _Step:
    """A training step, phase by phase. As in a Trainer, the caller's autocast counts for the forward alone."""

    model: nn.Module
    input_ids: torch.Tensor
    arguments: dict[str, Any]
    optimizer: torch.optim.Optimizer
    loss: torch.Tensor | None = None

    def run(self, phase: str) -> None:
        if phase == "forward":
            self.loss = self.model(self.input_ids, labels=self.input_ids, use_cache=False, **self.arguments).loss
            return
        with torch.autocast(self.input_ids.device.type, enabled=False):
            if phase == "backward":
                assert self.loss is not None
                self.loss.backward()
                self.loss = None
            else:
                self.optimizer.step()


def _watch(step: _Step, parts: dict[str, list[torch.Tensor]]) -> dict[str, dict[str, int]]:
    """Runs one step and tells the highest moment of each phase by part."""
    watch = StorageWatch()
    part_of: dict[int, str] = {}
    for part, tensors in parts.items():
        for tensor in tensors:
            part_of.setdefault(watch.number(tensor), part)
    there_before = set(part_of)

    def is_gradient(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:  # None: a hook of the caller's has released it
            part_of[watch.number(parameter.grad)] = "gradients"

    trained = [parameter for parameter in parts["parameters"] if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(is_gradient) for parameter in trained]
    ends, kept = [len(watch.events)], set()
    try:
        with watch:
            for phase in PHASES:
                step.run(phase)
                ends.append(len(watch.events))
                if phase == "forward":
                    kept = watch.living() - there_before
            step.optimizer.zero_grad()
    finally:
        for hook in hooks:
            hook.remove()
    for number in kept:
        part_of.setdefault(number, "activations")
    return {phase: _highest(watch.events, part_of, *ends[at : at + 2]) for at, phase in enumerate(PHASES)}


def _highest(events: list[tuple[int, int]], part_of: dict[int, str], begin: int, end: int) -> dict[str, int]:
    """Bytes by part at the highest moment between two events."""
    now = dict.fromkeys(PARTS, 0)
    for number, size in events[:begin]:
        now[part_of.get(number, "temporary")] += size
    total = highest = sum(now.values())
    at_peak = dict(now)
    for number, size in events[begin:end]:
        now[part_of.get(number, "temporary")] += size
        total += size
        if total > highest:
            highest, at_peak = total, dict(now)
    return at_peak


def _correct_by_allocator(found: PeakMemory, step: _Step, device: torch.device) -> None:
    """What the allocator says of each phase of an unwatched step, less what it held for others before."""
    known = sum(found.phases["forward"][part] for part in ("parameters", "optimizer", "other"))
    others = torch.cuda.memory_allocated(device) - known
    for phase, parts in found.phases.items():
        torch.cuda.reset_peak_memory_stats(device)
        step.run(phase)
        parts["temporary"] += torch.cuda.max_memory_allocated(device) - others - sum(parts.values())
    step.optimizer.zero_grad()


def _states(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """Every tensor that the optimizer holds on to, tensors within subclasses (8-bit states) included."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                yield from _plain(value)


def _plain(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


__all__ = ["PARTS", "PHASES", "PeakMemory", "StorageWatch", "measure_peak_memory"]
