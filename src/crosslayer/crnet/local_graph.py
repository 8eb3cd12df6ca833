"""A graph of its own for one part of a block, and the memory and gradients that the parts of a block share.

Fresh memory is what elementwise work costs on a CPU: a new [1024, 1376] float32 tensor takes a page fault every 4 KiB,
longer than the multiplication that fills it. Whatever does not outlive a layer is therefore written into `Scratch`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class Scratch:
    """Memory by name that one layer after the other writes over, as large as the largest tensor asked for.

    A name is (who, what for); nobody takes another one's.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple, torch.Tensor] = {}

    def get(self, name: tuple[str, str], shape: Iterable[int], like: torch.Tensor, dtype: torch.dtype | None = None):
        """A tensor of this shape on the device of `like`, in its dtype unless said; the content is anybody's."""
        shape, key = tuple(shape), (name, dtype or like.dtype, like.device)
        size = math.prod(shape)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[key] = torch.empty(size, dtype=key[1], device=key[2])
        return buffer[:size].view(shape)

    def clear(self) -> None:
        """Lets go of all buffers; tensors already handed out stay as they are."""
        self.buffers.clear()


@dataclass
class Call:
    """What the layers of one forward have in common: autocast as it was, whether the model is compiled, scratch."""

    device_type: str
    compiles: bool = False
    autocast_dtype: torch.dtype | None = None
    scratch: Scratch = field(default_factory=Scratch)

    def __post_init__(self) -> None:
        if torch.is_autocast_enabled(self.device_type):
            self.autocast_dtype = torch.get_autocast_dtype(self.device_type)

    def autocast(self) -> AbstractContextManager:
        """The forward's autocast, for what the backward runs again."""
        return torch.autocast(self.device_type, self.autocast_dtype, enabled=self.autocast_dtype is not None)


@dataclass
class Gradients:
    """Gradients of a layer's parameters by name, as far as they are wanted."""

    wanted: set[str] = field(default_factory=set)
    found: dict[str, torch.Tensor] = field(default_factory=dict)
    keep_graph: bool = False  # whether graphs that waited are wanted again (retain_graph=True)


class LocalGraph:
    """outputs = function(*inputs) with an autograd graph of its own, cut off from the one outside.

    Args:
        function: of tensors; gives a tensor, or a tuple whose further entries are `beside`.
        inputs: what its gradients go to.
        parameters: by name, those of the modules that it runs.
        waits: whether the graph is for a later backward: what it saves is then listed in `held`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        parameters: dict[str, torch.Tensor] | None = None,
        waits: bool = False,
    ) -> None:
        self.parameters = parameters or {}
        self.held: list[torch.Tensor] = []
        # With gradients on in the forward too, which may need none of them: kernels may be chosen by it.
        with torch.enable_grad():
            self.leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            if waits:
                with torch.autograd.graph.saved_tensors_hooks(self._packer(), lambda held: held):
                    outputs = function(*self.leaves)
            else:
                outputs = function(*self.leaves)
        self.graphed, *self.graphed_beside = outputs if isinstance(outputs, tuple) else (outputs,)
        self.output = self.graphed.detach()
        self.beside = [tensor.detach() for tensor in self.graphed_beside]

    def _packer(self) -> Callable[[torch.Tensor], torch.Tensor]:
        held = self.held  # the hook lives in the graph, so it must not know the run, which holds it
        return lambda tensor: held.append(tensor.detach()) or held[-1]  # type: ignore[func-returns-value]

    def gradients(
        self, d_output: torch.Tensor, found: Gradients, add_to=None, out=None, d_beside: Sequence = ()
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of the inputs; those of wanted parameters are put into `found`. With `add_to`: added to it."""
        names = [name for name, p in self.parameters.items() if name in found.wanted and p.requires_grad]
        outputs = [(self.graphed, d_output.to(self.graphed.dtype)), *zip(self.graphed_beside, d_beside, strict=False)]
        outputs = [(tensor, d) for tensor, d in outputs if d is not None and tensor.requires_grad]
        gradients = torch.autograd.grad(
            [tensor for tensor, _ in outputs],
            [*self.leaves, *(self.parameters[name] for name in names)],
            [d for _, d in outputs],
            retain_graph=found.keep_graph,
            allow_unused=True,
        )
        for name, d in zip(names, gradients[len(self.leaves) :], strict=True):
            if d is not None:
                found.found[name] = found.found[name] + d if name in found.found else d
        inputs = [torch.zeros_like(leaf) if d is None else d for leaf, d in zip(self.leaves, gradients, strict=False)]
        if add_to is not None:
            return (torch.add(add_to, inputs[0], out=out),)
        return tuple(inputs)

    def tensors(self) -> list[torch.Tensor]:
        """What it holds while it waits."""
        return [*self.held, self.output]


def is_plain(parameters: dict[str, torch.Tensor]) -> bool:
    """Whether all are plain tensors in memory: no DTensor, nothing quantised or offloaded."""
    return all(type(p) in (nn.Parameter, torch.Tensor) and p.device.type != "meta" for p in parameters.values())
