"""The linear layers that CR-Net and its low-rank relatives put in place of a dense one.

    X ──► A ──► (silu) ──► B ──► (+) ──► Y_l          Y_l = b Y_{l-1} + (X A) B
                                  ▲
    Y_{l-1} ──────── · b ─────────┘

Shapes: [..., in] is the input, [..., out] the output, r the rank. A and B are `nn.Linear`, so that LoRA, quantisation
and `target_modules="all-linear"` see them.
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
        """Width of x, as A has it."""
        return self.A.in_features

    @property
    def out_features(self) -> int:
        """Width of y, as B has it."""
        return self.B.out_features

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """act(A x): [..., in] -> [..., r]."""
        return self.activate(self.A(x))

    def activate(self, low_rank: torch.Tensor) -> torch.Tensor:
        """act, of what A gives: [..., r]."""
        return nn.functional.silu(low_rank) if self.activation == "silu" else low_rank

    def increment(self, x: torch.Tensor) -> torch.Tensor:
        """B act(A x): [..., in] -> [..., out]."""
        if not (is_row(x) and is_bare(self.A, x.dtype) and is_bare(self.B, x.dtype)):
            return self.B(self.low_rank(x))
        return row_product(self.activate(row_product(x, self.A.weight)), self.B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.increment(x)


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
        if is_row(x):
            return torch.add(self.increment(x), previous, alpha=self.b().item())
        return self.carry(self.low_rank(x), previous)

    def carry(self, low_rank: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """The same from act(A x) [..., r]."""
        is_plain = low_rank.dtype == previous.dtype and type(low_rank) is torch.Tensor
        if not (is_plain and is_bare(self.B, low_rank.dtype)):
            return self.b() * previous + self.B(low_rank)
        # The sum as part of the product, as in training (product.py): the same bits, and one pass over Y less.
        carried = (self.b() * previous).reshape(-1, previous.shape[-1])
        total = torch.addmm(carried, low_rank.reshape(-1, low_rank.shape[-1]), self.B.weight.t())
        return total.view(previous.shape)

    def extra_repr(self) -> str:
        """How beta started, its epsilon, and the activation, for `print(model)`."""
        return f"beta_init={self.beta_init}, beta_epsilon={self.beta_epsilon}, activation={self.activation}"


GIVES_INCREMENT: set[type] = {CrossLayerLinear}
"""Modules, by their exact type, of which Y_l = b Y_{l-1} + `increment(x)` holds; a mixture of experts adds itself."""


def b_of(beta: torch.Tensor, epsilon: float | torch.Tensor) -> torch.Tensor:
    """s(beta) (|beta| + eps), elementwise, with s(0) = +1.

    Written as beta ± eps, which is the same value, and has derivative 1 everywhere, at beta = 0 too, where
    sign(beta) (|beta| + eps) would be a dead 0 (our choice).
    """
    return torch.where(beta >= 0, beta + epsilon, beta - epsilon)


# One token at a time on a CPU, as batches of dot products: the BLAS product of a narrow matrix and a vector reaches
# half of the memory's speed only, 165 us for in = 256 and 1024 outputs in float32, 79 this way (two cores, weights not
# in the cache). Decoding at hidden 1024 runs at 1.75 of Llama's speed with it, at 1.13 without (our measurement).


def is_row(x: torch.Tensor) -> bool:
    """Whether x is the single row of a decoding step where this pays: float32 on a CPU, in eager mode."""
    return (
        x.numel() == x.shape[-1]
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) is torch.Tensor
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def is_bare(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether x may be multiplied with the linear's weight past its forward.

    Whatever replaced or watches the linear (LoRA, quantisation, hooks, offloading, a forward of its own) must be asked.
    """
    if type(linear) is not nn.Linear or linear.bias is not None or is_watched(linear):
        return False
    weight = linear.weight
    return type(weight) is nn.Parameter and weight.dtype == dtype and weight.device.type != "meta"


def is_watched(module: nn.Module) -> bool:
    """Whether somebody hooked the module or gave it a forward of its own: it must be called, not bypassed."""
    hooks = module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if "forward" in module.__dict__ or any(hooks):
        return True
    # transformers' recorder of outputs stays on the modules once installed, and sleeps unless asked.
    return any(hook.__module__ != "transformers.utils.output_capturing" for hook in module._forward_hooks.values())


def row_product(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """row [1, ..., in] with weight [out, in] -> [1, ..., out]."""
    return torch.linalg.vecdot(weight, row.reshape(1, -1)).view(*row.shape[:-1], -1)


def starting_std(config, in_features: int, out_features: int, rank: int) -> float:
    """Standard deviation of the numbers of A and of B where nothing is carried, as `low_rank_initializer_range` says.

    The largest singular value of n x m numbers N(0, s^2) is near s (n^(1/2) + m^(1/2)). That of A times that of B is
    the dense matrix's (our choice, with the measurement in docs/ablations.md).
    """
    of_dense = config.low_rank_initializer_range
    if of_dense == "cola":
        return ((in_features + out_features) * rank) ** -0.25
    wide, high, low = in_features**0.5, out_features**0.5, rank**0.5
    return ((of_dense or config.initializer_range) * (wide + high) / ((wide + low) * (high + low))) ** 0.5


def build_linear(config, layer_idx: int, position: str) -> nn.Module:
    """The linear of one position: dense, low rank or cross-layer, as the configuration says."""
    place = config.places(layer_idx)[position]
    rank = config.linear_rank(layer_idx, position)
    shape = place.in_features, place.out_features
    if rank is None:
        return nn.Linear(*shape, bias=place.bias)
    if not place.carries:
        return LowRankLinear(*shape, rank, place.bias, "silu" if config.factorization == "cola" else None)
    if layer_idx == 0 or config.starts_chain(layer_idx, position):
        return LowRankLinear(*shape, rank, place.bias, config.increment_activation)
    beta = config.beta_init, config.beta_epsilon, config.beta_trainable
    return CrossLayerLinear(*shape, rank, place.bias, config.increment_activation, *beta)
