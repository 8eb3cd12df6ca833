"""The parts of a CR-Net layer between its products, with their gradients: norm, gated MLP, attention.

    norm        x = w h / rms(h)          dh = (w dx - h <w dx, h> / (D rms^2)) / rms    dw = sum_tokens dx h / rms
    gate        g = silu(gate) up         d_up = dg silu(gate)       d_gate = dg up silu'(gate)
    attention   a graph of its own under autograd, so that any attention implementation gives its own gradients

Fresh memory is what elementwise work costs on a CPU: a new [1024, 1376] float32 tensor takes a page fault every 4 KiB,
longer than the multiplication that fills it. Whatever does not outlive a layer is therefore written into `Scratch`.

A flat file that imports only torch and transformers, so that a saved checkpoint can carry it. Letters: [B, T, D]
batch, tokens, hidden size; F the output width of a position; h hidden states, Y outputs of the linears.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

SILU = (nn.SiLU, type(ACT2FN["silu"]))

Outputs = dict[str, torch.Tensor]
"""Y of each position, [B, T, F]."""


class Scratch:
    """Memory by name that one layer after the other writes over, as large as the largest tensor asked for."""

    def __init__(self) -> None:
        self.buffers: dict[tuple, torch.Tensor] = {}

    def get(self, name: str, shape: Iterable[int], like: torch.Tensor, dtype: torch.dtype | None = None):
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
    """What the layers of one forward have in common: the arguments of a layer, and autocast as it was then."""

    arguments: dict  # attention_mask, position_embeddings, ...: keyword arguments of a decoder layer
    device_type: str
    autocast_dtype: torch.dtype | None = None
    scratch: Scratch = field(default_factory=Scratch)

    def __post_init__(self) -> None:
        if torch.is_autocast_enabled(self.device_type):
            self.autocast_dtype = torch.get_autocast_dtype(self.device_type)

    @property
    def attention_arguments(self) -> dict:
        own = ("position_embeddings", "past_key_values")
        return {name: value for name, value in self.arguments.items() if name not in own}

    def autocast(self) -> AbstractContextManager:
        """The forward's autocast, for what the backward runs again."""
        return torch.autocast(self.device_type, self.autocast_dtype, enabled=self.autocast_dtype is not None)


class Norm:
    """x = w h / rms(h), in the dtype of w: the root-mean-square norm of `modeling_crnet`, computed in h's dtype.

    Args:
        name: of its buffer, which the output fills until `gradients` writes over it.
        norm: a `CRNetRMSNorm`.
        h: [B, T, D], in float32 at least.
    """

    def __init__(self, name: str, norm: Any, h: torch.Tensor, scratch: Scratch) -> None:
        self.h = h
        self.buffer = scratch.get(name, h.shape, h)
        self.weight = norm.weight.to(h.dtype)
        mean_square = torch.pow(h, 2, out=self.buffer).mean(-1, keepdim=True)  # as torch.rms_norm does, bit for bit
        self.scale = mean_square.add_(norm.variance_epsilon).rsqrt_()  # 1 / rms(h), [B, T, 1]
        x = torch.mul(h, self.scale, out=self.buffer).mul_(self.weight)
        self.output = x.to(norm.weight.dtype)

    def gradients(self, dx: torch.Tensor, d_h: torch.Tensor, out: torch.Tensor):
        """dx [B, T, D], written over -> (d_h + dx/dh dx, into `out`; dw [D])."""
        h, scale = self.h, self.scale
        width = h.shape[-1]
        dx = dx.to(h.dtype)
        rows = torch.mul(dx, h, out=self.buffer).view(-1, width)
        d_weight = rows.t() @ scale.view(-1)
        along_h = (rows @ self.weight).view(scale.shape).mul_(scale.pow(3)).div_(-width)
        d_below = torch.addcmul(d_h, h, along_h, out=out)
        return d_below.addcmul_(dx.mul_(self.weight), scale), d_weight


