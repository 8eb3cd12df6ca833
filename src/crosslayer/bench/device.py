"""How fast the device at hand is, for `plan --device FILE`: products by shape and dtype, attention, bandwidth, launch.

Products run on memory that is there already, attention is causal, as in training; elementwise passes go round buffers
that no cache holds. A figure is the median of a few turns after a warm-up.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..accounting.rates import Rates
from ..errors import ConfigError, first_line
from ..provenance import device_name

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
GRIDS = {
    "cpu": {"rows": (64, 512, 4096), "inner": (32, 128, 512, 2048), "outer": (32, 128, 512, 2048)},
    "cuda": {"rows": (256, 2048, 16384), "inner": (64, 256, 1024, 4096), "outer": (64, 256, 1024, 4096, 16384)},
}
"""Rows, inner and outer widths of the products; on a slow device without the largest of them."""
SEQUENCES = {"cpu": (128, 512, 2048), "cuda": (512, 2048, 8192)}
ATTENTION_TOKENS = {"cpu": 2048, "cuda": 16384}
HEADS, HEAD_DIMS = 8, (32, 64, 128)
POOL = {"cpu": 2**28, "cuda": 2**31}
"""Bytes that elementwise passes go round."""
PASS_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
SECONDS_OF_PRODUCTS = 3.0
"""That the products of one dtype may take together, each run once."""


def measure_device(device: str = "cpu", dtypes: Sequence[str] | None = None) -> Rates:
    """Rates of a device, as this process uses it: threads, TF32 switched on for "tf32" alone.

    Args:
        device: cpu, cuda or cuda:1.
        dtypes: of `DTYPES`; all that the device has by default.

    Raises ConfigError for a dtype that is not known or that the device lacks.
    """
    kind = torch.device(device).type
    if kind not in GRIDS:
        raise ConfigError(f"device={device!r} cannot be measured; allowed: cpu, cuda")
    dtypes = _check_dtypes(device, kind, dtypes)
    products, attention = {}, {}
    for name in dtypes:
        with _tf32(name == "tf32"):
            products[name] = _measure_products(device, kind, DTYPES[name])
            attention[name] = _measure_attention(device, kind, DTYPES[name])
    stored = {"float32" if DTYPES[name] == torch.float32 else name: DTYPES[name] for name in ("float32", *dtypes)}
    return Rates(
        device=device_name(device),
        kind=kind,
        memory=_memory(device, kind),
        threads=torch.get_num_threads(),
        launch=_measure_launch(device),
        call=_measure_launch("cpu"),
        bandwidth={name: _measure_bandwidth(device, kind, dtype) for name, dtype in stored.items()},
        products=products,
        attention=attention,
        versions={
            "crosslayer": metadata.version("crosslayer"),
            "torch": metadata.version("torch"),
            "python": platform.python_version(),
        },
    )


def write_rates(rates: Rates, path: Path) -> None:
    """The file that `read_rates` reads. Raises ConfigError where it cannot be written."""
    try:
        path.write_text(json.dumps(rates.to_dict()) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output={str(path)!r} cannot be written: {first_line(error)}") from None


def _check_dtypes(device: str, kind: str, dtypes: Sequence[str] | None) -> list[str]:
    has = ["float32", "bfloat16"]
    if kind == "cuda":
        is_recent = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere: both came with its tensor cores
        has = ["float32", "tf32", "bfloat16"] if is_recent else ["float32"]
    for name in dtypes or ():
        if name not in has:
            raise ConfigError(f"dtypes={name!r}: {device_name(device)} has {', '.join(has)}")
    return [name for name in has if dtypes is None or name in dtypes]


@contextmanager
def _tf32(is_on: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if is_on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _seconds_of(run: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Seconds of one call: the median of up to five turns after a warm-up, fewer where a turn is long."""
    first = _turn(run, device, calls)
    turns = [_turn(run, device, calls) for _ in range(max(1, min(5, int(0.05 / max(first, 1e-9)))))]
    return statistics.median(turns) / calls


