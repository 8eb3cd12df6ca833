"""How fast a device is: products by their shape, attention, passes over memory, launches; measured or by data sheet.

    crosslayer bench device --output FILE    measures a device; `read_rates(FILE)` reads what it writes
    sheet_rates(DEVICES["h100"])             a data sheet's peaks times an efficiency that depends on the shape

The time of an operation is the roofline's (Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009),
max(operations / rate of its shape, bytes / bandwidth). What the host takes to call kernels comes on top on a CPU; on an
accelerator it goes on beside the kernels before, so that the longer of the two counts.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise, product
from math import exp, isfinite, log
from pathlib import Path
from typing import Any

from ..errors import ConfigError, first_line
from .devices import DEVICES, ETHERNET, Device, find_device

FORMAT = 1
PRODUCTS = ("output", "input", "weights")
"""Of X W, and of the gradients of X and of W: their matrices lie differently in memory."""
SHEET_PRODUCTS = 0.75
"""Share of its peak that a data-sheet device reaches in a large product. Our choice."""
SHEET_HALF = (64, 128, 64)
"""Rows, inner and outer width at which a product reaches half of that, in each direction. Our choice."""
SHEET_ATTENTION = {"forward": 0.7, "backward": 0.55}
"""Share of the peak, of the full square's operations. FlashAttention-2 reaches 35 % on an H100 (arXiv 2407.08608) of
those that a causal mask leaves, half of them; the backward is our choice."""
SHEET_BANDWIDTH = 0.85
"""Share of the data sheet's. Our choice."""
SHEET_LAUNCH, SHEET_CALL = 4e-6, 1.6e-6
"""Seconds as in `Rates`: our choice for a launch, and what one core of an EPYC (Zen 5) took for a call."""
CALLS = {"autograd": 1.8, "policy": 7.0}
"""Calls' worth of the interpreter's time beside each kernel of a step, under autograd and in CR-Net's own backward.
Measured on that core at hidden size 32, 12 against 4 layers, where there is next to nothing to compute."""

Grid = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What `crosslayer bench device` writes.

    Args:
        device: its name.
        kind: "cpu" or "cuda".
        memory: bytes.
        threads: of a CPU.
        launch: seconds from one small kernel to the next, forward and backward under autograd, on this device.
        call: the same on the CPU.
        bandwidth: dtype -> bytes per second that an elementwise kernel reads and writes, out of the cache.
        products: dtype -> {"rows", "inner", "outer": widths, ascending; each of `PRODUCTS`: operations per second, one
            for each (rows, inner, outer), the last running fastest}.
        attention: dtype -> {"sequence", "head_dim", ascending; "forward", "backward": operations per second, of the
            full square, one for each (sequence, head_dim)}.
        versions: of libraries.
    """

    device: str
    kind: str
    memory: float
    threads: int = 1
    launch: float
    call: float
    bandwidth: Mapping[str, float]
    products: Mapping[str, Grid]
    attention: Mapping[str, Grid]
    versions: Mapping[str, str] = field(default_factory=dict)

    def check_dtype(self, dtype: str) -> None:
        """Raises ConfigError where products of this dtype were not measured, or are not on the data sheet."""
        if dtype not in self.products:
            raise ConfigError(
                f"{self.device} has no rates for {dtype} (it has {', '.join(self.products)}); choose another precision "
                "or measure it: crosslayer bench device"
            )

    def product_seconds(self, dtype: str, of: str, rows: float, inner: float, outer: float) -> float:
        """Of one product, of `PRODUCTS`, with a matrix inner x outer."""
        grid = self.products[dtype]
        rate = _interpolate([grid["rows"], grid["inner"], grid["outer"]], grid[of], (rows, inner, outer))
        moved = (rows * inner + inner * outer + rows * outer) * BYTES[dtype]
        return max(2 * rows * inner * outer / rate, moved / self.bandwidth[_stored(dtype)])

    def attention_seconds(self, dtype: str, phase: str, sequence: int, head_dim: float, operations: float) -> float:
        """Of one layer's attention, forward or backward, by the operations of its full square."""
        grid = self.attention[dtype]
        return operations / _interpolate([grid["sequence"], grid["head_dim"]], grid[phase], (sequence, head_dim))

    def pass_seconds(self, element: int, moved: float) -> float:
        """Of kernels that read and write so many bytes together, of elements of so many bytes."""
        return moved / self.bandwidth["float32" if element >= 4 or "bfloat16" not in self.bandwidth else "bfloat16"]

    def host_seconds(self, way: str, kernels: float) -> float:
        """Of the host to call so many kernels, in one of the ways of `CALLS`."""
        return kernels * (self.launch + CALLS[way] * self.call)

    @property
    def peak(self) -> dict[str, float]:
        """Operations per second of the fastest product of each dtype."""
        return {dtype: max(grid["output"]) for dtype, grid in self.products.items()}

    def to_device(self) -> Device:
        """The device as a plan wants it; links are those of the data sheet, where there is one."""
        known = next((d for d in DEVICES.values() if all(word in self.device for word in d.name.split())), None)
        link, network = (ETHERNET, ETHERNET) if known is None else (known.link, known.network)
        peak, bandwidth = self.peak, self.bandwidth["float32"]
        float32 = peak.get("float32", 0.0)
        return Device(self.device, peak.get("bfloat16", float32), self.memory, bandwidth, link, network, float32)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"what": "rates of a device", "format": FORMAT, **asdict(self)}


BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2}
"""Of an element, by the dtype of products."""


def _stored(dtype: str) -> str:
    return "bfloat16" if dtype == "bfloat16" else "float32"


