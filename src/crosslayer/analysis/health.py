"""Training health of a CR-Net: b, increments, gradients and drift, layer by layer, while a run goes on.

    Y_l = b Y_{l-1} + X A B        increment ratio = |X A B|_F / |b Y_{l-1}|_F

Measured at logging steps only: b and the gradient norms are there already, the ratio takes one forward of one sequence
in evaluation mode (so a memory policy's tape is neither used nor disturbed). One JSON line a log, in health.jsonl of
the run's folder.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..crnet.cross_layer_linear import b_of
from ..errors import CheckpointError

HEALTH_FILE = "health.jsonl"
Table = dict[str, list[float | None]]
"""{position: [value in layer 1, 2, ...]}: the second layer (index 1) is the first that builds on another.

None where the position does not build on the layer below, such as a mixture of experts above dense layers.
"""


def cross_layer_linears(model: nn.Module) -> dict[str, list[nn.Module | None]]:
    """{position: its cross-layer linear, or mixture, in the second layer and those after it}.

    Positions and where they lie are the configuration's. Empty for a model that is no CR-Net.
    """
    config: Any = getattr(model, "config", None)
    carried: tuple[str, ...] = getattr(config, "carried_positions", ())
    found: dict[str, list[nn.Module | None]] = {name: [None] * (config.num_hidden_layers - 1) for name in carried}
    paths = {
        f"{layer_idx}.{place.module}": (layer_idx, name)
        for layer_idx in range(1, config.num_hidden_layers if carried else 1)
        for name, place in config.places(layer_idx).items()
        if place.carries
    }
    for path, module in model.named_modules():  # PEFT's wrapping does not rename
        block = re.search(r"(?:^|\.)(?:layers|h)\.(\d+\..+?)(?:\.base_layer)?$", path)
        if block is not None and block[1] in paths and isinstance(getattr(module, "beta", None), nn.Parameter):
            layer_idx, name = paths[block[1]]
            found[name][layer_idx - 1] = module
    return {name: modules for name, modules in found.items() if any(module is not None for module in modules)}


def b_values(model: nn.Module) -> Table:
    """b = s(beta) (|beta| + eps) of every cross-layer linear."""

    def b(module: Any) -> torch.Tensor:
        beta = _whole(module.beta)
        return b_of(beta, module.beta_epsilon)

    return _table(cross_layer_linears(model), b)


def gradient_norms(model: nn.Module) -> Table:
    """Frobenius norm of the gradient of A and B together, as it lies in `.grad`; 0 where there is none."""

    def norm(module: Any) -> torch.Tensor:
        parts = (module.A, module.B) if hasattr(module, "A") else (module.experts,)
        gradients = [p.grad for part in parts for p in part.parameters() if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=module.beta.device)
        return torch.stack([_whole(torch.linalg.vector_norm(g.float())) for g in gradients]).norm()

    return _table(cross_layer_linears(model), norm)


@torch.no_grad()
def increment_ratios(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Table:
    """|X A B|_F / |b Y_{l-1}|_F of every cross-layer linear on `inputs` (input_ids and what goes with them).

    The model's mode is put back; nothing random is drawn in evaluation mode.
    """
    ratios: dict[nn.Module, torch.Tensor] = {}

    def measure(module, arguments, output):
        output = output[0] if isinstance(output, tuple) else output
        carried = module.b() * arguments[1]
        squares = torch.stack([x.float().square().sum() for x in (output - carried, carried)])
        split = getattr(module, "split", None)
        if split is not None and split.by_columns:  # tensor parallelism: a slice of both
            dist.all_reduce(squares, group=split.group)
        increment, base = squares.sqrt()
        ratios[module] = increment / base.clamp_min(1e-30)

    linears = cross_layer_linears(model)
    hooks = [m.register_forward_hook(measure) for modules in linears.values() for m in modules if m is not None]
    was_training = model.training
    try:
        model.eval()
        model(**inputs, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return _table(linears, lambda module: _whole(ratios[module]))


def largest_increment(ratios: Table) -> tuple[float, str] | None:
    """(largest ratio, "layers.7.down") of what `increment_ratios` gave; where one is not a number, that one."""
    found = [
        (value, f"layers.{layer_idx}.{position}")
        for position, row in ratios.items()
        for layer_idx, value in enumerate(row, 1)
        if value is not None
    ]
    return max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0], default=None)


class HealthLog:
    """health.jsonl of a run: appended to while it trains, cut back to where a resumed run starts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Forget what was logged after `step`: the run goes on from there."""
        if self.path.exists():
            kept = [line for line in _lines(self.path) if line["step"] <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self.path)

    def append(self, record: dict[str, Any]) -> None:
        """One more line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_health(folder: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(lines of health.jsonl, lines of log.jsonl) of a run's folder.

    Raises CheckpointError for a folder without them, such as the run of a model that is no CR-Net.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"run {str(folder)!r} does not exist; give the folder that `crosslayer pretrain` wrote")
    health = list(_lines(folder / HEALTH_FILE)) if (folder / HEALTH_FILE).is_file() else []
    if not health:
        raise CheckpointError(
            f"{str(folder)!r} holds no {HEALTH_FILE}; give the folder of a CR-Net run (factorization: cross_layer) "
            "that has logged at least once"
        )
    log = list(_lines(folder / "log.jsonl")) if (folder / "log.jsonl").is_file() else []
    return health, log


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the last line of a run that was killed
            return


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A 0-dim plain tensor; sharded ones (FSDP) are gathered."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().reshape(()).float()


def _table(linears: dict[str, list[nn.Module | None]], value: Callable[[nn.Module], torch.Tensor]) -> Table:
    """One transfer from the device for the whole table. Five significant digits are kept."""
    values = [value(module) for row in linears.values() for module in row if module is not None]
    numbers = iter(torch.stack(values).tolist() if values else [])
    return {
        position: [None if module is None else float(f"{next(numbers):.5g}") for module in row]
        for position, row in linears.items()
    }


__all__ = [
    "HEALTH_FILE",
    "HealthLog",
    "b_values",
    "cross_layer_linears",
    "gradient_norms",
    "increment_ratios",
    "largest_increment",
    "read_health",
]
