"""A block's functions under a memory policy: their outputs, and their gradients, layer by layer.

    norm        x = w h / rms(h)          dh = (w dx - h <w dx, h> / (D rms^2)) / rms    dw = sum_tokens dx h / rms
                (on a CPU; an accelerator's own kernel goes over h once)
    gate        g = silu(gate) up         d_up = dg silu(gate)       d_gate = dg up silu'(gate)
    attention   a graph of its own, of which only what the core saves may wait for the backward
    all else    a graph of its own: slower, never wrong

`CLOSED_FORMS` is the one place that says which modules are written out, by their exact type.

Letters: [B, T, D] batch, tokens, hidden size; F the output width of a position; h hidden states, Y outputs of linears.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .cross_layer_linear import is_watched
from .functions import Attention, CarriedOffsetRMSNorm, CarriedRMSNorm, GatedMLP
from .kernels import compiled
from .local_graph import Call, Gradients, LocalGraph, Scratch, is_plain

SILU = (nn.SiLU, type(ACT2FN["silu"]))


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


class Rotation(torch.autograd.Function):
    """x cos + (-x_2, x_1) sin of halves x_1, x_2, and its transpose, in `Scratch`; rounded as transformers does."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, name: str, scratch: Scratch):
        """x [B, T, heads, head_dim], cos and sin [B, T, 1, head_dim]."""
        ctx.given = cos, sin, f"d {name}", scratch
        return turn(1, x, cos, sin, name, scratch)

    @staticmethod
    def backward(ctx, d):
        """d of the result -> d x, turned the other way; nothing for cos and sin."""
        return turn(-1, d, *ctx.given), None, None, None, None


def turn(sign: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, name: str, scratch: Scratch):
    """x [B, T, heads, head_dim] rotated, or with sign -1 rotated back: a tensor of `scratch`, named by `name`."""
    dtype, half = torch.promote_types(x.dtype, cos.dtype), x.shape[-1] // 2
    out = torch.mul(x, cos, out=scratch.get(("rotation", name), x.shape, x, dtype))
    turned = scratch.get(("rotation", "half"), (*x.shape[:-1], half), x, dtype)
    sin_1, sin_2 = sin.split(half, -1)[::sign]
    out[..., :half].add_(torch.mul(x[..., half:], sin_1, out=turned), alpha=-sign)
    out[..., half:].add_(torch.mul(x[..., :half], sin_2, out=turned), alpha=sign)
    return out


def rotate_in_scratch(scratch: Scratch, query, key, cos, sin, unsqueeze_dim: int):
    """What stands in for `apply_rotary_pos_emb`."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return tuple(Rotation.apply(x, cos, sin, name, scratch) for name, x in (("query", query), ("key", key)))


class AttentionGraph(LocalGraph):
    """Attention from the Y that it reads. Its graph may wait for the backward without holding q, k and v.

    Of what an attention implementation saves, the rotated q, k and v are made again from the Y they came from; only
    the rest is held (its output and its sums over the keys, 1h per token, where the implementation is a fused one).
    """

    def __init__(self, attention: Attention, inputs, arguments: dict, parameters, call: Call, waits: bool) -> None:
        held: list[torch.Tensor] = []
        self.rebuilt: list[torch.Tensor] = []
        leaves: list[torch.Tensor] = []
        prepared: list[tuple[int, int]] = []
        rebuilt, given, prepare = self.rebuilt, dict(arguments), attention.prepare
        if call.compiles and "prepare" not in attention.__dict__:
            prepare = partial(compiled(type(attention).prepare), attention)
        elif attention.rotate is apply_rotary_pos_emb:
            given["rotate"] = partial(rotate_in_scratch, call.scratch)

        def place(tensor):
            return tensor.untyped_storage().data_ptr(), tensor.storage_offset()

        def pack(tensor):  # views of them, such as one key for all queries, lie in memory that others write over
            storage, offset = place(tensor)
            for index, (of, start) in enumerate(prepared):
                if of == storage:
                    return index, tensor.shape, tensor.stride(), offset - start
            held.append(tensor.detach())  # the graph must not hold a tensor that holds the graph
            return held[-1]

        def unpack(packed):
            if not isinstance(packed, tuple):
                return packed
            if not rebuilt:
                with torch.no_grad():
                    rebuilt.extend(prepare(*leaves, **given))
            index, shape, stride, offset = packed
            return rebuilt[index].as_strided(shape, stride, rebuilt[index].storage_offset() + offset)

        def attend(*inputs):
            leaves.extend(inputs)
            outputs = prepare(*inputs, **given)
            if not waits:
                return attention.core(*outputs, **arguments)[0]
            prepared.extend(place(tensor) for tensor in outputs)
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return attention.core(*outputs, **arguments)[0]

        super().__init__(attend, inputs, parameters)
        self.held = held

    def gradients(self, d_output, found, add_to=None, out=None, d_beside=()):
        """As in `LocalGraph`; then the q, k and v that were made again for it are freed."""
        gradients = super().gradients(d_output, found, add_to, out, d_beside)
        self.rebuilt.clear()
        return gradients


def run_function(
    name: str, module: nn.Module, inputs, arguments: dict, parameters: dict, strays: dict, call: Call, waits=False
) -> Any:
    """A function of a block with its gradients: written out where it can be, else under a graph of its own.

    `strays` are parameters that a hook on it may use; `waits` asks for a graph that a later backward uses.
    """
    closed_form = CLOSED_FORMS.get(type(module))
    activation = getattr(module, "act_fn", None)
    is_known = activation is None or (type(activation) in SILU and not is_watched(activation))
    if closed_form is not None and is_known and not is_watched(module) and is_plain(parameters):
        if call.compiles:
            return LocalGraph(partial(compiled(type(module).forward), module), inputs, parameters, waits)
        if call.device_type == "cpu" or closed_form is GateGradient:  # an accelerator's norm is one kernel
            return closed_form(name, module, inputs, call.scratch)
    with call.autocast():
        parameters = parameters | strays
        if is_split(module):
            return AttentionGraph(module, inputs, arguments, parameters, call, waits)  # type: ignore[arg-type]
        return LocalGraph(lambda *tensors: first_of(module(*tensors, **arguments)), inputs, parameters, waits)


def is_split(module: nn.Module) -> bool:
    """Whether it is attention whose forward is `prepare` and `core`, one after the other."""
    return isinstance(module, Attention) and type(module).forward is Attention.forward and not is_watched(module)


def first_of(output: Any) -> torch.Tensor:
    """A module's output, or the first of a tuple, such as attention without its weights."""
    return output[0] if isinstance(output, tuple) else output


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether its forward drops anything, so that running it again needs the random numbers of the first time."""
    return any(
        part.training and (getattr(part, "attention_dropout", 0) or getattr(part, "p", 0))
        for part in module.modules()
        if isinstance(part, nn.modules.dropout._DropoutNd) or hasattr(part, "attention_dropout")
    )
