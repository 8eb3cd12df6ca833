"""How a model is trained, as far as it costs anything: what is kept, which weights learn, which optimizer."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from ..crnet.policies import POLICIES, POLICIES_OF, Policy, current_name
from ..methods import MATRIX_OPTIMIZERS, check_method

ADAMW = ("adamw", "adamw_8bit")
OPTIMIZERS = (*ADAMW, *MATRIX_OPTIMIZERS)
"""What may be chosen for a method; the others are what a method is."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """LoRA (arXiv 2106.09685) or LoR2C (arXiv 2503.00572) on a frozen model.

    LoRA: A and B of rank r at `positions`. LoR2C: one pair around each block; `shared` has one A for all blocks,
    `fused` counts pairs joined with a neighbour's (two blocks, one pair), `injected` blocks whose pair gave way to
    LoRA of rank r // 2 on q and v.
    """

    kind: Literal["lora", "lor2c"] = "lora"
    rank: int = 8
    positions: tuple[str, ...] = ("q", "v")
    shared: bool = False
    fused: int = 0
    injected: int = 0


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a step of training keeps and updates.

    Args:
        recompute: what is kept for the backward. "none": all that autograd, or CR-Net's own backward, wants; "layers":
            whole layers are checkpointed; "cola_m": CoLA-M's segments (arXiv 2502.10940); "invert", "replay",
            "reversible": the memory policies (docs/memory.md).
        interval: `recompute_interval` of the policy.
        adapter: only it is trained; the model is frozen.
        optimizer: adamw, adamw_8bit, muon, spectron (docs/optimizers.md), galore, galore_8bit (arXiv 2403.03507),
            apollo, apollo_mini (arXiv 2412.05270), relora (AdamW on factors beside frozen matrices, merged from time to
            time; arXiv 2307.05695).
        optimizer_rank: rank of the projections; of ReLoRA's factors.
    """

    recompute: str = "none"
    interval: int | None = None
    adapter: Adapter | None = None
    optimizer: str = "adamw"
    optimizer_rank: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "recompute", current_name(self.recompute))


TRAININGS: dict[str, tuple[str, Method]] = {
    "dense": ("dense", Method()),
    "dense_checkpointing": ("dense", Method(recompute="layers")),
    "crnet": ("cross_layer", Method()),
    "crnet_invert": ("cross_layer", Method(recompute="invert")),
    "crnet_replay": ("cross_layer", Method(recompute="replay")),
    "crnet_reversible": ("cross_layer", Method(recompute="reversible")),
    "low_rank": ("low_rank", Method()),
    "cola": ("cola", Method()),
    "cola_checkpointing": ("cola", Method(recompute="layers")),
    "cola_m": ("cola", Method(recompute="cola_m")),
    "cola_invert": ("cola", Method(recompute="invert")),
    "lora": ("dense", Method(adapter=Adapter())),
    "lor2c": ("dense", Method(adapter=Adapter(kind="lor2c"))),
    "sharelor2c": ("dense", Method(adapter=Adapter(kind="lor2c", shared=True))),
    "mergelor2c": ("dense", Method(adapter=Adapter(kind="lor2c", fused=1))),
    "injectlor2c": ("dense", Method(adapter=Adapter(kind="lor2c", injected=1))),
    "imlor2c": ("dense", Method(adapter=Adapter(kind="lor2c", fused=1, injected=3))),
    "relora": ("dense", Method(optimizer="relora")),
    "sltrain": ("sltrain", Method()),
    "adamw_8bit": ("dense", Method(optimizer="adamw_8bit")),
    "galore": ("dense", Method(optimizer="galore")),
    "galore_8bit": ("dense", Method(optimizer="galore_8bit")),
    "apollo": ("dense", Method(optimizer="apollo")),
    "apollo_mini": ("dense", Method(optimizer="apollo_mini")),
}
"""Method (crosslayer/methods.py) -> (factorization, how it is trained)."""


def policy_of(method: Method, factorization: str) -> Policy | None:
    """The memory policy under which the model runs its own backward; None where autograd runs it.

    That is dense models, checkpointed layers and other people's methods.
    """
    is_ours = factorization != "dense" and method.recompute in POLICIES_OF.get(factorization, ())
    return POLICIES[method.recompute] if is_ours else None


def method_of(config: Any, *, checkpointing: bool = False, optimizer: str = "adamw") -> Method:
    """The memory policy of a CRNetConfig; whole-layer or `invert` where `activation_checkpointing` asks for it."""
    policy = getattr(config, "recompute", "none")
    if checkpointing and policy == "none":
        policy = "invert" if getattr(config, "factorization", "dense") == "cross_layer" else "layers"
    return Method(recompute=policy, interval=getattr(config, "recompute_interval", None), optimizer=optimizer)


def optimized(trained: Method, optimizer: str | None) -> Method:
    """With the optimizer that is asked for, where it is open: of matrices by their whole where all weights are trained,
    of 8 bits wherever AdamW trains."""
    if optimizer is None or trained.optimizer not in OPTIMIZERS:
        return trained
    is_adapted = trained.adapter is not None
    return trained if is_adapted and optimizer in MATRIX_OPTIMIZERS else replace(trained, optimizer=optimizer)


def can_release(trained: Method, factorization: str) -> bool:
    """Whether gradient release trains this: AdamW or Muon on all weights (train/gradient_release.py)."""
    return trained.optimizer in (*ADAMW, "muon") and trained.adapter is None and factorization != "sltrain"


def named_method(name: str) -> tuple[str, Method]:
    """(factorization, Method). Raises ConfigError for a name that is not in `TRAININGS`, with the nearest one."""
    return TRAININGS[check_method(name, TRAININGS)]


__all__ = [
    "OPTIMIZERS",
    "TRAININGS",
    "Adapter",
    "Method",
    "can_release",
    "method_of",
    "named_method",
    "optimized",
    "policy_of",
]
