"""Spectron: orthogonalised momentum of two factors, in steps that bound how far their product moves.

    W = B A        A [r, in], B [out, r]

    ||(B + dB)(A + dA) - B A|| <= ||dB|| ||A|| + ||B|| ||dA|| + ||dB|| ||dA||            (spectral norms)

With ||dA|| and ||dB|| at most s = eta / (||A|| + ||B|| + 1) and s <= 1 this is at most eta: Spectron, arXiv 2602.12429,
algorithm 1, as NVIDIA's Emerging-Optimizers states it. Ours differs in three choices, each said where it is made: the
momentum, a last step of the orthogonalisation, and what eta is.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .parallel import whole

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Of Newton-Schulz as in `torch.optim.Muon`: https://kellerjordan.github.io/posts/muon/."""

FIRST_ITERATIONS = 20
"""Of the power method where a vector is new; later ones start from the last one's and take one iteration a step, as
algorithm 3 of arXiv 2602.12429, since factors move little."""


class Spectron(torch.optim.Optimizer):
    """Steps factors in pairs; both of a pair, or none, have a gradient.

    Momentum and its settings are `torch.optim.Muon`'s (our choice: the two then differ in the size of a step alone;
    `momentum=0.9, nesterov=False` is the paper's). Weight decay is decoupled and no part of the bound.

    Args:
        params: parameters A1, B1, A2, B2, ..., or groups of such; A [r, in], B [out, r].
        lr: the bound eta on the change of B A, times what `adjust_lr_fn` says.
        weight_decay: factors are multiplied with 1 - lr * weight_decay first.
        momentum, nesterov: of the gradients' running mean.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: as `torch.optim.Muon` has it for a matrix [out, in]: "original" or None, sqrt(max(1, out / in));
            "match_rms_adamw", 0.2 sqrt(max(out, in)), the norm of a full-rank matrix's step there (our choice: so one
            learning rate means the same for a matrix and for factors in its place).

    State of each parameter: `momentum_buffer`, like the parameter; `power_vector` [r], in its dtype.

    Raises ValueError for settings out of range and for parameters that are no pairs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1 or ns_steps < 1:
            raise ValueError(
                f"lr={lr} and weight_decay={weight_decay} must be at least 0, momentum={momentum} in [0, 1), "
                f"ns_steps={ns_steps} at least 1"
            )
        product_rate(lr, adjust_lr_fn, 1, 1)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for A, B in pairs_of(group["params"]):
                if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                    raise ValueError(f"A [r, in] and B [out, r] are wanted, not {list(A.shape)} and {list(B.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every pair that has gradients; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for A, B in pairs_of(group["params"]):
                if A.grad is not None and B.grad is not None:
                    self._step_pair(A, B, group)
        return loss

    def _step_pair(self, A: torch.Tensor, B: torch.Tensor, group: dict[str, Any]) -> None:
        directions = [orthogonalized(whole(self._momentum(factor, group)), group["ns_steps"]) for factor in (A, B)]
        norms = self._norm(A, whole(A)) + self._norm(B, whole(B).mT)
        size = product_rate(group["lr"], group["adjust_lr_fn"], B.shape[0], A.shape[1]) / (norms + 1)
        for factor, direction in zip((A, B), directions, strict=True):
            factor.mul_(1 - group["lr"] * group["weight_decay"])
            factor.sub_(like(direction * size, factor))

    def _momentum(self, factor: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """The running mean of the gradients, with Nesterov's look ahead, as in `torch.optim.Muon`."""
        state, gradient = self.state[factor], factor.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean

    def _norm(self, factor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The spectral norm of a factor as `matrix` [r, n]; keeps its vector as state, in the factor's dtype, which
        is what a checkpoint brings back."""
        state, iterations = self.state[factor], 1
        matrix = at_least_float32(matrix)
        if "power_vector" not in state:
            start = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0))
            state["power_vector"], iterations = (start / start.norm()).to(matrix.device, factor.dtype), FIRST_ITERATIONS
        norm, vector = spectral_norm(matrix, state["power_vector"].to(matrix.dtype), iterations)
        state["power_vector"] = vector.to(factor.dtype)
        return norm


def pairs_of(params: list[torch.Tensor]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """(A1, B1), (A2, B2), ... Raises ValueError for an odd number."""
    return zip(params[::2], params[1::2], strict=True)


def product_rate(lr: float, adjust_lr_fn: str | None, out_features: int, in_features: int) -> float:
    """eta for a product [out, in]. The rules are `torch.optim.Muon`'s: of its author's post, and of arXiv 2502.16982.

    Raises ValueError for a rule of another name.
    """
    if adjust_lr_fn in (None, "original"):
        return lr * math.sqrt(max(1, out_features / in_features))
    if adjust_lr_fn == "match_rms_adamw":
        return lr * 0.2 * math.sqrt(max(out_features, in_features))
    raise ValueError(f"adjust_lr_fn={adjust_lr_fn!r} is neither original nor match_rms_adamw")


def orthogonalized(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V^T of matrix = U S V^T, in float32 or wider, with no singular value above 1; zeros stay zeros.

    Newton-Schulz with the coefficients of `torch.optim.Muon` leaves singular values between 0.68 and 1.2. Our choice: a
    last step x -> 1.5 x - 0.5 x^3, which is 1 at most for all x in [0, sqrt(3)], so that the bound on the step holds.
    In float32, since factors are narrow: their products are small beside the model's own.
    """
    x = at_least_float32(matrix)
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = torch.addmm(x, x @ x.mT, x, beta=1.5, alpha=-0.5)
    return x.mT if is_tall else x


def spectral_norm(matrix: torch.Tensor, vector: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the largest singular value of matrix [r, n], from below; the left vector [r] that it was found with).

    The power method on M M^T from `vector` [r] of length 1, which stays what it was where M is zero.
    """
    for _ in range(iterations):
        found = matrix @ (matrix.mT @ vector)
        length = found.norm()
        vector = torch.where(length > 0, found / length, vector)
    return (matrix.mT @ vector).norm(), vector


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself in float32 and float64, else in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def like(update: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same in every process, divided as the parameter is."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(parameter, DTensor):
        return update
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=parameter.placements)


__all__ = ["Spectron", "orthogonalized", "pairs_of", "product_rate", "spectral_norm"]
