"""The structure of a LoR2C adapter over training, from the decisions of its callback."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Module:
    """One module for a part of the training: blocks `first` to `last`, steps `start` to `end`."""

    first: int
    last: int
    start: int
    end: int
    injected: bool = False

    @property
    def kind(self) -> str:
        """What it is, for the legend."""
        return "injected: LoRA on query and value" if self.injected else "fused" if self.last > self.first else "LoR2C"


def structure_over_time(history: Sequence[dict[str, Any]], blocks: int, steps: int) -> list[Module]:
    """Every module of an adapter of `blocks` blocks with the steps it lived, from `LoR2CStructureCallback.history`."""
    living = {block: Module(block, block, 0, steps) for block in range(blocks)}  # by first block
    ended = []
    for entry in history:
        covered, step = entry["blocks"], entry["step"]
        for module in [m for m in living.values() if m.first in covered]:
            ended.append(Module(module.first, module.last, module.start, step, module.injected))
            del living[module.first]
        living[covered[0]] = Module(covered[0], covered[-1], step, steps, entry["action"] == "inject")
    return sorted([*ended, *living.values()], key=lambda module: (module.start, module.first))


def draw_structure(path: Path, history: Sequence[dict[str, Any]], blocks: int, steps: int) -> bool:
    """Blocks against steps, one bar a module, as a PNG. False, and no file, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    colours = {"LoR2C": "tab:blue", "fused": "tab:orange", "injected: LoRA on query and value": "tab:green"}
    figure = Figure(figsize=(6.4, 1.2 + 0.3 * blocks), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    labelled = set()
    for module in structure_over_time(history, blocks, steps):
        label = None if module.kind in labelled else module.kind
        labelled.add(module.kind)
        axes.barh(
            (module.first + module.last) / 2,
            module.end - module.start,
            height=module.last - module.first + 0.8,
            left=module.start,
            color=colours[module.kind],
            edgecolor="white",
            alpha=0.8,
            label=label,
        )
    for step in sorted({entry["step"] for entry in history}):
        axes.axvline(step, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlim(0, max(steps, 1))
    axes.set_yticks(range(blocks))
    axes.set_xlabel("step")
    axes.set_ylabel("block")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)
    return True
