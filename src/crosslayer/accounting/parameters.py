"""Parameters of a model from its configuration alone.

Letters: D hidden size, F width of the MLP, L layers, V vocabulary, r rank.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

from .adapters import lor2c_parameters, lora_parameters
from .methods import Adapter, Method
from .shapes import Linear, Shape


def count_parameters(config: Any) -> dict[str, int]:
    """Number of parameters by group; their sum is the model's `num_parameters()`.

    Groups: `embeddings` (with learned positions), `head` (0 when tied), `full_rank` (dense matrices of the layers,
    routers among them), `low_rank` (A and B), `beta`, `norms`, `biases`, `sparse` where there is SLTrain's S, and
    `others` where layers have more than that. CR-Net: arXiv 2509.18993; `low_rank` is (L - 1)(11 D r + 3 F r) when all
    four attention positions are D wide.
    """
    shape = Shape.of(config)
    counts = dict.fromkeys(("embeddings", "head", "full_rank", "low_rank", "beta", "norms", "biases"), 0)
    counts["embeddings"] = shape.vocab_size * shape.hidden_size + shape.position_embeddings
    counts["head"] = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    counts["norms"] = shape.final_norm + sum(layer.norms for layer in shape.layers)
    for counted in shape.of_layers(lambda layer_idx: count_layer_parameters(shape, layer_idx)):
        for group, number in counted.items():
            counts[group] = counts.get(group, 0) + number
    return counts


def count_layer_parameters(shape: Shape, layer_idx: int) -> dict[str, int]:
    """The linears of one layer, by the groups of `count_parameters`; norms are not among them."""
    counts = dict.fromkeys(("full_rank", "low_rank", "beta", "biases"), 0)
    layer = shape.layers[layer_idx]
    for linear in layer.linears.values():
        if linear.rank is None:
            counts["full_rank"] += linear.dense_entries
        else:
            counts["low_rank"] += linear.factor_entries(linear.rank)
        counts["full_rank"] += linear.router
        counts["beta"] += linear.builds
        if shape.factorization == "sltrain":
            counts["sparse"] = counts.get("sparse", 0) + sparse_entries(shape, linear)
        counts["biases"] += linear.out_features * linear.position.bias
    if layer.others:
        counts["others"] = layer.others
    return counts


def count_local_parameters(shape: Shape, layer_idx: int, tensor: int) -> float:
    """Parameters of a layer, norms among them, on one of `tensor` devices that split it.

    Whole: norms, beta, the factor that faces a whole tensor, and keys and values whose heads are too few.
    """
    layer = shape.layers[layer_idx]
    total = float(layer.norms)
    if tensor == 1:
        return total + sum(count_layer_parameters(shape, layer_idx).values())
    for name, linear in layer.linears.items():
        split = tensor if layer.is_split(name, tensor) else 1
        by_columns = not layer.adds(name)
        total += linear.router + linear.builds
        total += linear.out_features * linear.position.bias / (split if by_columns else 1)
        for i, o, count in linear.position.matrices:
            if linear.rank is None or linear.is_mixture or shape.factorization == "sltrain":
                total += count * (i * o if linear.rank is None else linear.rank * (i + o)) / split
            else:
                total += linear.rank * (i + o / split if by_columns else i / split + o)
    return total + layer.others


def sparse_entries(shape: Shape, linear: Linear) -> int:
    """Non-zeros of SLTrain's S: int(density in out) of each matrix, as in its code."""
    return sum(int(shape.density * i * o) * count for i, o, count in linear.position.matrices)


def count_adapter_parameters(config: Any, adapter: Adapter) -> int:
    """Trainable parameters of LoRA or LoR2C on a model of this shape, by the formulas of adapters.py."""
    shape = Shape.of(config)
    if adapter.kind == "lora":
        return sum(
            lora_parameters(1, _adapted(shape, layer_idx, adapter), adapter.rank)
            for layer_idx in range(shape.num_hidden_layers)
        )
    return lor2c_parameters(
        shape.hidden_size,
        shape.num_hidden_layers,
        adapter.rank,
        adapter.shared,
        adapter.fused,
        adapter.injected,
        inject_linears=_adapted(shape, 0, adapter),
    )


def _adapted(shape: Shape, layer_idx: int, adapter: Adapter) -> list[tuple[int, int]]:
    """(in, out) of the linears of a layer that LoRA adapts, or LoR2C injects into."""
    linears = shape.layers[layer_idx].linears
    return [(linears[p].in_features, linears[p].out_features) for p in adapter.positions if p in linears]


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
    return sum(linear.factor_entries(rank) for _, _, linear in shape.linears())


def trained_beside(shape: Shape, method: Method, layer_idx: int) -> dict[str, int]:
    """Rank of what is trained beside the matrices of a layer, by position; LoR2C's pair is at "block"."""
    if method.optimizer == "relora":
        return dict.fromkeys(shape.layers[layer_idx].linears, method.optimizer_rank or shape.hidden_size // 4)
    adapter = method.adapter
    if adapter is None:
        return {}
    if adapter.kind == "lora":
        return _at(shape, layer_idx, adapter, adapter.rank)
    return _of_lor2c(shape, adapter, layer_idx)


def _of_lor2c(shape: Shape, adapter: Adapter, layer_idx: int) -> dict[str, int]:
    # Which blocks are fused or injected is decided while training; the cost does not depend on it. Here: fused ones
    # give way at the top, injected ones below them.
    pairs = shape.num_hidden_layers - adapter.fused - adapter.injected
    if layer_idx < pairs:
        return {"block": adapter.rank}
    if layer_idx < pairs + adapter.injected:
        return _at(shape, layer_idx, adapter, max(1, adapter.rank // 2))
    return {}


def _at(shape: Shape, layer_idx: int, adapter: Adapter, rank: int) -> dict[str, int]:
    return {position: rank for position in adapter.positions if position in shape.layers[layer_idx].linears}


def optimizer_rank(shape: Shape, method: Method) -> int:
    """Rank of the projections: as asked, else D / 4; 1 for APOLLO-Mini."""
    return 1 if method.optimizer == "apollo_mini" else method.optimizer_rank or shape.hidden_size // 4


def list_matrices(shape: Shape) -> Iterator[tuple[int, int, bool]]:
    """(rows, columns, is it A or B) of the matrices that Muon steps by their whole: of the layers' linears and routers,
    without stacks of experts."""
    for _, _, linear in shape.linears():
        if linear.position.mixture is not None:
            if linear.router:
                yield linear.position.mixture.experts, linear.router // linear.position.mixture.experts, False
        elif linear.rank is None:
            yield linear.out_features, linear.in_features, False
        else:
            yield linear.rank, linear.in_features, True
            yield linear.out_features, linear.rank, True


def dense_counterpart(config: Any) -> Any:
    """The same shape with every linear dense: what transformers' Llama would be. A copy of what was given."""
    if isinstance(config, Shape):
        return replace(config.factorized("dense"), hidden_act="silu")
    dense = deepcopy(config)
    dense.factorization, dense.increment_activation, dense.rank_pattern = "dense", None, {}
    dense.recompute, dense.recompute_interval = "none", None
    return dense


__all__ = [
    "count_adapter_parameters",
    "count_layer_parameters",
    "count_local_parameters",
    "count_parameters",
    "count_relora_factors",
    "count_trainable",
    "dense_counterpart",
    "list_matrices",
    "optimizer_rank",
    "sparse_entries",
    "trained_beside",
]
