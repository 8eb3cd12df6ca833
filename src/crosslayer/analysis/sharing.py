"""Which neighbouring blocks of a LoR2C adapter can share an A, from the spectra of what training put into it.

The module of block l updates the residual stream by W_l = (alpha / r) B_l A_l, [d, d]. Blocks that share an A of rank r
all read the stream through one row space of r directions. The best one for a group g holds the r largest singular
values of the group's updates, stacked one below the other (Eckart and Young), so that sharing loses

    loss(g) = sum_{i > r} sigma_i^2([W_l for l in g])        of        sum_{l in g} ||W_l||_F^2

and the best K groups of neighbours are those with the least sum, exact by dynamic programming (our choice; the paper,
arXiv 2503.00572, shares one A among all blocks or none). No [d, d] matrix is made: W_l and its core M_l = (alpha / r)
R_l A_l, [r, d], with B_l = Q_l R_l, have the same row space and singular values, and the squares of the sigma_i are
the eigenvalues of a diagonal block of one Gram matrix of all M_l.

What the spectra say depends on the run they come from. An A of its own begins in r random directions, and a short run
leaves it near them, so that the row spaces of two blocks lie apart mostly by chance. A short run with `share_A=True`
and a larger rank has all blocks read the same directions, and what they take from them can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from ..errors import ConfigError
from ..lor2c import AdaptedBlocks


@dataclass(frozen=True)
class ShareGroups:
    """Groups of neighbouring blocks, and what sharing an A within each of them loses."""

    starts: list[int]
    """The first block of every group: what `LoR2CConfig(share_A=...)` takes."""

    lost: float
    """Share of the updates' squared Frobenius norm outside the best common row space of their group, in [0, 1]."""

    lost_by_group: list[float]
    """The same within each group."""


def share_groups(model: nn.Module, groups: int, r: int | None = None, adapter_name: str | None = None) -> ShareGroups:
    """The contiguous groups of blocks that lose least when each group shares one A.

    Args:
        model: carries a trained LoR2C adapter, one module a block (shared A or not).
        groups: K, from 1 to the number of blocks.
        r: rank of the A that they are to share; None = the adapter's.
        adapter_name: None = the active adapter.

    Of equals, the groups that begin earliest. Raises ConfigError for a number of groups that the blocks do not allow,
    for a fused or injected adapter, for blocks of several widths, and for updates that are all zero.
    """
    losses, norms = _losses(model, r, adapter_name)
    blocks = len(norms)
    if not 1 <= groups <= blocks:
        raise ConfigError(f"groups={groups} must be from 1 to {blocks}, the number of the adapter's blocks.")
    best: list[dict[int, tuple[float, list[int]]]] = [{end: (losses[0][end], [0]) for end in range(1, blocks + 1)}]
    for number in range(2, groups + 1):
        best.append(
            {
                end: min(
                    (best[-1][first][0] + losses[first][end], [*best[-1][first][1], first])
                    for first in range(number - 1, end)
                )
                for end in range(number, blocks + 1)
            }
        )
    return _described(best[-1][blocks][1], losses, norms)


def sharing_loss(
    model: nn.Module, starts: Sequence[int], r: int | None = None, adapter_name: str | None = None
) -> ShareGroups:
    """What groups of one's own lose; `starts` as in `LoR2CConfig(share_A=...)`. Raises as `share_groups`."""
    losses, norms = _losses(model, r, adapter_name)
    if list(starts[:1]) != [0] or any(a >= b for a, b in pairwise([*starts, len(norms)])):
        raise ConfigError(
            f"starts={list(starts)} must be ascending numbers of blocks below {len(norms)}, the first of them 0."
        )
    return _described(list(starts), losses, norms)


def _described(starts: list[int], losses: list[dict[int, float]], norms: list[float]) -> ShareGroups:
    groups = list(pairwise([*starts, len(norms)]))
    lost = [losses[first][end] for first, end in groups]
    of_group = [sum(norms[first:end]) for first, end in groups]
    shares = [part / whole if whole else 0.0 for part, whole in zip(lost, of_group, strict=True)]
    return ShareGroups(starts, sum(lost) / sum(norms), shares)


def _losses(model: nn.Module, r: int | None, adapter_name: str | None) -> tuple[list[dict[int, float]], list[float]]:
    """[first block -> {end: loss of the group of blocks first to end - 1}], and ||W_l||_F^2 of every block."""
    blocks = AdaptedBlocks(model, adapter_name)
    structure = blocks.structure
    if structure.fuses or structure.injections:
        raise ConfigError(
            f"Groups are found for one module a block; the adapter has {structure.fuses} fuses and "
            f"{structure.injections} injections. Take one trained without them."
        )
    if r is not None and r < 1:
        raise ConfigError(f"r={r} must be at least 1, or None for the adapter's rank.")
    factors = [blocks.factors(span) for span in structure.spans]
    widths = sorted({A.shape[1] for A, _, _ in factors})
    if len(widths) > 1:
        raise ConfigError(f"Blocks of widths {widths} cannot share an A; adapt those of one width.")
    cores = [_core(*factor) for factor in factors]
    rank = r if r is not None else max(len(core) for core in cores)
    rows = [0]
    for core in cores:
        rows.append(rows[-1] + len(core))
    stacked = torch.cat(cores)
    gram = stacked @ stacked.T
    norms = [float(gram.diagonal()[low:high].sum()) for low, high in pairwise(rows)]
    if sum(norms) == 0:
        raise ConfigError("The adapter's updates are all zero (B starts so): train it first.")
    losses: list[dict[int, float]] = []
    for first in range(len(cores)):
        losses.append({})
        for end in range(first + 1, len(cores) + 1):
            squares = torch.linalg.eigvalsh(gram[rows[first] : rows[end], rows[first] : rows[end]])
            losses[-1][end] = float(squares[: max(0, len(squares) - rank)].clamp(min=0).sum())
    return losses, norms


def _core(A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """M [r, d] with W^T W = M^T M for W = scaling B A; float64, on the CPU."""
    A, B = A.detach().cpu().double(), B.detach().cpu().double()
    return scaling * torch.linalg.qr(B, mode="r").R @ A