def _interpolate(axes: Sequence[Sequence[float]], values: Sequence[float], at: Sequence[float]) -> float:
    """Linear in the logarithms of axes and values; at the edge where `at` lies outside."""
    corners: list[list[tuple[int, float]]] = []
    for axis, x in zip(axes, at, strict=True):
        x = min(max(x, axis[0]), axis[-1])
        high = min(max(bisect_right(axis, x), 1), len(axis) - 1)
        if len(axis) == 1 or high == 0:
            corners.append([(0, 1.0)])
            continue
        share = log(x / axis[high - 1]) / log(axis[high] / axis[high - 1])
        corners.append([(high - 1, 1 - share), (high, share)])
    total = 0.0
    for corner in product(*corners):
        index, weight = 0, 1.0
        for axis, (place, share) in zip(axes, corner, strict=True):
            index, weight = index * len(axis) + place, weight * share
        if weight:
            total += weight * log(values[index])
    return exp(total)


@cache
def sheet_rates(device: Device) -> Rates:
    """By a data sheet: its peaks times `SHEET_PRODUCTS`, and less of it where a side of a product is short."""
    axes = {
        "rows": (64, 256, 1024, 4096, 16384, 65536),
        "inner": (16, 64, 256, 1024, 4096, 16384),
        "outer": (16, 64, 256, 1024, 4096, 16384, 65536),
    }
    shares = [
        SHEET_PRODUCTS / ((1 + SHEET_HALF[0] / m) * (1 + SHEET_HALF[1] / k) * (1 + SHEET_HALF[2] / n))
        for m, k, n in product(*axes.values())
    ]
    peaks = {"bfloat16": device.flops, "tf32": device.flops / 2, "float32": device.float32_flops}
    return Rates(
        device=device.name,
        kind="cuda",
        memory=device.memory,
        launch=SHEET_LAUNCH,
        call=SHEET_CALL,
        bandwidth=dict.fromkeys(("float32", "bfloat16"), SHEET_BANDWIDTH * device.bandwidth),
        products={
            dtype: {**axes, **{of: [share * peak for share in shares] for of in PRODUCTS}}
            for dtype, peak in peaks.items()
            if peak
        },
        attention={
            dtype: {
                "sequence": [1],
                "head_dim": [1],
                **{phase: [share * peak] for phase, share in SHEET_ATTENTION.items()},
            }
            for dtype, peak in peaks.items()
            if peak
        },
    )


def device_and_rates(device: str) -> tuple[Device, Rates | None]:
    """A device by its name (`find_device`), or by a file of its rates (`read_rates`), which are then its speed.

    Raises ConfigError as those two do.
    """
    if not (device.endswith(".json") or Path(device).is_file()):
        return find_device(device), None
    rates = read_rates(device)
    return rates.to_device(), rates


def read_rates(path: str | Path) -> Rates:
    """What `crosslayer bench device` wrote. Raises ConfigError for a file that is missing, damaged or another one."""
    again = "give a file that `crosslayer bench device --output FILE` wrote"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"device file {str(path)!r} does not exist; {again}, or one of {', '.join(DEVICES)}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"device file {str(path)!r} cannot be read ({first_line(error)}); {again}") from None
    if not isinstance(content, dict) or content.get("what") != "rates of a device":
        raise ConfigError(f"device file {str(path)!r} holds something else than the rates of a device; {again}")
    if content.pop("format", None) != FORMAT:
        raise ConfigError(
            f"device file {str(path)!r} is of another format than {FORMAT}, this version's; measure again"
        )
    del content["what"]
    try:
        rates = Rates(**content)
        _check(rates)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"device file {str(path)!r} is damaged ({first_line(error)}); measure again") from None
    return rates


def _check(rates: Rates) -> None:
    """Raises ValueError, KeyError or TypeError where something is missing or no number above 0."""
    if rates.kind not in ("cpu", "cuda") or not isinstance(rates.device, str):
        raise ValueError("kind or device")
    _positive("memory, threads, launch and call", [rates.memory, rates.threads, rates.launch, rates.call])
    if "float32" not in rates.bandwidth or not rates.products or rates.products.keys() != rates.attention.keys():
        raise ValueError("float32's bandwidth, products or attention are missing")
    if not rates.products.keys() <= BYTES.keys():
        raise ValueError(f"dtypes {', '.join(rates.products)}")
    _positive("bandwidth", [*rates.bandwidth.values()])
    for dtype, grid in rates.products.items():
        _check_grid(f"products of {dtype}", grid, ("rows", "inner", "outer"), PRODUCTS)
        if _stored(dtype) not in rates.bandwidth:
            raise ValueError(f"bandwidth of {dtype} is missing")
    for dtype, grid in rates.attention.items():
        _check_grid(f"attention of {dtype}", grid, ("sequence", "head_dim"), ("forward", "backward"))


def _check_grid(what: str, grid: Grid, axes: Sequence[str], values: Sequence[str]) -> None:
    count = 1
    for axis in axes:
        _ascending(f"{axis} of {what}", grid[axis])
        count *= len(grid[axis])
    for name in values:
        _positive(f"{name} of {what}", grid[name])
        if len(grid[name]) != count:
            raise ValueError(f"{name} of {what}: {len(grid[name])} values for {count} places")


def _ascending(what: str, values: Sequence[float]) -> None:
    _positive(what, values)
    if not all(low < high for low, high in pairwise(values)):
        raise ValueError(f"{what} do not ascend")


def _positive(what: str, values: Sequence[float]) -> None:
    is_fine = [isinstance(x, int | float) and not isinstance(x, bool) and isfinite(x) and x > 0 for x in values]
    if not is_fine or not all(is_fine):
        raise ValueError(f"{what} must be numbers above 0")


__all__ = ["BYTES", "CALLS", "FORMAT", "PRODUCTS", "Rates", "device_and_rates", "read_rates", "sheet_rates"]