def _turn(run: Callable[[], Any], device: str, calls: int) -> float:
    is_asynchronous = torch.device(device).type == "cuda"
    if is_asynchronous:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    if is_asynchronous:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _measure_products(device: str, kind: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Operations per second of X W, G W^T and X^T G, X [rows, inner], W stored as [outer, inner]."""
    axes: dict[str, list[float]] = {name: [*widths] for name, widths in GRIDS[kind].items()}
    side = 512 if kind == "cpu" else 4096
    square = torch.randn(side, side, device=device).to(dtype)
    rate = 2 * side**3 / _seconds_of(lambda: square @ square, device)
    while 6 * sum(axes["rows"]) * sum(axes["inner"]) * sum(axes["outer"]) / rate > SECONDS_OF_PRODUCTS:
        longest = max(axes.values(), key=lambda axis: axis[-1] if len(axis) > 1 else 0)
        if len(longest) == 1:
            break
        longest.pop()
    found: dict[str, list[float]] = {"output": [], "input": [], "weights": []}
    for rows, inner, outer in product(*(map(int, axis) for axis in axes.values())):
        x, w, g = (
            torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (outer, inner), (rows, outer))
        )
        y, dx, dw = torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)
        runs = {
            "output": lambda x=x, w=w, y=y: torch.mm(x, w.t(), out=y),
            "input": lambda g=g, w=w, dx=dx: torch.mm(g, w, out=dx),
            "weights": lambda g=g, x=x, dw=dw: torch.mm(g.t(), x, out=dw),
        }
        operations = 2 * rows * inner * outer
        calls = max(1, min(100, int(1e-3 * rate / operations)))
        for name, run in runs.items():
            found[name].append(_rounded(operations / _seconds_of(run, device, calls)))
    return {**axes, **found}


def _measure_attention(device: str, kind: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Operations per second of the full square, forward and backward, causal, over some lengths."""
    axes: dict[str, list[float]] = {"sequence": [*SEQUENCES[kind]], "head_dim": [*HEAD_DIMS]}
    found: dict[str, list[float]] = {"forward": [], "backward": []}
    for length, head_dim in product(SEQUENCES[kind], HEAD_DIMS):
        batch = max(1, ATTENTION_TOKENS[kind] // length)
        shape = (batch, length, HEADS, head_dim)
        q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))

        def forward(q=q, k=k, v=v) -> torch.Tensor:
            query, key, value = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

        output = forward()
        gradient = torch.randn_like(output)
        inputs = (q, k, v)

        def backward(output=output, gradient=gradient, inputs=inputs) -> Any:
            return torch.autograd.grad(output, inputs, gradient, retain_graph=True)

        operations = 4 * batch * length * length * HEADS * head_dim
        found["forward"].append(_rounded(operations / _seconds_of(forward, device)))
        found["backward"].append(_rounded(2 * operations / _seconds_of(backward, device)))
    return {**axes, **found}


def _measure_bandwidth(device: str, kind: str, dtype: torch.dtype) -> float:
    """Bytes per second of additions z = x + y that go round a pool which no cache holds."""
    elements = PASS_ELEMENTS[kind]
    pool = torch.ones(POOL[kind] // (elements * dtype.itemsize), elements, dtype=dtype, device=device)

    def go_round() -> None:
        for index in range(0, len(pool) - 2, 3):
            torch.add(pool[index], pool[index + 1], out=pool[index + 2])

    moved = 3 * (len(pool) // 3) * elements * dtype.itemsize
    return _rounded(moved / _seconds_of(go_round, device))


def _measure_launch(device: str) -> float:
    """Seconds from one small kernel to the next: products of two numbers and their gradients, one after the other."""
    calls = 100
    x, w = torch.ones(16, device=device, requires_grad=True), torch.ones(16, device=device)

    def chain() -> None:
        y = x
        for _ in range(calls):
            y = y * w
        y.backward(w)

    return _rounded(_seconds_of(chain, device, 5) / (2 * calls))


def _memory(device: str, kind: str) -> float:
    if kind == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


__all__ = ["DTYPES", "measure_device", "write_rates"]
