"""A plan: what it is made for, the settings it looked at, and the one it recommends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .communication import Axis, Links
from .devices import Device
from .methods import OPTIMIZERS
from .rates import Rates, sheet_rates
from .steps import PRECISIONS, Sharding

DEFAULT_RESERVE = 0.08
"""Share of a device's memory left to its context and to the allocator's gaps. Our choice."""
ONE_NODE = Links(node=8, within=1.0, between=1.0)
LINK_UTILISATION = 0.8
"""Share of a link's data sheet that collectives reach where no bandwidth is given. Our choice."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a step, and what it costs on each device.

    Args:
        tensor_parallel, fsdp, replicas: devices along each axis (`Sharding`).
        operations_per_token: of the whole model, by phase.
        kernel_seconds: of an optimizer step on each device: products, attention, passes and update (roofline.py); empty
            where one utilisation is given for all.
        sent_bytes: that each device sends in a step, by axis.
        step_seconds, waiting_seconds: of a step; what of it is waited for links.
    """

    policy: str
    interval: int | None
    micro_batch: int
    accumulation: int
    tensor_parallel: int
    fsdp: int
    replicas: int
    tokens_per_step: int
    memory_bytes: dict[str, int]
    fits: bool
    operations_per_token: dict[str, float]
    kernel_seconds: dict[str, float]
    sent_bytes: Mapping[Axis, float]
    step_seconds: float
    waiting_seconds: float
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

    @property
    def sharding(self) -> Sharding:
        """The devices along each axis."""
        return Sharding(tensor=self.tensor_parallel, fsdp=self.fsdp, replicas=self.replicas)

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
    """The answer of `make_plan`; `to_dict` is what `crosslayer plan --json` prints.

    Args:
        changes: fields of `Request` that are not as asked, since nothing would fit (changes.py).
        needed_bytes: of each device for the smallest setting as asked, with the reserve.
        utilisation: share of `peak_flops`, of the precision's products, that all operations run at; None where each has
            its own time.
        is_measured: whether the device's rates come from a file, not from a data sheet.
    """

    model: str
    method: str
    rank: int | None
    parameters: int
    trainable: int
    changes: dict[str, Any] = field(default_factory=dict)
    needed_bytes: float
    device: str
    peak_flops: float
    utilisation: float | None
    is_measured: bool
    gpus: int
    gpu_memory_bytes: float
    usable_bytes: float
    links: Links
    overlap: bool
    precision: str
    optimizer: str
    gradient_release: bool
    sequence: int
    tokens: int
    settings: list[Setting]
    recommended: Recommendation
    beside: dict[str, Recommendation | str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **vars(self),
            "links": vars(self.links),
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
        optimizer: adamw, adamw_8bit, muon or spectron for methods that AdamW trains; None: the method's own.
        gradient_release: the optimizer steps within the backward, on one device and without accumulation: a step has
            the tokens of a micro-batch, at most `tokens_per_step`.
        rates: how fast the device is; its data sheet's (`sheet_rates`) where none are given.
        utilisation: share of the device's peak that all operations run at; None: each has the time of its roofline.
        reserve: share of the memory that is left alone.
        tensor_parallel, fsdp: devices that split each layer, and that share weights, gradients and states; the rest
            are replicas. None: whatever is fastest.
        micro_batch: sequences of a micro-batch; None: whatever is fastest.
        links: how fast devices send to one another.
        overlap: whether gathers and reductions go on beside the computation.
    """

    device: Device
    gpus: int = 1
    gpu_memory: float = 0.0
    sequence: int = 1024
    tokens_per_step: float = 0.0
    tokens: float = 0.0
    precision: str = "bf16_autocast"
    optimizer: str | None = None
    gradient_release: bool = False
    rates: Rates | None = None
    utilisation: float | None = None
    reserve: float = DEFAULT_RESERVE
    tensor_parallel: int | None = None
    fsdp: int | None = None
    micro_batch: int | None = None
    links: Links = ONE_NODE
    overlap: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value}: give {allowed}"
            for name, value, is_fine, allowed in (
                ("gpus", self.gpus, self.gpus >= 1, "at least 1"),
                ("gpu_memory", self.gpu_memory, self.gpu_memory > 0, "more than 0, such as 80GB"),
                ("sequence", self.sequence, self.sequence >= 1, "at least 1"),
                ("tokens", self.tokens, self.tokens > 0, "more than 0, such as 20B"),
                ("utilisation", self.utilisation, 0 < (self.utilisation or 1) <= 1, "a share above 0, at most 1"),
                ("reserve", self.reserve, 0 <= self.reserve < 1, "a share of at least 0, below 1"),
                ("tensor_parallel", self.tensor_parallel, (self.tensor_parallel or 1) >= 1, "at least 1"),
                ("fsdp", self.fsdp, (self.fsdp or 1) >= 1, "at least 1"),
                ("micro_batch", self.micro_batch, (self.micro_batch or 1) >= 1, "at least 1"),
                ("gpus_per_node", self.links.node, self.links.node >= 1, "at least 1"),
                ("bandwidth", self.links.within, self.links.within > 0, "more than 0, such as 450GB"),
                ("network", self.links.between, self.links.between > 0, "more than 0, such as 50GB"),
                ("precision", repr(self.precision), self.precision in PRECISIONS, ", ".join(PRECISIONS)),
                (
                    "optimizer",
                    repr(self.optimizer),
                    self.optimizer in (None, *OPTIMIZERS),
                    f"{', '.join(OPTIMIZERS)}; others come with their method, such as galore",
                ),
                (
                    "gradient_release",
                    f"True with gpus={self.gpus}",
                    self.gpus <= 1 or not self.gradient_release,
                    "one device, or fsdp without it",
                ),
            )
            if not is_fine
        ]
        group = (self.tensor_parallel or 1) * (self.fsdp or 1)
        if not problems and self.gpus % group:
            asked = {"tensor_parallel": self.tensor_parallel, "fsdp": self.fsdp}
            product = " x ".join(f"{name}={value}" for name, value in asked.items() if value)
            problems.append(f"{product} does not divide gpus={self.gpus}: what is left over has to be whole replicas")
        if problems:
            raise ConfigError("; ".join(problems))
        self.speed.check_dtype(PRECISIONS[self.precision].dtype)

    @property
    def usable(self) -> float:
        """Bytes of each device that are not in reserve."""
        return self.gpu_memory * (1 - self.reserve)

    @property
    def peak_flops(self) -> float:
        """Operations per second of the products' dtype: the data sheet's, or the fastest that was measured."""
        if self.rates is not None:
            return self.rates.peak[PRECISIONS[self.precision].dtype]
        by_dtype = {"bfloat16": self.device.flops, "tf32": self.device.flops / 2, "float32": self.device.float32_flops}
        return by_dtype[PRECISIONS[self.precision].dtype]

    @property
    def speed(self) -> Rates:
        """Measured, or by the data sheet."""
        return sheet_rates(self.device) if self.rates is None else self.rates


__all__ = ["MemoryPlan", "Recommendation", "Request", "Setting"]