class Gate:
    """act(Y_gate) Y_up of a gated MLP: by hand where act is SiLU, else under a small autograd graph."""

    def __init__(self, mlp: Any, Y: Outputs, dtype: torch.dtype, scratch: Scratch) -> None:
        self.gate, self.up = Y["gate"].to(dtype), Y["up"].to(dtype)
        self.graph: LocalGraph | None = None
        self.scratch = scratch
        if type(mlp.act_fn) not in SILU:
            self.graph = LocalGraph(lambda gate, up: mlp.gated(gate, up, dtype), self.gate, self.up)
            self.output = self.graph.output
            return
        self.activated = torch.ops.aten.silu.out(self.gate, out=self._buffer("activated"))
        self.output = torch.mul(self.activated, self.up, out=self._buffer("gated"))

    def _buffer(self, name: str) -> torch.Tensor:
        return self.scratch.get(name, self.gate.shape, self.gate)

    def gradients(self, d_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """d (act(Y_gate) Y_up) [B, T, F], written over -> (d Y_gate, d Y_up), good until the next layer's."""
        if self.graph is not None:
            return self.graph.gradients(d_output)
        d_up = self.activated.mul_(d_output)
        d_activated = d_output.mul_(self.up)
        return torch.ops.aten.silu_backward.grad_input(d_activated, self.gate, grad_input=d_activated), d_up


class LocalGraph:
    """outputs = function(*inputs) with an autograd graph of its own, cut off from the one outside."""

    def __init__(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
        # With gradients on in the forward too, which needs none of them: kernels may be chosen by it.
        with torch.enable_grad():
            self.leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            self.graphed = function(*self.leaves)
        self.output = self.graphed.detach()

    def gradients(
        self, d_output: torch.Tensor, parameters: Iterable[torch.Tensor] = (), keep_graph: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of the inputs, then of the parameters."""
        wanted = [*self.leaves, *parameters]
        return torch.autograd.grad(self.graphed, wanted, d_output.to(self.graphed.dtype), retain_graph=keep_graph)


class Rotary(torch.autograd.Function):
    """x cos + (-x_2, x_1) sin of halves x_1, x_2, and its transpose, in `Scratch`: RoPE as transformers' Llama has it.

    The same roundings as there, so that outputs are equal bit for bit.
    """

    @staticmethod
    def forward(ctx, name: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scratch: Scratch):
        """x [B, heads, T, head_dim], cos and sin [B, 1, T, head_dim] -> [B, heads, T, head_dim]."""
        ctx.name, ctx.cos, ctx.sin, ctx.scratch = name, cos, sin, scratch
        return Rotary.turn(name, x, cos, sin, scratch, sign=1)

    @staticmethod
    def backward(ctx, d):
        return None, Rotary.turn(f"d_{ctx.name}", d, ctx.cos, ctx.sin, ctx.scratch, sign=-1), None, None, None

    @staticmethod
    def turn(name: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scratch: Scratch, sign: int):
        batch, heads, length, width = x.shape
        half = width // 2
        dtype = torch.promote_types(x.dtype, cos.dtype)
        out = scratch.get(name, (batch, length, heads, width), x, dtype).transpose(1, 2)
        turned = scratch.get("turned", (batch, length, heads, half), x, dtype).transpose(1, 2)
        torch.mul(x, cos, out=out)
        sin_1, sin_2 = sin[..., :half], sin[..., half:]
        if sign < 0:
            sin_1, sin_2 = sin_2, sin_1
        out[..., :half].add_(torch.mul(x[..., half:], sin_1, out=turned), alpha=-sign)
        out[..., half:].add_(torch.mul(x[..., :half], sin_2, out=turned), alpha=sign)
        return out


class AttentionRun(LocalGraph):
    """The attention core from Y_q, Y_k, Y_v. Its graph may wait for the backward without holding q, k and v.

    Of what an attention implementation saves, the rotated q, k and v are made again from the Y they came from; only
    the rest is held (its output and its sums over the keys, 1h per token, where the implementation is a fused one).
    With `waits=False` they stay in `Scratch`: the gradients follow before the next layer's run.
    """

    def __init__(self, attention: Any, Y: Outputs, call: Call, dtype: torch.dtype, waits: bool = True) -> None:
        # The hooks below live in the graph, so they must not know the run, which holds it.
        self.held: list[torch.Tensor] = []
        self.rebuilt: list[torch.Tensor] = []
        leaves_of_graph: list[torch.Tensor] = []
        known: list[tuple] = []
        held, rebuilt = self.held, self.rebuilt

        def identity(tensor):
            return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype

        def heads(*leaves):
            return _heads(attention, leaves, call, dtype)

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
                    rebuilt.extend(heads(*leaves_of_graph))
            return rebuilt[packed]

        def attend(*leaves):
            leaves_of_graph.extend(leaves)
            query_key_value = heads(*leaves)
            if not waits:
                return attention.attend(*query_key_value, **call.attention_arguments)[0]
            known.extend(identity(tensor) for tensor in query_key_value)
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return attention.attend(*query_key_value, **call.attention_arguments)[0]

        super().__init__(attend, Y["q"], Y["k"], Y["v"])

    def gradients(self, d_output, parameters=(), keep_graph=False):
        gradients = super().gradients(d_output, parameters, keep_graph)
        self.rebuilt.clear()
        return gradients

    def output_given(self, d_output: torch.Tensor | None) -> torch.Tensor:
        return self.output

    def tensors(self) -> list[torch.Tensor]:
        return [*self.held, self.output]


def _heads(attention: Any, leaves: Iterable[torch.Tensor], call: Call, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Y_q, Y_k, Y_v -> queries, keys and values, rotated in `Scratch`."""

    def rotate(query, key, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return (
            Rotary.apply("query", query, cos, sin, call.scratch),
            Rotary.apply("key", key, cos, sin, call.scratch),
        )

    return attention.heads(*leaves, dtype, call.arguments["position_embeddings"], rotate)


__all__ = ["AttentionRun", "Call", "Gate", "LocalGraph", "Norm", "Outputs", "Scratch"]
