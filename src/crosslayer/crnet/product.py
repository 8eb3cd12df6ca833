"""The linear of one position under a memory policy: the one place that multiplies with its weights.

    forward     Y_l = b Y_{l-1} + T B,  T = act(U),  U = X A
    backward    dT = G B^T    dB = T^T G    dX = dU A^T    dA = X^T dU          G the gradient of Y_l
    inversion   Y_{l-1} = (Y_l - T B) / b                                       (arXiv 2509.18993, Algorithm 1)

What is kept of it is the smallest tensor from which the increment follows by a cheap known map: U where A and B are
plain linears; the increment itself where anything replaced or watches them (LoRA, quantisation, hooks), or where there
is more to it (a mixture of experts). Those are `OpaqueProduct`s: asked under a graph of their own, never bypassed.

Letters: [B, T, D] batch, tokens, hidden size; F the output width of a position, r the rank.
"""

from typing import Any

import torch
from torch import nn

from .cross_layer_linear import CrossLayerLinear, LowRankLinear, is_watched
from .kernels import adds_wide
from .local_graph import Call, Gradients, LocalGraph, is_plain


class Product:
    """A dense linear, or one of plain factors: its weights, its b as a number, and what is done with them.

    A dense linear, as in the first layer, is the case without A and without b: T is X itself. Sums in place are written
    `addmm(..., out=)`: torch's FLOP counter does not know `addmm_`.
    """

    BLOCK = 256
    """Tokens; 128 and 512 are about as fast."""

    needs_previous = False

    def __init__(self, name: str, linear: Any, b: float | None, autocast_dtype: torch.dtype | None) -> None:
        self.name, self.b = name, b
        self.A: torch.Tensor | None = None
        self.activation: str | None = None
        last = linear
        if isinstance(linear, LowRankLinear):
            self.A, self.activation, last = linear.A.weight, linear.activation, linear.B
        self.last_name = f"{name}.B" if self.A is not None else name
        self.weight: torch.Tensor = last.weight
        self.bias: torch.Tensor | None = last.bias
        self.dtype = self.weight.dtype
        if autocast_dtype is not None and self.dtype != torch.float64:
            self.dtype = autocast_dtype

    @staticmethod
    def fits(linear: Any, parameters: dict[str, torch.Tensor]) -> bool:
        """Whether its weights, and its factors, are plain, and nobody watches those."""
        factors = [linear.A, linear.B] if isinstance(linear, LowRankLinear) else []
        known = all(type(factor) is nn.Linear and not is_watched(factor) for factor in factors)
        return known and is_plain(parameters) and (not factors or linear.A.bias is None)

    # Forward

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """What is kept: U = X A [B, T, r]; where the linear is dense, X itself."""
        x = x.to(self.dtype)
        return x if self.A is None else nn.functional.linear(x, self.A.to(self.dtype))

    def inner(self, U: torch.Tensor) -> torch.Tensor:
        """T = act(U), the input of the last product."""
        return nn.functional.silu(U) if self.activation == "silu" else U

    def output(self, U: torch.Tensor) -> torch.Tensor:
        """T B with its bias, in the dtype of the product: Y of a position that does not build on another."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return nn.functional.linear(self.inner(U), self.weight.to(self.dtype), bias)

    def advance(self, previous: torch.Tensor, U: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Y_l = b Y_{l-1} + T B, into `out` (which may be Y_{l-1}), or a new tensor."""
        b, T = self.b, self.inner(U)
        assert b is not None
        if T.dtype != previous.dtype and not adds_wide(T.device.type, T.dtype):
            return torch.add(self.output(U), previous, alpha=b, out=out)
        out = torch.empty_like(previous, memory_format=torch.contiguous_format) if out is None else out
        self._add_increment(b, previous, 1.0, T, out)
        return out if self.bias is None else out.add_(self.bias)

    def retreat(self, Y: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Y_{l-1} = (Y_l - T B) / b, written over Y_l."""
        b, T = self.b, self.inner(U)
        assert b is not None
        if T.dtype != Y.dtype and not adds_wide(T.device.type, T.dtype):
            return Y.sub_(self.output(U)).div_(b)
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
        if Y.device.type != "cpu" or T.dtype != Y.dtype:
            wide = (Y.dtype,) if T.dtype != Y.dtype else ()
            torch.addmm(Y_rows, T_rows, weight, *wide, beta=scale, alpha=alpha, out=out_rows)
            return
        for y, t, o in zip(*(x.split(self.BLOCK) for x in (Y_rows, T_rows, out_rows)), strict=True):
            torch.addmm(torch.mul(y, scale, out=o), t, weight, alpha=alpha, out=o)

    # Backward

    def backward(
        self, G: torch.Tensor, x: torch.Tensor, U: torch.Tensor, dx: torch.Tensor, add: bool, found: Gradients
    ) -> None:
        """G = dY_l [B, T, F] -> dX [B, T, in] into, or added to, `dx`; gradients of wanted parameters into `found`.

        `U` is what `first` gave.
        """
        d_increment = G.reshape(-1, G.shape[-1]).to(self.dtype)
        d_rows, weight = d_increment, self.weight.to(self.dtype)
        if self.A is not None:
            d_rows, weight = self.whole_gradient(d_increment @ weight), self.A.to(self.dtype)  # dT = G B^T
            if self.activation == "silu":
                d_rows = torch.ops.aten.silu_backward(d_rows, U.reshape(d_rows.shape))
        _product_into(dx.view(-1, dx.shape[-1]), d_rows, weight, add)  # dX = dU A^T
        if f"{self.last_name}.weight" in found.wanted:
            T = self.inner(U)
            found.found[f"{self.last_name}.weight"] = d_increment.t() @ T.reshape(-1, T.shape[-1])  # dB = T^T G
        if f"{self.last_name}.bias" in found.wanted:
            found.found[f"{self.last_name}.bias"] = G.reshape(-1, G.shape[-1]).sum(0)
        if self.A is not None and f"{self.name}.A.weight" in found.wanted:
            X = x.reshape(-1, x.shape[-1]).to(self.dtype)
            found.found[f"{self.name}.A.weight"] = d_rows.t() @ X  # dA = X^T dU

    @staticmethod
    def whole_gradient(part: torch.Tensor) -> torch.Tensor:
        """dT [B T, r], or db = <G, Y_{l-1}> [1], as it goes on."""
        return part


def _product_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, add: bool) -> None:
    """left right into, or added to, `out`, of whichever dtype."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=float(add), out=out)
    elif add:
        out.add_(left @ right)
    else:
        out.copy_(left @ right)


class OpaqueProduct:
    """A linear that only its own forward knows, its increment under a local graph.

    A `CrossLayerLinear` whose factors were replaced gives its `increment`, and so does a mixture of experts, which
    also chooses first (`choice`, kept by every policy: a rebuilt X may choose others). A linear that is watched or
    replaced as a whole while it builds on Y_{l-1} is run as a whole, and needs the state below to be kept
    (`needs_previous`).
    """

    def __init__(
        self, name: str, linear: Any, b: float | None, builds_on_previous: bool, parameters, call: Call
    ) -> None:
        self.name, self.linear, self.b, self.call = name, linear, b, call
        self.parameters: dict[str, torch.Tensor] = parameters
        self.needs_previous = builds_on_previous and b is None

    def choose(self, x: torch.Tensor) -> torch.Tensor | None:
        """The experts of each token, where there are any."""
        choice = None if self.needs_previous else getattr(self.linear, "choice", None)
        if choice is None:
            return None
        with torch.no_grad(), self.call.autocast():
            return choice(x)

    def run(
        self, x: torch.Tensor, previous: torch.Tensor | None, choice: torch.Tensor | None, waits: bool = False
    ) -> LocalGraph:
        """The increment, or all of Y_l where it `needs_previous`."""
        function = self.linear if self.b is None and choice is None else self.linear.increment
        inputs = [x.clone() if waits else x]  # x lies in memory that the next layer writes over
        if self.needs_previous:
            assert previous is not None
            inputs.append(previous)
        arguments = {} if choice is None else {"choice": choice}
        with self.call.autocast():
            return LocalGraph(lambda *tensors: function(*tensors, **arguments), inputs, self.parameters, waits)

    whole_gradient = staticmethod(Product.whole_gradient)

    def output(self, increment: torch.Tensor) -> torch.Tensor:
        """Y of a position that does not build on another: the increment itself."""
        return increment

    def advance(self, previous: torch.Tensor, increment: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Y_l = b Y_{l-1} + increment."""
        assert self.b is not None
        return torch.add(increment, previous, alpha=self.b, out=out)

    def retreat(self, Y: torch.Tensor, increment: torch.Tensor) -> torch.Tensor:
        """Y_{l-1} = (Y_l - increment) / b, written over Y_l."""
        assert self.b is not None
        return Y.sub_(increment).div_(self.b)


PRODUCTS: dict[type, type[Product]] = {nn.Linear: Product, LowRankLinear: Product, CrossLayerLinear: Product}
"""Which products may stand for a linear, by its exact type; all else is opaque."""


def product_of(
    name: str, linear: nn.Module, b: float | None, builds_on_previous: bool, parameters: dict, strays: dict, call: Call
) -> Product | OpaqueProduct:
    """The product of a linear at this path.

    `parameters` are all those below it, beta aside, by name; `strays` those that a hook on it may use.
    """
    kind = PRODUCTS.get(type(linear))
    if kind is not None and not is_watched(linear) and kind.fits(linear, parameters):
        return kind(name, linear, b, call.autocast_dtype)
    return OpaqueProduct(name, linear, b, builds_on_previous, parameters | strays, call)
