"""Time of a training step, operation by operation: each product at the rate of its shape, each pass at bandwidth.

    products      from `list_products`, which `count_operations` sums       rows of a micro-batch x inner x outer
    attention     scores and values of one layer together, forward and backward
    passes        norms, gates, sums b Y, casts, loss, optimizer, from `list_passes`, by bytes

Nothing of a model is written here: both lists go over the shapes that parameters, operations and bytes go over. A
chunked loss (torch's linear_cross_entropy) is float32 on a CPU whatever its dtype, and makes the logits of bf16 weights
twice. What is left out: memory that is new to the process (page faults), the loader, logging.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .flops import Multiplication, list_products, optimizer_operations
from .methods import Method, method_of, policy_of
from .passes import list_passes, list_update_passes
from .rates import BYTES, Rates
from .shapes import Shape
from .steps import Step

PHASES = ("forward", "backward", "recompute", "update")


class Operation(NamedTuple):
    """Operations of one kind of a step, all of them together.

    Args:
        phase: of `PHASES`.
        what: "layers", "head", "attention", or a pass by its name.
        detail: of a product, rows x inner x outer and what it gives.
        kernels: how many.
        operations: floating-point operations of them all.
        moved: bytes that they read and write, of attention its inputs and output.
        seconds: that they take.
    """

    phase: str
    what: str
    detail: str
    kernels: float
    operations: float
    moved: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step of one micro-batch and one update, on one device.

    Args:
        host: seconds of the host to call the kernels of each of `PHASES`.
        overlaps: whether kernels run beside the host, as on an accelerator.
    """

    operations: tuple[Operation, ...]
    host: dict[str, float]
    overlaps: bool

    @property
    def by_phase(self) -> dict[str, float]:
        """Seconds of each of `PHASES`, the host's among them."""
        device = self._sum(lambda operation: operation.phase, PHASES)
        return {
            phase: max(seconds, self.host[phase]) if self.overlaps else seconds + self.host[phase]
            for phase, seconds in device.items()
        }

    @property
    def by_part(self) -> dict[str, float]:
        """Seconds of kernels by what they are: products, attention, passes and the update."""
        parts = {"layers": "products", "head": "products", "attention": "attention", "optimizer": "update"}
        names = ("products", "attention", "passes", "update")
        return self._sum(lambda operation: parts.get(operation.what, "passes"), names)

    def _sum(self, kind: Callable[[Operation], str], kinds: Iterable[str]) -> dict[str, float]:
        found = dict.fromkeys(kinds, 0.0)
        for operation in self.operations:
            found[kind(operation)] += operation.seconds
        return found

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return sum(self.by_phase.values())


def predict_step(config: Any, step: Step, rates: Rates, method: Method | None = None) -> StepTime:
    """Time of one training step on one device that is as fast as `rates` say.

    Args:
        config: a configuration or `Shape`.
        step: what it works on; `fused_norms` False stands for a CPU's kernels.
        rates: measured (`read_rates`) or a data sheet's (`sheet_rates`).
        method: what is trained and kept; the configuration's `recompute` by default.

    Raises ConfigError where the device has no rates for the precision.
    """
    shape, method = Shape.of(config), method or method_of(config)
    rates.check_dtype(step.precision.dtype)
    operations = (*_products(shape, step, rates, method), *_passes(shape, step, rates, method))
    way = "autograd" if policy_of(method, shape.factorization) is None else "policy"
    host = dict.fromkeys(PHASES, 0.0)
    for operation in operations:
        host[operation.phase] += rates.host_seconds(way, operation.kernels)
    return StepTime(operations=operations, host=host, overlaps=rates.kind == "cuda")


def _products(shape: Shape, step: Step, rates: Rates, method: Method) -> list[Operation]:
    dtype, n, split = step.precision.dtype, step.tokens, step.sharding.tensor
    counted = list_products(shape, step.sequence, method, tokens=n, tensor=split)
    half = step.precision.products == 2 and not step.precision.is_autocast
    found: list[Operation] = []
    attention: dict[tuple[str, str], float] = {}
    for product, times in counted.items():
        if product.part == "attention":
            key = (product.phase, "backward" if product.phase == "backward" else "forward")
            attention[key] = attention.get(key, 0.0) + times * product.operations
        elif product.part != "carried":  # a pass
            in_chunks = product.part == "head" and rates.kind == "cpu" and step.fused_loss and split == 1
            found.append(_product(product, times, n, rates, "float32" if in_chunks else dtype))
            if in_chunks and half and product.phase == "forward":  # whose gradients wait for the backward
                found.append(Operation("recompute", *found[-1][1:]))
    layers, head_dim = shape.num_hidden_layers, shape.layers[0].attention.key_dim
    for (phase, direction), operations in attention.items():
        total = n * operations
        seconds = layers * rates.attention_seconds(dtype, direction, step.sequence, head_dim, total / layers)
        widths = sum(layer.query_width + layer.key_value_width + layer.value_width for layer in shape.layers)
        moved = n * widths / split * BYTES[dtype] * (2 if direction == "backward" else 1)
        found.append(Operation(phase, "attention", direction, layers, total, moved, seconds))
    work = optimizer_operations(shape, method)
    if work:
        found.append(Operation("update", "optimizer", "projections", 1, work, 0.0, work / rates.peak[dtype]))
    return found


def _product(product: Multiplication, times: int, n: int, rates: Rates, dtype: str) -> Operation:
    rows, times = n * product.active / product.copies, times * product.copies
    seconds = rates.product_seconds(dtype, product.of, rows, product.inner, product.outer)
    moved = (rows * product.inner + product.inner * product.outer + rows * product.outer) * BYTES[dtype]
    detail = f"{rows:g} x {product.inner:g} x {product.outer:g}, {product.of}"
    operations = times * 2 * rows * product.inner * product.outer
    return Operation(product.phase, product.part, detail, times, operations, times * moved, times * seconds)


def _passes(shape: Shape, step: Step, rates: Rates, method: Method) -> list[Operation]:
    counted = list_passes(shape, step, method) + Counter(list_update_passes(shape, step, method))
    return [
        Operation(
            each.phase,
            each.what,
            "",
            times * each.kernels,
            times * each.operations,
            times * each.moved,
            times * rates.pass_seconds(each.element, each.moved),
        )
        for each, times in counted.items()
    ]


__all__ = ["PHASES", "Operation", "StepTime", "predict_step"]
