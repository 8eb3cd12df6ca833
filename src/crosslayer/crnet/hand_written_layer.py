"""One CR-Net layer with its backward written by hand: forward, gradients, and the recurrence run backwards.

    forward     h_mid = h_{l-1} + Y_o         Y_l = b Y_{l-1} + T B,  T = act(X A)
                h_l   = h_mid + Y_down

    backward    G_l   = dY_l + b_{l+1} G_{l+1}              the gradient of Y_l, with what the next layer adds
                dT = G_l B^T    dB = T^T G_l    db = <G_l, Y_{l-1}>    dX = dU A^T    dA = X^T dU

    inversion   Y_{l-1} = (Y_l - T B) / b     h_{l-1} = h_l - Y_down - Y_o        (arXiv 2509.18993, Algorithm 1)

Here are the products and the carried sums; norms, attention and the gate are in hand_written_parts.py.

A flat file that imports only torch and its neighbours, so that a saved checkpoint can carry it. Letters: [B, T, D]
batch, tokens, hidden size; F the output width of a position, r the rank; h hidden states, Y outputs of the linears.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from .configuration_crnet import POSITIONS
from .cross_layer_linear import CrossLayerLinear, LowRankLinear
from .hand_written_parts import AttentionRun, Call, Gate, Norm, Outputs

NAME_OF = {p: f"{'self_attn' if p in ('q', 'k', 'v', 'o') else 'mlp'}.{p}_proj" for p in POSITIONS}
"""Where the linear of a position lies within a layer."""


def linears_of(layer: Any) -> dict[str, nn.Module]:
    """The linear of each position."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return dict(zip(POSITIONS, (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj), strict=True))


@dataclass
class State:
    """All that one layer hands to the next: hidden states [B, T, D] and the seven Y, in float32 at least."""

    h: torch.Tensor
    Y: Outputs

    def __post_init__(self) -> None:
        self.version = self.h._version

    def is_intact(self) -> bool:
        """Whether nobody has written over h, which others see too."""
        return self.h._version == self.version

    def tensors(self) -> list[torch.Tensor]:
        return [self.h, *self.Y.values()]


@dataclass
class Kept:
    """What a layer's forward leaves for its backward, beside states: the policy decides."""

    low_rank: Outputs | None = None  # U = X A of each position, [B, T, r]
    attention: AttentionRun | None = None
    random_state: list[torch.Tensor] | None = None

    def tensors(self) -> list[torch.Tensor]:
        attention = self.attention.tensors() if self.attention is not None else []
        return [*(self.low_rank or {}).values(), *attention, *(self.random_state or [])]


