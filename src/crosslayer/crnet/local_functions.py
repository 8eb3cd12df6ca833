"""A block's functions under a memory policy: their outputs, and their gradients, layer by layer.

    norm        x = w h / rms(h)          dh = (w dx - h <w dx, h> / (D rms^2)) / rms    dw = sum_tokens dx h / rms
    gate        g = silu(gate) up         d_up = dg silu(gate)       d_gate = dg up silu'(gate)
    attention   a graph of its own, of which only what the core saves may wait for the backward
    all else    a graph of its own: slower, never wrong

`CLOSED_FORMS` is the one place that says which modules are written out, by their exact type.

Fresh memory is what elementwise work costs on a CPU: a new [1024, 1376] float32 tensor takes a page fault every 4 KiB,
longer than the multiplication that fills it. Whatever does not outlive a layer is therefore written into `Scratch`.

Letters: [B, T, D] batch, tokens, hidden size; F the output width of a position; h hidden states, Y outputs of linears.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .decode_rows import is_watched
from .functions import Attention, CarriedOffsetRMSNorm, CarriedRMSNorm, GatedMLP

SILU = (nn.SiLU, type(ACT2FN["silu"]))


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
        self.buffers.clear()


@dataclass
class Call:
    """What the layers of one forward have in common: autocast as it was then, and scratch memory."""

    device_type: str
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


class RMSNormGradient:
    """x = w h / rms(h), in the dtype of w, computed in h's dtype, which is float32 at least."""

    def __init__(self, name: str, norm: CarriedRMSNorm, inputs: Sequence[torch.Tensor], scratch: Scratch) -> None:
        (h,) = inputs
        self.name, self.h = name, h
        self.buffer = scratch.get((name, "output"), h.shape, h)
        self.weight = norm.scale(h.dtype)
        mean_square = torch.pow(h, 2, out=self.buffer).mean(-1, keepdim=True)  # as torch.rms_norm does, bit for bit
        self.scale = mean_square.add_(norm.variance_epsilon).rsqrt_()  # 1 / rms(h), [B, T, 1]
        x = torch.mul(h, self.scale, out=self.buffer).mul_(self.weight)
        self.output = x.to(norm.weight.dtype)

    @staticmethod
    def fits(norm: CarriedRMSNorm) -> bool:
        return True

    def gradients(self, dx: torch.Tensor, found: Gradients, add_to=None, out=None) -> tuple[torch.Tensor]:
        """dx [B, T, D], written over -> (add_to + dx/dh dx,), into `out`."""
        h, scale = self.h, self.scale
        width = h.shape[-1]
        dx = dx.to(h.dtype)
        rows = torch.mul(dx, h, out=self.buffer).view(-1, width)
        if f"{self.name}.weight" in found.wanted:
            found.found[f"{self.name}.weight"] = rows.t() @ scale.view(-1)
        along_h = (rows @ self.weight).view(scale.shape).mul_(scale.pow(3)).div_(-width)
        out = torch.empty_like(h) if out is None else out
        d_h = torch.mul(h, along_h, out=out) if add_to is None else torch.addcmul(add_to, h, along_h, out=out)
        return (d_h.addcmul_(dx.mul_(self.weight), scale),)


class GateGradient:
    """silu(Y_gate) Y_up of a gated MLP."""

    def __init__(self, name: str, mlp: GatedMLP, inputs: Sequence[torch.Tensor], scratch: Scratch) -> None:
        self.gate, self.up = inputs
        self.activated = torch.ops.aten.silu.out(self.gate, out=scratch.get((name, "act"), self.gate.shape, self.gate))
        self.output = torch.mul(self.activated, self.up, out=scratch.get((name, "output"), self.gate.shape, self.gate))

    @staticmethod
    def fits(mlp: GatedMLP) -> bool:
        return type(mlp.act_fn) in SILU and not is_watched(mlp.act_fn)

    def gradients(self, d_output: torch.Tensor, found: Gradients) -> tuple[torch.Tensor, ...]:
        """d (silu(Y_gate) Y_up) [B, T, F], written over -> (d Y_gate, d Y_up), good until the next layer's."""
        d_up = self.activated.mul_(d_output)
        d_activated = d_output.mul_(self.up)
        return torch.ops.aten.silu_backward.grad_input(d_activated, self.gate, grad_input=d_activated), d_up


