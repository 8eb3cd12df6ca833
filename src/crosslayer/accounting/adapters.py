"""Parameters of an adapter, by arithmetic: LoR2C and its variants beside LoRA.

Letters: D width of the residual stream, L blocks, r rank.

    LoR2C       2 D r L                       each fuse  - 2 D r (the discarded A and B)
    ShareLoR2C  D r + D r L                   each fuse  - D r (its B; A is everybody's)
    K groups    D r K + D r L                 each fuse  - D r, and - D r where it takes a group's last module
    Injection   - 2 D r + r' sum(in + out)    over the linears injected into: 0 for D x D query and value, r' = r / 2
    LoRA        r sum(in + out) L             over the linears adapted

The classifier that is trained beside either is not counted.
"""

from collections.abc import Sequence
from itertools import pairwise

Shape = tuple[int, int]
"""(in, out) features of a linear."""


def lora_parameters(num_blocks: int, linears: Sequence[Shape], r: int) -> int:
    """LoRA of rank r on some linears of each block, given as (in, out) features: query and value, for one."""
    return num_blocks * sum(r * (in_features + out_features) for in_features, out_features in linears)


def lor2c_parameters(
    hidden_size: int,
    num_blocks: int,
    r: int,
    share_A: bool | Sequence[int] = False,
    fuses: int = 0,
    injections: int = 0,
    inject_r: int | None = None,
    inject_linears: Sequence[Shape] | None = None,
) -> int:
    """LoR2C after some fuses and injections.

    Args:
        hidden_size: D.
        num_blocks: L.
        r: rank of every module.
        share_A: one A for all blocks, or the blocks at which a new A begins, as in LoR2CConfig. An A counts as long
            as one module is left to use it.
        fuses: pairs joined so far.
        injections: blocks injected so far.
        inject_r: rank of an injected pair; None = r // 2, at least 1.
        inject_linears: (in, out) features of a block's linears that are injected into; None = two of D x D.

    Raises ValueError for counts that the blocks do not allow, and where they leave open whether a group's A stays.
    """
    modules = num_blocks - fuses - injections
    if min(fuses, injections) < 0 or modules < 0 or (fuses and modules < 1):
        raise ValueError(f"{num_blocks} blocks do not allow {fuses} fuses and {injections} injections.")
    inject_r = max(1, r // 2) if inject_r is None else inject_r
    linears = [(hidden_size, hidden_size)] * 2 if inject_linears is None else inject_linears
    if isinstance(share_A, bool):
        count_A = min(modules, 1) if share_A else modules
    else:
        sizes = [end - first for first, end in pairwise([*share_A, num_blocks])]
        if not sizes or share_A[0] != 0 or min(sizes) < 1:
            raise ValueError(f"share_A={list(share_A)} names no groups of {num_blocks} blocks: ascending, from 0.")
        if modules and fuses + injections >= min(sizes):
            raise ValueError(
                f"{fuses} fuses and {injections} injections may take the last module of a group of {min(sizes)}, so "
                "that its A goes: count on the model, num_adapter_parameters()."
            )
        count_A = len(sizes) if modules else 0
    return hidden_size * r * (count_A + modules) + lora_parameters(injections, linears, inject_r)
