"""What adapters do while they train: gradient per block, and SFS per module (arXiv 2503.00572).

    recorder = GradientRecorder()
    Trainer(..., callbacks=[recorder]).train()
    recorder.mean()                    # [blocks], root mean square of the adapter's gradients

Gradients are read after accumulation and clipping, before the optimizer's step: compare methods with
`max_grad_norm=0`, since clipping scales each of them by another number.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..lor2c import AdaptedBlocks

_BLOCK_NUMBER = re.compile(r"\.(\d+)\.")


class GradientRecorder(TrainerCallback):
    """Size of the adapter's gradient in every block, every `every` optimizer steps.

    The size is the root mean square over the entries of the block's adapter parameters, so that methods with
    different numbers of parameters compare. Blocks are told by the first number in a parameter's name.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.steps: list[int] = []
        self.magnitudes: list[list[float]] = []  # one list over the blocks for each of `steps`

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Appends to `steps` and `magnitudes`, in every `every`-th step."""
        if state.global_step % self.every == 0:
            self.steps.append(state.global_step)
            self.magnitudes.append(gradient_by_block(model))

    def mean(self) -> list[float]:
        """Mean over the recorded steps, one value a block."""
        return torch.tensor(self.magnitudes, dtype=torch.float64).mean(dim=0).tolist()


def gradient_by_block(model: nn.Module) -> list[float]:
    """Root mean square of the adapter's gradients in each block, in the order of their numbers; 0 without any."""
    squares: dict[int, float] = {}
    entries: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        number = _BLOCK_NUMBER.search(name)
        if number is None or not (".lora_" in name or ".lor2c" in name):
            continue
        block = int(number[1])
        squares.setdefault(block, 0.0)
        entries.setdefault(block, 0)
        if parameter.grad is not None:
            squares[block] += float(parameter.grad.detach().double().square().sum())
            entries[block] += parameter.numel()
    return [(squares[block] / max(entries[block], 1)) ** 0.5 for block in sorted(squares)]


class SFSRecorder(TrainerCallback):
    """SFS of every module of a LoR2C adapter, every `every` optimizer steps.

    `records` holds {"step", "blocks": [first, ..., last], "sfs"} for each module that there was.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.records: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Appends to `records`, after every `every`-th step."""
        if state.global_step % self.every == 0:
            self.records += [
                {"step": state.global_step, "blocks": list(range(span.first, span.last + 1)), "sfs": score}
                for span, score in AdaptedBlocks(model).scores("sfs").items()
            ]


def draw_gradient_ratio(path: Path, lor2c: Sequence[float], lora: Sequence[float]) -> bool:
    """Gradient per block of both methods, and their ratio, as a PNG. False, and no file, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8.0, 3.4), dpi=150, layout="constrained")
    size, ratio = figure.subplots(1, 2)
    blocks = range(len(lor2c))
    ticks = blocks[:: 1 + len(blocks) // 13]
    size.plot(blocks, lor2c, marker="o", label="LoR2C")
    size.plot(blocks, lora, marker="o", label="LoRA")
    size.set_ylabel("root mean square of the gradient")
    size.set_yscale("log")
    size.legend(frameon=False)
    ratio.bar(blocks, [a / b if b else 0.0 for a, b in zip(lor2c, lora, strict=True)])
    ratio.axhline(1.0, color="black", linewidth=0.8)
    ratio.set_ylabel("LoR2C / LoRA")
    for axes in (size, ratio):
        axes.set_xlabel("block")
        axes.set_xticks(list(ticks))
        axes.grid(alpha=0.3)
    figure.savefig(path)
    return True


def draw_sfs(path: Path, records: Sequence[dict[str, Any]]) -> bool:
    """SFS against steps, one line a module, as a PNG. False, and no file, without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    modules = sorted({tuple(record["blocks"]) for record in records})
    for place, blocks in enumerate(modules):
        own = [(r["step"], r["sfs"]) for r in records if tuple(r["blocks"]) == blocks]
        label = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
        colour = colormaps["viridis"](place / max(len(modules) - 1, 1))
        axes.plot(*zip(*own, strict=True), linewidth=1.2, color=colour, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("SFS: share of singular values below the r / 2 largest", fontsize="small")
    axes.grid(alpha=0.3)
    if modules:
        figure.legend(loc="outside right center", frameon=False, fontsize="x-small", ncols=1 + len(modules) // 13)
    figure.savefig(path)
    return True
