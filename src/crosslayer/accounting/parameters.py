"""Parameters of a model from its configuration alone.

Letters: D hidden size, F width of the MLP, L layers, V vocabulary, r rank.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

from .adapters import lor2c_parameters, lora_parameters
from .methods import Adapter, Method
from .shapes import ATTENTION_POSITIONS, POSITIONS, Shape


def count_parameters(config: Any) -> dict[str, int]:
    """Number of parameters by group; their sum is the model's `num_parameters()`.

    Groups: `embeddings`, `head` (0 when tied), `full_rank` (dense matrices of the layers), `low_rank` (A and B),
    `beta`, `norms`, `biases`, and `sparse` where there is SLTrain's S. CR-Net: arXiv 2509.18993; `low_rank` is
    (L - 1)(11 D r + 3 F r) when all four attention positions are D wide.
    """
    shape = Shape.of(config)
    counts = dict.fromkeys(("embeddings", "head", "full_rank", "low_rank", "beta", "norms", "biases"), 0)
    counts["embeddings"] = shape.vocab_size * shape.hidden_size
    counts["head"] = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    counts["norms"] = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    if shape.factorization == "sltrain":
        counts["sparse"] = 0
    for layer_idx in range(shape.num_hidden_layers):
        for group, number in count_layer_parameters(shape, layer_idx).items():
            counts[group] += number
    return counts


def count_layer_parameters(shape: Shape, layer_idx: int) -> dict[str, int]:
    """The linears of one layer, by the groups of `count_parameters`; norms are not among them."""
    counts = dict.fromkeys(("full_rank", "low_rank", "beta", "biases"), 0)
    for position in POSITIONS:
        in_features, out_features = shape.linear_shape(position)
        rank = shape.linear_rank(layer_idx, position)
        if rank is None:
            counts["full_rank"] += in_features * out_features
        else:
            counts["low_rank"] += rank * (in_features + out_features)
            counts["beta"] += shape.carries(layer_idx)
        if shape.factorization == "sltrain":
            counts["sparse"] = counts.get("sparse", 0) + sparse_entries(shape, position)
        has_bias = shape.attention_bias if position in ATTENTION_POSITIONS else shape.mlp_bias
        counts["biases"] += out_features * has_bias
    return counts


def sparse_entries(shape: Shape, position: str) -> int:
    """Non-zeros of SLTrain's S: int(density in out), as in its code."""
    in_features, out_features = shape.linear_shape(position)
    return int(shape.density * in_features * out_features)


def count_adapter_parameters(config: Any, adapter: Adapter) -> int:
    """Trainable parameters of LoRA or LoR2C on a model of this shape, by the formulas of adapters.py."""
    shape = Shape.of(config)
    layers, linears = shape.num_hidden_layers, [shape.linear_shape(position) for position in adapter.positions]
    if adapter.kind == "lora":
        return lora_parameters(layers, linears, adapter.rank)
    return lor2c_parameters(
        shape.hidden_size,
        layers,
        adapter.rank,
        adapter.shared,
        adapter.fused,
        adapter.injected,
        inject_linears=linears,
    )


def count_trainable(config: Any, method: Method) -> int:
    """Parameters that get a gradient: the adapter's alone, ReLoRA's factors and what is not in the layers, or all."""
    shape = Shape.of(config)
    counts = count_parameters(shape)
    if method.adapter is not None:
        return count_adapter_parameters(shape, method.adapter)
    if method.optimizer == "relora":
        return sum(counts.values()) - counts["full_rank"] + count_relora_factors(shape, method.optimizer_rank)
    return sum(counts.values())


def count_relora_factors(shape: Shape, rank: int | None) -> int:
    """r (in + out) beside every frozen matrix of the layers (arXiv 2307.05695)."""
    rank = rank or shape.hidden_size // 4
    return shape.num_hidden_layers * rank * sum(sum(shape.linear_shape(p)) for p in POSITIONS)


def trained_beside(shape: Shape, method: Method, layer_idx: int) -> dict[str, int]:
    """Rank of what is trained beside the matrices of a layer, by position; LoR2C's pair is at "block"."""
    if method.optimizer == "relora":
        return dict.fromkeys(POSITIONS, method.optimizer_rank or shape.hidden_size // 4)
    adapter = method.adapter
    if adapter is None:
        return {}
    if adapter.kind == "lora":
        return dict.fromkeys(adapter.positions, adapter.rank)
    return _of_lor2c(shape, adapter, layer_idx)


def _of_lor2c(shape: Shape, adapter: Adapter, layer_idx: int) -> dict[str, int]:
    # Which blocks are fused or injected is decided while training; the cost does not depend on it. Here: fused ones
    # give way at the top, injected ones below them.
    pairs = shape.num_hidden_layers - adapter.fused - adapter.injected
    if layer_idx < pairs:
        return {"block": adapter.rank}
    if layer_idx < pairs + adapter.injected:
        return dict.fromkeys(adapter.positions, max(1, adapter.rank // 2))
    return {}


def optimizer_rank(shape: Shape, method: Method) -> int:
    """Rank of the projections: as asked, else D / 4; 1 for APOLLO-Mini."""
    return 1 if method.optimizer == "apollo_mini" else method.optimizer_rank or shape.hidden_size // 4


def dense_counterpart(config: Any) -> Any:
    """The same shape with every linear dense: what transformers' Llama would be. A copy of what was given."""
    if isinstance(config, Shape):
        return replace(config.factorized("dense"), hidden_act="silu")
    dense = deepcopy(config)
    dense.factorization, dense.increment_activation, dense.rank_pattern = "dense", None, {}
    return dense


__all__ = [
    "count_adapter_parameters",
    "count_layer_parameters",
    "count_parameters",
    "count_relora_factors",
    "count_trainable",
    "dense_counterpart",
    "optimizer_rank",
    "sparse_entries",
    "trained_beside",
]
