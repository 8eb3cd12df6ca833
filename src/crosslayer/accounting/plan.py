"""A plan: what it is made for, the settings it looked at, and the one it recommends."""

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .devices import Device
from .steps import PRECISIONS

DEFAULT_UTILISATION = 0.4
DEFAULT_RESERVE = 0.08
"""Share of a device's memory left to its context and to the allocator's gaps. Our choice."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a step, and what it costs on each device."""

    policy: str
    interval: int | None
    micro_batch: int
    accumulation: int
    sharding: str
    tokens_per_step: int
    memory_bytes: dict[str, int]
    fits: bool
    operations_per_token: dict[str, float]
    tokens_per_s: float
    days: float
    device_hours: float

    @property
    def peak_bytes(self) -> int:
        """Of all parts together, on each device."""
        return sum(self.memory_bytes.values())

    @property
    def label(self) -> str:
        """The policy for people."""
        return self.policy if self.interval is None else f"{self.policy} every {self.interval}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "peak_bytes": self.peak_bytes}


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A setting, why it is the one, and the lines of a recipe that ask for it."""

    method: str
    parameters: int
    setting: Setting
    reason: str
    recipe: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "setting": self.setting.to_dict()}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The answer of `make_plan`; `to_dict` is what `crosslayer plan --json` prints."""

    model: str
    method: str
    rank: int | None
    parameters: int
    trainable: int
    device: str
    peak_flops: float
    utilisation: float
    gpus: int
    gpu_memory_bytes: float
    usable_bytes: float
    precision: str
    sequence: int
    tokens: int
    settings: list[Setting]
    recommended: Recommendation
    beside: dict[str, Recommendation | str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **vars(self),
            "settings": [setting.to_dict() for setting in self.settings],
            "recommended": self.recommended.to_dict(),
            "beside": {
                name: found if isinstance(found, str) else found.to_dict() for name, found in self.beside.items()
            },
        }


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a plan is made for, checked.

    Args:
        gpus, gpu_memory, device: so many devices of such a kind, bytes of each.
        sequence, tokens_per_step: tokens of a sequence, and of an optimizer step over all devices (about: it becomes a
            whole number of micro-batches).
        tokens: of the whole training.
        precision: a name of `PRECISIONS`.
        utilisation: share of the device's peak that operations run at.
        reserve: share of the memory that is left alone.
        tensor_parallel: devices that split each layer.
        sharding: "auto" (DDP where something fits, else FSDP), "ddp" or "fsdp".
    """

    device: Device
    gpus: int = 1
    gpu_memory: float = 0.0
    sequence: int = 1024
    tokens_per_step: float = 0.0
    tokens: float = 0.0
    precision: str = "bf16_autocast"
    utilisation: float = DEFAULT_UTILISATION
    reserve: float = DEFAULT_RESERVE
    tensor_parallel: int = 1
    sharding: str = "auto"

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value}: give {allowed}"
            for name, value, is_fine, allowed in (
                ("gpus", self.gpus, self.gpus >= 1, "at least 1"),
                ("gpu_memory", self.gpu_memory, self.gpu_memory > 0, "more than 0, such as 80GB"),
                ("sequence", self.sequence, self.sequence >= 1, "at least 1"),
                ("tokens", self.tokens, self.tokens > 0, "more than 0, such as 20B"),
                ("utilisation", self.utilisation, 0 < self.utilisation <= 1, "a share above 0, at most 1"),
                ("reserve", self.reserve, 0 <= self.reserve < 1, "a share of at least 0, below 1"),
                ("tensor_parallel", self.tensor_parallel, self.tensor_parallel >= 1, "at least 1"),
                ("sharding", repr(self.sharding), self.sharding in ("auto", "ddp", "fsdp"), "auto, ddp or fsdp"),
                ("precision", repr(self.precision), self.precision in PRECISIONS, ", ".join(PRECISIONS)),
            )
            if not is_fine
        ]
        if not problems and self.gpus % self.tensor_parallel:
            problems.append(f"tensor_parallel={self.tensor_parallel} does not divide gpus={self.gpus}")
        if not problems and self.tokens_per_step < self.sequence * self.replicas:
            problems.append(
                f"tokens_per_step={self.tokens_per_step:,.0f} is less than one sequence of {self.sequence:,} tokens on "
                f"each of {self.replicas} replicas: give at least {self.sequence * self.replicas:,}, a shorter "
                "sequence or fewer gpus"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def replicas(self) -> int:
        """Copies of the model that train beside one another."""
        return self.gpus // self.tensor_parallel

    @property
    def usable(self) -> float:
        """Bytes of each device that are not in reserve."""
        return self.gpu_memory * (1 - self.reserve)

    @property
    def peak_flops(self) -> float:
        """Of the matrix products: TF32, which float32 products may use, has half of bf16's on the data sheets."""
        return self.device.flops / (2 if PRECISIONS[self.precision].products == 4 else 1)


__all__ = ["MemoryPlan", "Recommendation", "Request", "Setting"]