CLOSED_FORMS: dict[type, Any] = {
    CarriedRMSNorm: RMSNormGradient,
    CarriedOffsetRMSNorm: RMSNormGradient,
    GatedMLP: GateGradient,
}


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
        found.found |= {n: d for n, d in zip(names, gradients[len(self.leaves) :], strict=True) if d is not None}
        inputs = [torch.zeros_like(leaf) if d is None else d for leaf, d in zip(self.leaves, gradients, strict=False)]
        if add_to is not None:
            return (torch.add(add_to, inputs[0], out=out),)
        return tuple(inputs)

    def tensors(self) -> list[torch.Tensor]:
        """What it holds while it waits."""
        return [*self.held, self.output]


class AttentionGraph(LocalGraph):
    """Attention from the Y that it reads. Its graph may wait for the backward without holding q, k and v.

    Of what an attention implementation saves, the rotated q, k and v are made again from the Y they came from; only
    the rest is held (its output and its sums over the keys, 1h per token, where the implementation is a fused one).
    """

    def __init__(self, attention: Attention, inputs, arguments: dict, parameters, waits: bool) -> None:
        held: list[torch.Tensor] = []
        self.rebuilt: list[torch.Tensor] = []
        leaves: list[torch.Tensor] = []
        known: list[tuple] = []
        rebuilt = self.rebuilt

        def identity(tensor):
            return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype

        def pack(tensor):
            if identity(tensor) in known:
                return known.index(identity(tensor))
            held.append(tensor.detach())  # the graph must not hold a tensor that holds the graph
            return held[-1]

        def unpack(packed):
            if not isinstance(packed, int):
                return packed
            if not rebuilt:
                with torch.no_grad():
                    rebuilt.extend(attention.prepare(*leaves, **arguments))
            return rebuilt[packed]

        def attend(*inputs):
            leaves.extend(inputs)
            prepared = attention.prepare(*inputs, **arguments)
            if not waits:
                return attention.core(*prepared, **arguments)[0]
            known.extend(identity(tensor) for tensor in prepared)
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return attention.core(*prepared, **arguments)[0]

        super().__init__(attend, inputs, parameters)
        self.held = held

    def gradients(self, d_output, found, add_to=None, out=None, d_beside=()):
        gradients = super().gradients(d_output, found, add_to, out, d_beside)
        self.rebuilt.clear()
        return gradients


def run_function(
    name: str,
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    arguments: dict,
    parameters: dict[str, torch.Tensor],
    call: Call,
    waits: bool = False,
) -> Any:
    """A function of a block with its gradients: written out where it can be, else under a graph of its own.

    `waits` asks for a graph that a later backward uses; a cheap function is run again instead.
    """
    closed_form = CLOSED_FORMS.get(type(module))
    if closed_form is not None and not is_watched(module) and is_plain(parameters) and closed_form.fits(module):
        return closed_form(name, module, inputs, call.scratch)
    with call.autocast():
        if is_split(module):
            return AttentionGraph(module, inputs, arguments, parameters, waits)  # type: ignore[arg-type]
        return LocalGraph(lambda *tensors: first_of(module(*tensors, **arguments)), inputs, parameters, waits)


def is_split(module: nn.Module) -> bool:
    """Whether it is attention whose forward is `prepare` and `core`, one after the other."""
    return isinstance(module, Attention) and type(module).forward is Attention.forward and not is_watched(module)


def is_plain(parameters: dict[str, torch.Tensor]) -> bool:
    """Whether all are plain tensors in memory: no DTensor, nothing quantised or offloaded."""
    return all(type(p) in (nn.Parameter, torch.Tensor) and p.device.type != "meta" for p in parameters.values())


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether its forward drops anything, so that running it again needs the random numbers of the first time."""
    return any(
        part.training and (getattr(part, "attention_dropout", 0) or getattr(part, "p", 0))
        for part in module.modules()
        if isinstance(part, nn.modules.dropout._DropoutNd) or hasattr(part, "attention_dropout")
    )


__all__ = ["Call", "Gradients", "LocalGraph", "Scratch", "draws_random_numbers", "run_function"]
