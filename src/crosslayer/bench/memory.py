"""Activation memory by method: what each layer keeps, what a further layer adds, and the peak of a step by part."""

from typing import Any

from ..analysis import SavedActivations, measure_saved_activations
from ..errors import ConfigError
from ..methods import METHODS
from .contenders import ChunkedLoss, Contenders
from .rows import MemoryRow

FLOAT32 = 4


def saved_by_depth(
    shape: dict[str, Any], methods: list[str], depths: list[int], *, batch: int = 1, sequence: int = 64, **options
) -> dict[str, dict[int, SavedActivations]]:
    """What a forward keeps for its backward: {method: {number of layers: counted bytes by layer}}.

    Args:
        shape: as for `Contenders`; its number of layers is replaced by each depth.
        methods: names of `SETUPS`.
        depths: numbers of layers.
        batch, sequence: of the counted forward. Bytes per token hardly depend on them.
        options: further arguments of `Contenders`. An interval above a depth counts as the depth itself.
    """
    found: dict[str, dict[int, SavedActivations]] = {name: {} for name in methods}
    interval = options.pop("interval", None)
    for layers in depths:
        capped = min(interval, layers) if interval else None
        contenders = Contenders(shape | {"num_hidden_layers": layers}, methods, interval=capped, **options)
        ids = contenders.tokens(batch, sequence)
        for name in methods:
            with contenders.precision():
                found[name][layers] = measure_saved_activations(ChunkedLoss(contenders.model(name)), ids)
    return found


def memory_rows(saved: dict[str, dict[int, SavedActivations]], hidden_size: int) -> dict[str, MemoryRow]:
    """JSON of `saved_by_depth`: bytes per token, and growth per layer between the lowest and the highest depth.

    Growth is given in bytes per token and layer and, to compare with docs/memory.md, in float32 numbers of the
    hidden size h. The share of embeddings, head and loss is `elsewhere`.
    """
    rows: dict[str, MemoryRow] = {}
    for name, by_depth in saved.items():
        lowest, highest = min(by_depth), max(by_depth)
        if lowest == highest:
            raise ConfigError(f"layers={lowest} alone shows no growth; give two different depths")
        growth = by_depth[lowest].growth_per_layer(by_depth[highest])
        rows[name] = {
            "label": METHODS[name],
            "growth_bytes_per_token_and_layer": round(growth, 1),
            "growth_h": round(growth / (FLOAT32 * hidden_size), 3),
            "depths": {
                str(layers): {
                    "bytes_per_token": round(found.total_bytes / found.tokens, 1),
                    "elsewhere_bytes_per_token": round(found.elsewhere_bytes / found.tokens, 1),
                    "layer_bytes_per_token": [round(size / found.tokens, 1) for size in found.layer_bytes],
                }
                for layers, found in by_depth.items()
            },
        }
    return rows


__all__ = ["memory_rows", "saved_by_depth"]
