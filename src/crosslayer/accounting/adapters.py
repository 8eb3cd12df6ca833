"""Parameters of an adapter, by arithmetic: LoR2C and its variants beside LoRA.

Letters: D width of the residual stream, L blocks, r rank.

    LoR2C       2 D r L                       each fuse  - 2 D r (the discarded A and B)
    ShareLoR2C  D r + D r L                   each fuse  - D r (its B; A is everybody's)
    Injection   - 2 D r + r' sum(in + out)    over the linears injected into: 0 for D x D query and value, r' = r / 2
    LoRA        r sum(in + out) L             over the linears adapted

The classifier that is trained beside either is not counted.
"""

from collections.abc import Sequence

Shape = tuple[int, int]
"""(in, out) features of a linear."""


def lora_parameters(num_blocks: int, linears: Sequence[Shape], r: int) -> int:
    """LoRA of rank r on some linears of each block, given as (in, out) features: query and value, for one."""
    return num_blocks * sum(r * (in_features + out_features) for in_features, out_features in linears)


def lor2c_parameters(
    hidden_size: int,
    num_blocks: int,
    r: int,
    share_A: bool = False,
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
        share_A: one A for all blocks, counted as long as one module is left to use it.
        fuses: pairs joined so far.
        injections: blocks injected so far.
        inject_r: rank of an injected pair; None = r // 2, at least 1.
        inject_linears: (in, out) features of a block's linears that are injected into; None = two of D x D.
    """
    modules = num_blocks - fuses - injections
    if min(fuses, injections) < 0 or modules < 0 or (fuses and modules < 1):
        raise ValueError(f"{num_blocks} blocks do not allow {fuses} fuses and {injections} injections.")
    inject_r = max(1, r // 2) if inject_r is None else inject_r
    linears = [(hidden_size, hidden_size)] * 2 if inject_linears is None else inject_linears
    count_A = min(modules, 1) if share_A else modules
    return hidden_size * r * (count_A + modules) + lora_parameters(injections, linears, inject_r)
