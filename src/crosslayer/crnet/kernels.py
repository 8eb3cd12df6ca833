"""Kernels for what a block computes beside plain products, where torch has better ones than its eager functions.

A policy that rebuilds states brings its own backward, around which a compiled model's graph breaks. The functions of
blocks and the sums over carried outputs are then compiled one by one: each goes over memory once forwards and once
backwards, where eager kernels go three to six times.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

OPTIONS: dict[str, Any] = {}
"""Keyword arguments of `torch.compile` for all of them, such as mode or backend; read when one is first compiled."""


@cache
def compiled(function: Callable) -> Callable:
    """The function as `torch.compile` makes it; a module's forward as one for all modules of its class."""
    return torch.compile(function, **OPTIONS)


def gradient_sums(
    local: torch.Tensor, above: torch.Tensor, factor: torch.Tensor, previous: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(G = dY_l + b G_{l+1}, written over G_{l+1}; <G, Y_{l-1}>, [1]) in one pass: all [..., F] but `factor`, [1]."""
    G = above.copy_(local + factor * above)
    return G, (G * previous).sum().view(1)


@cache
def adds_wide(device_type: str, narrow: torch.dtype) -> bool:
    """Whether `addmm` adds a product of two narrow matrices to a float32 one there and writes float32: b Y + T B in one
    pass. CUDA has it; tried once, for the answer as well."""
    if device_type == "cpu":
        return False
    try:
        ones, total = torch.ones(16, 16, dtype=narrow, device=device_type), torch.ones(16, 16, device=device_type)
        torch.addmm(total, ones, ones.t(), torch.float32, beta=0.5, alpha=-1.0, out=total)
        return bool((total == 0.5 - 16.0).all())
    except (RuntimeError, TypeError):
        return False
