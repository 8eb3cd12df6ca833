"""The linear layers that CR-Net and its low-rank relatives put in place of a dense one.

    X ──► A ──► (silu) ──► B ──► (+) ──► Y_l          Y_l = b Y_{l-1} + (X A) B
                                  ▲
    Y_{l-1} ──────── · b ─────────┘

A flat file that imports only torch, so that a saved checkpoint can carry it. Shapes: [..., in] is the input, [..., out]
the output, r the rank. A and B are `nn.Linear`, so that LoRA, quantisation and `target_modules="all-linear"` see them.
"""

import torch
from torch import nn


class LowRankLinear(nn.Module):
    """y = B act(A x): plain low rank, or CoLA (arXiv 2502.10940) with `activation="silu"`.

    Args:
        in_features, out_features: widths of x and y.
        rank: width between A [r, in] and B [out, r].
        bias: whether B has a bias.
        activation: None or "silu", applied to A x.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = False, activation: str | None = None
    ) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=bias)
        self.activation = activation

    @property
    def in_features(self) -> int:
        return self.A.in_features

    @property
    def out_features(self) -> int:
        return self.B.out_features

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """act(A x): [..., in] -> [..., r]."""
        low_rank = self.A(x)
        return nn.functional.silu(low_rank) if self.activation == "silu" else low_rank

    def _is_row(self, x: torch.Tensor) -> bool:
        return (
            x.numel() == x.shape[-1]
            and x.dtype == torch.float32  # others gain nothing
            and not torch.is_grad_enabled()
            and is_plain(x)
            and is_bare(self.A, x.dtype)
            and is_bare(self.B, x.dtype)
        )

    def _row(self, x: torch.Tensor) -> torch.Tensor:
        """[1, ..., in] -> [1, ..., out]."""
        low_rank = row_product(x, self.A.weight)
        if self.activation == "silu":
            low_rank = nn.functional.silu(low_rank)
        return row_product(low_rank, self.B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self._row(x) if self._is_row(x) else self.B(self.low_rank(x))


class CrossLayerLinear(LowRankLinear):
    """Y_l = b Y_{l-1} + (X A) B, b = s(beta) (|beta| + eps), s(0) = +1: CR-Net, arXiv 2509.18993.

    beta is an `nn.Parameter` of shape [1] (FSDP2 refuses 0-dim parameters).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        activation: str | None = None,
        beta_init: float = 1.0,
        beta_epsilon: float = 1e-6,
        beta_trainable: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, activation)
        self.beta_init = beta_init
        self.beta_epsilon = beta_epsilon
        self.beta = nn.Parameter(torch.full((1,), float(beta_init)), requires_grad=beta_trainable)

    def b(self) -> torch.Tensor:
        """s(beta) (|beta| + eps), shape [1], never zero."""
        return b_of(self.beta, self.beta_epsilon)

    def forward(self, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """x [..., in] and the previous layer's output [..., out] -> [..., out] in `previous`'s dtype or wider."""
        if self._is_row(x):
            beta = self.beta.item()
            b = beta + self.beta_epsilon if beta >= 0 else beta - self.beta_epsilon
            return torch.add(self._row(x), previous, alpha=b)
        low_rank = self.low_rank(x)
        if low_rank.dtype == previous.dtype and is_plain(low_rank) and is_bare(self.B, low_rank.dtype):
            return _CrossLayerProduct.apply(previous, low_rank, self.B.weight, self.b())
        return self.b() * previous + self.B(low_rank)

    def extra_repr(self) -> str:
        return f"beta_init={self.beta_init}, beta_epsilon={self.beta_epsilon}, activation={self.activation}"


def is_plain(x: torch.Tensor) -> bool:
    """Whether x is an ordinary tensor on a CPU, in eager mode.

    Reading b as a number would stall an accelerator and break a compiled graph; a fake tensor has none.
    """
    return (
        x.device.type == "cpu"
        and type(x) is torch.Tensor
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def is_bare(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether x may be multiplied with the linear's weight past its forward.

    Anything that replaced or watches the linear (LoRA, quantisation, hooks) must be asked, not bypassed.
    """
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
        and linear.weight.dtype == dtype
    )


def row_product(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """row [1, ..., in] with weight [out, in] -> [1, ..., out], as a batch of dot products: for decoding on a CPU.

    79 us instead of 165 for in = 256 and 1024 outputs in float32, 180 instead of 406 for 2752, 84 instead of 97 for
    in = 1024 and 256 outputs (two cores, weights not in the cache, our measurement): the BLAS product of a narrow
    matrix and a vector reaches half of the memory's speed only.
    """
    return torch.linalg.vecdot(weight, row.reshape(1, -1)).view(*row.shape[:-1], -1)


def b_of(beta: torch.Tensor, epsilon: float) -> torch.Tensor:
    """s(beta) (|beta| + eps), elementwise, with s(0) = +1.

    Written as beta ± eps, which is the same value, and has derivative 1 everywhere, at beta = 0 too, where
    sign(beta) (|beta| + eps) would be a dead 0 (our choice).
    """
    return beta + torch.where(beta >= 0, epsilon, -epsilon)


class _CrossLayerProduct(torch.autograd.Function):
    """b Y_{l-1} + T B^T as one `addmm`, with the gradient of b as one dot product.

    Written with autograd's own operations the sum and its gradients pass over [tokens, out] eleven times, here seven.
    On one CPU core in float32 (hidden 512, 8 layers, 1024 tokens) a CR-Net training step takes 0.83 of the time.
    Backward is made of differentiable operations, so second derivatives are right as well.
    """

    @staticmethod
    def forward(ctx, previous, low_rank, weight, b):
        """previous [..., out], low_rank [..., r], weight [out, r], b [1] -> [..., out]."""
        ctx.save_for_backward(previous, low_rank, weight, b)
        out_features, rank = weight.shape
        flat = torch.addmm(previous.reshape(-1, out_features), low_rank.reshape(-1, rank), weight.t(), beta=b.item())
        return flat.view(previous.shape)

    @staticmethod
    def backward(ctx, gradient):
        previous, low_rank, weight, b = ctx.saved_tensors
        needs_previous, needs_low_rank, needs_weight, needs_b = ctx.needs_input_grad
        out_features, rank = weight.shape
        flat = gradient.reshape(-1, out_features)
        return (
            gradient * b if needs_previous else None,
            (flat @ weight).view(low_rank.shape) if needs_low_rank else None,
            flat.t() @ low_rank.reshape(-1, rank) if needs_weight else None,
            torch.dot(gradient.reshape(-1), previous.reshape(-1)).view(1) if needs_b else None,
        )


__all__ = ["CrossLayerLinear", "LowRankLinear", "b_of"]