class Product:
    """The linear of one position: its weights, its b as a number, and what is done with them.

    A dense linear, as in the first layer, is the case without A and without b: T is X itself. Sums in place are written
    `addmm(..., out=)`: torch's FLOP counter does not know `addmm_`.
    """

    BLOCK = 256
    """Tokens; 128 and 512 are about as fast."""

    def __init__(self, position: str, linear: nn.Module, autocast_dtype: torch.dtype | None) -> None:
        self.name = NAME_OF[position]
        self.A: torch.Tensor | None = None
        self.activation: str | None = None
        last = linear
        if isinstance(linear, LowRankLinear):
            self.A, self.activation, last = linear.A.weight, linear.activation, linear.B
        self.last_name = f"{self.name}.B" if self.A is not None else self.name
        self.weight: torch.Tensor = last.weight  # type: ignore[assignment]
        self.bias: torch.Tensor | None = last.bias  # type: ignore[assignment]
        self.b: float | None = None
        self.dtype = self.weight.dtype
        if autocast_dtype is not None and self.dtype != torch.float64:
            self.dtype = autocast_dtype

    def low_rank(self, x: torch.Tensor) -> torch.Tensor | None:
        """U = X A: [B, T, in] -> [B, T, r]; None where the linear is dense."""
        return None if self.A is None else nn.functional.linear(x.to(self.dtype), self.A.to(self.dtype))

    def inner(self, x: torch.Tensor | None, U: torch.Tensor | None) -> torch.Tensor:
        """T = act(U), the input of the last product; X itself where the linear is dense."""
        if U is None:
            assert x is not None
            return x.to(self.dtype)
        return nn.functional.silu(U) if self.activation == "silu" else U

    def asks_input_last(self, U: torch.Tensor | None) -> bool:
        """Whether dX needs no X: all but an activation whose argument U is not at hand."""
        return U is not None or self.activation is None

    def advance(self, previous: torch.Tensor | None, T: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None):
        """Y_l = b Y_{l-1} + T B, into `out` (which may be Y_{l-1}), or a new tensor."""
        if previous is None:
            return self._increment(T).to(dtype)
        b = self.b
        assert b is not None
        if T.dtype != previous.dtype:
            return torch.add(self._increment(T), previous, alpha=b, out=out)
        out = torch.empty_like(previous, memory_format=torch.contiguous_format) if out is None else out
        self._add_increment(b, previous, 1.0, T, out)
        return out if self.bias is None else out.add_(self.bias)

    def retreat(self, Y: torch.Tensor, T: torch.Tensor) -> torch.Tensor:
        """Y_{l-1} = (Y_l - T B) / b, written over Y_l."""
        b = self.b
        assert b is not None
        if T.dtype != Y.dtype:
            return Y.sub_(self._increment(T)).div_(b)
        if self.bias is not None:
            Y.sub_(self.bias)
        self._add_increment(1 / b, Y, -1 / b, T, out=Y)
        return Y

    def _add_increment(self, scale: float, Y: torch.Tensor, alpha: float, T: torch.Tensor, out: torch.Tensor) -> None:
        """scale Y + alpha T B, without bias, into `out`, which may be Y.

        On a CPU scaled first, and in blocks that a core's cache holds: `addmm` with a beta goes over its sum twice. The
        same bits, and 1 to 5 % less of a step (MKL, float32; the busier the memory, the more).
        """
        Y_rows, T_rows, out_rows = (x.view(-1, x.shape[-1]) for x in (Y, T.contiguous(), out))
        weight = self.weight.to(self.dtype).t()
        if Y.device.type != "cpu":
            torch.addmm(Y_rows, T_rows, weight, beta=scale, alpha=alpha, out=out_rows)
            return
        for y, t, o in zip(*(x.split(self.BLOCK) for x in (Y_rows, T_rows, out_rows)), strict=True):
            torch.addmm(torch.mul(y, scale, out=o), t, weight, alpha=alpha, out=o)

    def _increment(self, T: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return nn.functional.linear(T, self.weight.to(self.dtype), bias)

    def backward(
        self,
        G: torch.Tensor,
        x: Callable[[], torch.Tensor],
        U: torch.Tensor | None,
        dx: torch.Tensor,
        add: bool,
        wanted: set[str],
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """G = dY_l [B, T, F] -> gradients of wanted parameters by name, and T; dX [B, T, in] into, or added to, `dx`.

        `x` gives X. Where U is there, or `asks_input_last`, it is asked when dX is written.
        """
        if not self.asks_input_last(U):
            U = self.low_rank(x())
        d_increment = G.reshape(-1, G.shape[-1]).to(self.dtype)
        d_rows, weight = d_increment, self.weight.to(self.dtype)
        if self.A is not None:
            d_rows, weight = d_increment @ weight, self.A.to(self.dtype)  # dT = G B^T
            if self.activation == "silu":
                assert U is not None
                d_rows = torch.ops.aten.silu_backward(d_rows, U.reshape(d_rows.shape))
        _product_into(dx.view(-1, dx.shape[-1]), d_rows, weight, add)  # dX = dU A^T

        gradients: dict[str, torch.Tensor] = {}
        wants_A = self.A is not None and f"{self.name}.A.weight" in wanted
        X = x() if U is None or wants_A else None
        if U is None and self.A is not None:
            assert X is not None
            U = self.low_rank(X)
        T = self.inner(X, U)
        if f"{self.last_name}.weight" in wanted:
            gradients[f"{self.last_name}.weight"] = d_increment.t() @ T.reshape(-1, T.shape[-1])  # dB = T^T G
        if f"{self.last_name}.bias" in wanted:
            gradients[f"{self.last_name}.bias"] = G.reshape(-1, G.shape[-1]).sum(0)
        if wants_A:
            assert X is not None
            gradients[f"{self.name}.A.weight"] = d_rows.t() @ X.reshape(-1, X.shape[-1]).to(self.dtype)  # dA = X^T dU
        return gradients, T


def _product_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, add: bool) -> None:
    """left right into, or added to, `out`, of whichever dtype."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=float(add), out=out)
    elif add:
        out.add_(left @ right)
    else:
        out.copy_(left @ right)


class HandWrittenLayer:
    """The equations above, for one layer and one call.

    Args:
        layer: the decoder layer, made of parts that `can_be_hand_written` knows.
        call: what it has in common with the other layers of this forward.
        b: b of each position, None in the first layer.
    """

    def __init__(self, layer: Any, call: Call, b: dict[str, float] | None) -> None:
        self.layer = layer
        self.call = call
        self.products = {p: Product(p, linear, call.autocast_dtype) for p, linear in linears_of(layer).items()}
        for position, value in (b or {}).items():
            self.products[position].b = value
        self.U: Outputs = {}

    # Forward

    def forward(
        self, h: torch.Tensor, previous: Outputs | None, in_place: bool, waits: bool
    ) -> tuple[State, AttentionRun | None]:
        """(h_{l-1}, Y_{l-1}) -> (h_l, Y_l), and the attention if it waits; the low-rank outputs stay in `self.U`.

        `in_place`: Y_l may be written over Y_{l-1}; `waits`: the backward wants the attention, unless it would rather
        run it again in one pass.
        """
        # First of all, where the h of two layers below was.
        h_mid = torch.empty_like(h, memory_format=torch.contiguous_format)
        Y: Outputs = {}
        x = self.normed("input_layernorm", h).output
        for position in ("q", "k", "v"):
            Y[position] = self._advance(position, x, h.dtype, previous, in_place)
        attention = self.attend(Y, x.dtype, waits)
        Y["o"] = self._advance("o", attention.output, h.dtype, previous, in_place)
        torch.add(h, Y["o"], out=h_mid)

        x = self.normed("post_attention_layernorm", h_mid).output
        for position in ("gate", "up"):
            Y[position] = self._advance(position, x, h.dtype, previous, in_place)
        gated = self.gate(Y, x.dtype).output
        Y["down"] = self._advance("down", gated, h.dtype, previous, in_place)
        return State(h_mid.add_(Y["down"]), Y), attention if waits else None

    def _advance(self, position, x, dtype, previous, in_place):
        product = self.products[position]
        U = product.low_rank(x)
        if U is not None:
            self.U[position] = U
        below = previous[position] if previous is not None else None
        return product.advance(below, product.inner(x, U), dtype, out=below if in_place else None)

    def normed(self, name: str, h: torch.Tensor) -> Norm:
        return Norm(name, getattr(self.layer, name), h, self.call.scratch)

    def attend(self, Y: Outputs, dtype: torch.dtype, waits: bool) -> AttentionRun:
        with self.call.autocast():
            return AttentionRun(self.layer.self_attn, Y, self.call, dtype, waits)

    def gate(self, Y: Outputs, dtype: torch.dtype) -> Gate:
        with self.call.autocast():
            return Gate(self.layer.mlp, Y, dtype, self.call.scratch)

    def replay(self, state: State, low_rank: Outputs, name: str) -> State:
        """The forward's additions once more, from the low-rank outputs: equal to the last bit.

        Written into `Scratch` under this name, good until another replay takes the same one.
        """
        Y = {}
        for position, product in self.products.items():
            T, previous = product.inner(None, low_rank[position]), state.Y[position]
            out = self.call.scratch.get(f"{name} {position}", previous.shape, previous)
            Y[position] = product.advance(previous, T, state.h.dtype, out)
        h = self.call.scratch.get(f"{name} h", state.h.shape, state.h)
        return State(torch.add(state.h, Y["o"], out=h).add_(Y["down"]), Y)

    # Backward

    def backward(self, step: "BackwardStep") -> torch.Tensor:
        """d h_l -> d h_{l-1}. Gradients of parameters are put into `step`, and Y_{l-1} where it is rebuilt."""
        self.U = step.low_rank
        # First of all, where that of two layers above was; the MLP borrows it.
        d_below = torch.empty_like(step.d_h, memory_format=torch.contiguous_format)
        d_mid = self._backward_mlp(step, h_mid=d_below)
        return self._backward_attention(step, d_mid, out=d_below)

    def _backward_mlp(self, step: "BackwardStep", h_mid: torch.Tensor) -> torch.Tensor:
        """d h_l -> d h_mid; `h_mid` gets the hidden states between attention and MLP."""
        scratch = self.call.scratch
        torch.add(step.h_below, step.Y["o"], out=h_mid)
        normed = self.normed("post_attention_layernorm", h_mid)
        x = normed.output
        gate = self.gate(step.Y, x.dtype)
        d_gated = scratch.get("d_gated", gate.output.shape, gate.output)
        self._backward_product("down", step.d_h, lambda: gate.output, d_gated, step)
        d_gate, d_up = gate.gradients(d_gated)
        dx = scratch.get("dx", x.shape, x)
        self._backward_product("gate", d_gate, lambda: x, dx, step)
        self._backward_product("up", d_up, lambda: x, dx, step, add=True)
        d_mid = scratch.get("d_mid", step.d_h.shape, step.d_h)
        return self._backward_norm("post_attention_layernorm", normed, dx, step.d_h, step, d_mid)

    def _backward_attention(self, step: "BackwardStep", d_mid: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """d h_mid -> d h_{l-1}, into `out`."""
        scratch = self.call.scratch
        normed = self.normed("input_layernorm", step.h_below)
        x = normed.output
        attention = self._attention(step, x.dtype)
        d_attended = scratch.get("d_attended", step.Y["q"].shape, x)
        is_written = self.products["o"].asks_input_last(self.U.get("o"))
        attended = partial(attention.output_given, d_attended if is_written else None)
        self._backward_product("o", d_mid, attended, d_attended, step)
        d_heads = attention.gradients(d_attended, keep_graph=step.keep_graph)
        del attention, attended
        dx = scratch.get("dx", x.shape, x)
        for position, d_head in zip(("q", "k", "v"), d_heads, strict=True):
            self._backward_product(position, d_head, lambda: x, dx, step, add=position != "q")
        return self._backward_norm("input_layernorm", normed, dx, d_mid, step, out)

    def _attention(self, step: "BackwardStep", dtype: torch.dtype) -> AttentionRun:
        """As it waited, else run again."""
        if step.attention is not None:
            return step.attention
        return step.attend_again(self, dtype)

    def _backward_product(
        self,
        position: str,
        d_Y: torch.Tensor,
        x: Callable[[], torch.Tensor],
        dx: torch.Tensor,
        step: "BackwardStep",
        add: bool = False,
    ) -> None:
        """d Y_l of one position -> d X into, or added to, `dx`; from here on Y_l may have become Y_{l-1}."""
        product = self.products[position]
        G = step.total_gradient(position, d_Y)
        gradients, T = product.backward(G, x, self.U.get(position), dx, add, step.wanted)
        step.gradients.update(gradients)
        if product.b is not None:
            previous = step.output_below(position, product, T)
            if f"{product.name}.beta" in step.wanted:  # db = <G, Y_{l-1}>, and db/dbeta = 1
                step.gradients[f"{product.name}.beta"] = torch.dot(G.view(-1), previous.reshape(-1)).view(1)

    def _backward_norm(self, name: str, normed: Norm, dx, d_h, step: "BackwardStep", out) -> torch.Tensor:
        d_below, d_weight = normed.gradients(dx, d_h, out)
        if f"{name}.weight" in step.wanted:
            step.gradients[f"{name}.weight"] = d_weight
        return d_below

    # The recurrence backwards, without gradients

    def rebuild_below(self, step: "BackwardStep") -> None:
        """Y_{l-1} of every position, for a layer that the gradients do not pass."""
        self.U = step.low_rank or self._low_rank_outputs(step)
        for position, product in self.products.items():
            step.output_below(position, product, product.inner(None, self.U[position]))

    def _low_rank_outputs(self, step: "BackwardStep") -> Outputs:
        """U = X A of every position; each X is used before the next one takes its memory."""
        found: Outputs = {}

        def project(positions: Iterable[str], x: torch.Tensor) -> None:
            for position in positions:
                U = self.products[position].low_rank(x)
                assert U is not None
                found[position] = U

        x = self.normed("input_layernorm", step.h_below).output
        project(("q", "k", "v"), x)
        project(("o",), step.attend_again(self, x.dtype).output)
        x = self.normed("post_attention_layernorm", step.h_below + step.Y["o"]).output
        project(("gate", "up"), x)
        project(("down",), self.gate(step.Y, x.dtype).output)
        return found


@dataclass
class BackwardStep:
    """What goes in and out of the backward of one layer.

    Goes in: the state after the layer, the hidden states before it, the gradient of its hidden states, and G of the
    layer above with its b. Comes out: gradients by parameter name, G of this layer, Y of the layer below.
    """

    h_below: torch.Tensor
    Y: Outputs
    d_h: torch.Tensor
    low_rank: Outputs = field(default_factory=dict)
    attention: AttentionRun | None = None
    attend_again: Callable = lambda layer, dtype: None
    G_above: Outputs = field(default_factory=dict)
    b_above: dict[str, float] = field(default_factory=dict)
    kept_below: State | None = None
    inverts: bool = True
    wanted: set[str] = field(default_factory=set)
    keep_graph: bool = False
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    G: Outputs = field(default_factory=dict)
    Y_below: Outputs = field(default_factory=dict)
    drifts: list[torch.Tensor] = field(default_factory=list)

    def total_gradient(self, position: str, local: torch.Tensor) -> torch.Tensor:
        """G_l = dY_l + b_{l+1} G_{l+1}, written over G_{l+1}."""
        above = self.G_above.pop(position, None)
        if above is None:
            G = local.to(self.h_below.dtype, memory_format=torch.contiguous_format, copy=True)
        else:
            G = torch.add(local, above, alpha=self.b_above[position], out=above)
        self.G[position] = G
        return G

    def output_below(self, position: str, product: Product, T: torch.Tensor) -> torch.Tensor:
        """Y_{l-1}: as it was kept, else rebuilt in place of Y_l. Where both are at hand they are compared."""
        kept = self.kept_below.Y[position] if self.kept_below is not None else None
        if self.inverts:
            rebuilt = product.retreat(self.Y[position], T)
            if kept is not None:  # in units of the lowest state that is used, Y_l: before this division by b
                assert product.b is not None
                self.drifts.append(relative_difference(rebuilt, kept) * min(1.0, abs(product.b)))
        self.Y_below[position] = kept if kept is not None else rebuilt
        return self.Y_below[position]


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|actual - expected| / |expected|; `actual` is overwritten. A 0-dim tensor, infinite for anything not finite."""
    norm = torch.linalg.vector_norm(expected).clamp_min(torch.finfo(expected.dtype).tiny)
    difference = torch.linalg.vector_norm(actual.sub_(expected)) / norm
    return torch.nan_to_num(difference, nan=torch.inf)


def parameters_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Its parameters by name, shared ones under each of their names."""
    return {
        prefix + name: parameter
        for prefix, module in _walk(layer)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    # torch's own walk keeps a set of what it met: with it, twice a layer, a fifth of a small model's forward.
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.")


def can_be_hand_written(layer: nn.Module) -> bool:
    """Whether every part of the layer is what the equations above describe.

    A linear that was replaced (LoRA, quantisation), a weight that is no plain tensor (tensor parallel) or a module
    that somebody watches with hooks must be asked, not bypassed.
    """
    for linear in linears_of(layer).values():
        if not _is_plain_linear(linear):
            return False
    for _, module in _walk(layer):
        for parameter in module._parameters.values():
            if parameter is not None and type(parameter) not in (nn.Parameter, torch.Tensor):
                return False
        if module is not layer and is_watched(module):
            return False
    return True


def _is_plain_linear(linear: nn.Module) -> bool:
    if type(linear) in (LowRankLinear, CrossLayerLinear):
        return type(linear.A) is nn.Linear and type(linear.B) is nn.Linear and linear.A.bias is None
    return type(linear) is nn.Linear


def is_watched(module: nn.Module) -> bool:
    if "forward" in module.__dict__ or module._backward_hooks or module._backward_pre_hooks:
        return True
    if module._forward_pre_hooks:
        return True
    if not module._forward_hooks:
        return False
    # transformers' recorder of attention weights stays on the modules once installed, and sleeps unless asked.
    return any(hook.__module__ != "transformers.utils.output_capturing" for hook in module._forward_hooks.values())


__all__ = [
    "BackwardStep",
    "Call",
    "HandWrittenLayer",
    "Kept",
    "State",
    "can_be_hand_written",
    "linears_of",
    "parameters_of",
    "relative_difference",
]
