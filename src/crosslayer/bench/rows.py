"""What `bench` measures of each method, as it stands in its JSON."""

from typing import NotRequired, TypedDict


class Spread(TypedDict):
    """Seconds of a turn."""

    median: float
    p20: float
    p80: float
    turns: list[float]


class Timing(TypedDict):
    """How fast something was."""

    tokens_per_s: float
    step_s: Spread


class RelativeTiming(Timing):
    """How fast something was, over the reference."""

    speed_over_llama: float


class TrainingRow(RelativeTiming):
    """A method's training step; `mfu` on devices whose peak is known."""

    matrix_operations: int
    speed_if_operations_decided: float
    parameters: int
    mfu: NotRequired[float]


class GenerationRow(TypedDict):
    """A model's prefill and decode."""

    weight_bytes: int
    prefill: RelativeTiming
    decode: RelativeTiming


class PeakRow(TypedDict):
    """Peak memory of a training step: bytes in all and by part, and when it was."""

    total: int
    phase: str
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    other: int


class DepthRow(TypedDict):
    """What a forward at one depth keeps for its backward."""

    bytes_per_token: float
    elsewhere_bytes_per_token: float
    layer_bytes_per_token: list[float]


class MemoryRow(TypedDict):
    """A method's saved activations by depth; `peak_bytes`, of a training step, by part."""

    label: str
    growth_bytes_per_token_and_layer: float
    growth_h: float
    depths: dict[str, DepthRow]
    peak_bytes: NotRequired[PeakRow]


class SpeedResult(TypedDict, total=False):
    """The parts of `bench speed` that were asked for, by method."""

    training: dict[str, TrainingRow]
    memory: dict[str, PeakRow]
    generation: dict[str, GenerationRow]


__all__ = [
    "DepthRow",
    "GenerationRow",
    "MemoryRow",
    "PeakRow",
    "RelativeTiming",
    "SpeedResult",
    "Spread",
    "Timing",
    "TrainingRow",
]
