"""Which linears of a model correspond to each other from block to block.

The rule: in the longest list of blocks, the outermost linears with the same relative name and the same output width in
consecutive blocks are one position. That finds LLaMA's q_proj ... down_proj, BERT's query ... output.dense, GPT-2's
Conv1D c_attn, CR-Net's own and most others. A CR-Net's configuration says what its positions are called; in
other models the table below gives the usual ones their short names.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..errors import ConfigError

SHORT_NAMES = {
    "q": ("q_proj", "attention.self.query", "q_lin", "attention.query"),
    "k": ("k_proj", "attention.self.key", "k_lin", "attention.key"),
    "v": ("v_proj", "attention.self.value", "v_lin", "attention.value"),
    "qkv": ("attn.c_attn", "qkv_proj", "query_key_value", "Wqkv"),
    "o": ("o_proj", "attention.output.dense", "attn.c_proj", "attn.out_proj", "out_lin", "attention.dense"),
    "gate": ("gate_proj",),
    "gate_up": ("gate_up_proj",),
    "up": ("up_proj", "intermediate.dense", "mlp.c_fc", "dense_h_to_4h", "fc1", "lin1"),
    "down": ("down_proj", "output.dense", "mlp.c_proj", "dense_4h_to_h", "fc2", "lin2"),
}


@dataclass(frozen=True)
class Linear:
    """One linear of one block, whatever its class: its output is Y [..., out_features]."""

    module: nn.Module | None
    in_features: int
    out_features: int

    @property
    def b(self) -> float | None:
        """The learned factor of the previous layer's output, in CR-Net."""
        learned = getattr(self.module, "b", None)
        return float(learned().detach()) if callable(learned) and hasattr(self.module, "beta") else None

    @property
    def rank(self) -> int | None:
        """The rank of what CR-Net and its relatives compute, None for a full matrix."""
        factor = getattr(self.module, "A", None)
        return getattr(factor, "out_features", None) if isinstance(factor, nn.Module) else None


@dataclass(frozen=True)
class Position:
    """Linears with the same relative name: `linears[l]` is the one of block l, None where the block has none."""

    name: str
    module_name: str
    linears: tuple[Linear | None, ...]

    @property
    def width(self) -> int:
        """The largest output width."""
        return max(linear.out_features for linear in self.linears if linear is not None)

    def without_modules(self) -> "Position":
        """The same, without holding on to the model."""
        linears = (linear and replace(linear, module=None) for linear in self.linears)
        return replace(self, linears=tuple(linears))

    def is_paired(self, layer: int) -> bool:
        """Whether block `layer` and the one before have outputs of equal width."""
        if layer == 0:
            return False
        above, below = self.linears[layer], self.linears[layer - 1]
        return above is not None and below is not None and above.out_features == below.out_features


def find_positions(model: nn.Module) -> list[Position]:
    """The positions of a model, in the order of its first block. Raises ConfigError when there is none."""
    blocks = longest_block_list(model)
    by_name: dict[str, list[Linear | None]] = {}
    for index, block in enumerate(blocks):
        for name, linear in outermost_linears(block):
            by_name.setdefault(name, [None] * len(blocks))[index] = linear
    own = _own_names(model)
    positions, taken = [], {*SHORT_NAMES, *own.values()}
    for name, linears in by_name.items():
        short = own.get(name) or _short_name(name)
        position = Position(short if short in taken else name, name, tuple(linears))
        if any(position.is_paired(layer) for layer in range(len(blocks))):
            taken.discard(short)
            positions.append(position)
    if not positions:
        raise ConfigError(
            f"{type(model).__name__} has no recognisable linear positions: no two consecutive blocks of one list have "
            "linears of the same name and width; give a transformer with separate blocks"
        )
    return positions


def block_list(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model of transformers: the list `layers`, or `h` in GPT-2. Raises ConfigError for neither."""
    decoder = getattr(model, getattr(model, "base_model_prefix", ""), model)
    for name in ("layers", "h"):
        blocks = getattr(decoder, name, None)
        if isinstance(blocks, nn.ModuleList):
            return list(blocks)
    raise ConfigError(f"{type(model).__name__} has no list of blocks called layers or h")


def longest_block_list(model: nn.Module) -> list[nn.Module]:
    """The longest ModuleList whose items hold linears; empty when there is none."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    lists = [blocks for blocks in lists if any(next(outermost_linears(block), None) for block in blocks)]
    return max(lists, key=len, default=[])


def outermost_linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Linear]]:
    """(relative name, linear) below a module. A linear inside another one (an adapter's, a factor) is part of it."""
    for name, child in module.named_children():
        path = prefix if name == "base_layer" else f"{prefix}.{name}".lstrip(".")  # PEFT's wrapping does not rename
        shape = linear_shape(child)
        if shape is not None:
            yield path, Linear(child, *shape)
        else:
            yield from outermost_linears(child, path)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of anything that works as a linear on the last axis; None for other modules."""
    first, last = getattr(module, "A", None), getattr(module, "B", None)
    if isinstance(first, nn.Module) and isinstance(last, nn.Module):  # CR-Net and its relatives
        shape = getattr(first, "in_features", None), getattr(last, "out_features", None)
    elif hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D
        shape = module.nx, module.nf
    else:  # nn.Linear, its quantised kin, PEFT's wrappers
        shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(module, nn.Bilinear) or not all(isinstance(width, int) for width in shape):
        return None
    return shape  # type: ignore[return-value]


def _own_names(model: nn.Module) -> dict[str, str]:
    """{where it lies in a block: name} of a CR-Net's positions, empty for other models."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "carried_positions"):
        return {}
    layers = range(config.num_hidden_layers)
    return {place.module: name for layer_idx in layers for name, place in config.positions(layer_idx).items()}


def _short_name(name: str) -> str | None:
    found = [
        (len(suffix), short)
        for short, suffixes in SHORT_NAMES.items()
        for suffix in suffixes
        if name == suffix or name.endswith(f".{suffix}")
    ]
    return max(found)[1] if found else None


__all__ = ["SHORT_NAMES", "Linear", "Position", "block_list", "find_positions", "longest_block_list"]
