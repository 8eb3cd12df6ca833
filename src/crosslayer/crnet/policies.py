"""The table of memory policies: what each keeps of a training step's activations for the backward.

    policy       keeps                                                  rebuilds
    none         every state, X A, and what the attention saved         nothing
    invert       X A, and states where the inversion would lose digits  states downwards, by inversion
    replay       X A, and the state every N layers                      states upwards: equal to `none` bit for bit
    reversible   the state every N layers                               everything, by inversion

The state is what one block hands to the next: the hidden states h and the output Y of every position that carries.
Positions that do not carry keep X A under every policy, so that what they added to h can be taken away again.

Imports nothing heavy, so that accounting reads this table and needs neither torch nor transformers.
"""

import math
import warnings
from dataclasses import dataclass

DEFAULT_REVERSIBLE_INTERVAL = 8


@dataclass(frozen=True)
class Policy:
    """One row of the table above."""

    name: str
    keeps_low_rank: bool
    keeps_attention: bool
    inverts: bool

    def interval(self, asked: int | None, layers: int) -> int | None:
        """The state is kept every so many layers; None: wherever the error bound wants it, and nowhere else."""
        if self.name == "none":
            return 1
        if asked is None and self.name == "replay":
            return max(1, math.isqrt(max(layers - 2, 0)) + 1)  # about sqrt(L): N states replayed, L / N kept
        if asked is None and self.name == "reversible":
            return min(DEFAULT_REVERSIBLE_INTERVAL, layers)
        return asked

    def keeps_state(self, asked: int | None, layers: int, layer_idx: int) -> bool:
        """Whether the state after a layer outlives the next one, for b near 1. The live state is another matter."""
        every = self.interval(asked, layers)
        if every is None or layer_idx >= layers - 1:
            return False
        return layer_idx % every == 0 and (layer_idx > 0 or not self.inverts)


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("none", keeps_low_rank=True, keeps_attention=True, inverts=False),
        Policy("invert", keeps_low_rank=True, keeps_attention=False, inverts=True),
        Policy("replay", keeps_low_rank=True, keeps_attention=False, inverts=False),
        Policy("reversible", keeps_low_rank=False, keeps_attention=False, inverts=True),
    )
}

POLICIES_OF = {
    "cross_layer": tuple(POLICIES),
    # Nothing carries, so X A is kept anyway: `reversible` would keep as much as `invert`.
    "low_rank": ("none", "invert", "replay"),
    "cola": ("none", "invert", "replay"),
    "dense": ("none",),
}
"""Policies by factorization. With "dense" there is one, and it is plain autograd."""

RENAMED = {"low_rank": "invert"}


def current_name(policy: str) -> str:
    """The name of a policy; the one that it had in 0.1 is taken with a warning."""
    if policy in RENAMED:
        message = f"recompute={policy!r} is called {RENAMED[policy]!r} now; the old name goes in the next release."
        warnings.warn(message, FutureWarning, stacklevel=2)
    return RENAMED.get(policy, policy)


def check_policy(policy: str, factorization: str) -> None:
    """Raises ValueError for a policy that does not exist, or not for this factorization."""
    if policy not in POLICIES:
        raise ValueError(f"recompute={policy!r} does not exist; allowed: {', '.join(POLICIES)}.")
    allowed = POLICIES_OF[factorization]
    if policy in allowed:
        return
    if factorization == "dense":
        raise ValueError(
            f"recompute={policy!r} needs low-rank linears to rebuild states from; factorization='dense' has none. "
            "Remove it; activation_checkpointing=True checkpoints whole layers there."
        )
    raise ValueError(
        f"recompute={policy!r} belongs to factorization='cross_layer'; with {factorization!r} it would keep as much as "
        f"'invert'. Choose one of {', '.join(allowed)}."
    )
