"""Floating-point operations per token: forward, backward, and what is run again.

A product with a matrix of n entries costs 2 n forward, 2 n for the gradient of its input and 2 n for that of the
matrix, wherever these are wanted. Attention counts the full square, as usual for model FLOPs utilisation (PaLM, arXiv
2204.02311, appendix B): scores and their sum over values, 2 T D' each for queries D' wide. Norms, rotary embeddings,
softmax and the gate are left out (about 1 % at D = 512).

Letters: D hidden size, L layers, T tokens in a sequence, V vocabulary, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .methods import POLICY_KEEPS, Method, keeps_state
from .parameters import optimizer_rank, trained_beside
from .shapes import POSITIONS, Shape

PARTS = ("layers", "attention", "head", "carried")


@dataclass(frozen=True)
class Operations:
    """Operations per token, by part: products of the layers (adapters too), attention, head, carried sums b Y."""

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)
    recompute: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> float:
        """Forward and backward: what the model needs, whatever the memory policy. The numerator of an MFU."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def total(self) -> float:
        """With what is run again."""
        return self.model + sum(self.recompute.values())

    @property
    def matrix_products(self) -> float:
        """All but the carried sums: what `torch.utils.flop_counter` sees."""
        parts = (self.forward, self.backward, self.recompute)
        return sum(number for counts in parts for part, number in counts.items() if part != "carried")


def count_operations(
    config: Any, sequence_length: int, method: Method | None = None, *, tokens: int | None = None
) -> Operations:
    """Operations of one training step per token.

    Args:
        config: a configuration or `Shape`.
        sequence_length: T, tokens that attend to one another.
        method: what is trained and kept; plain training by default.
        tokens: tokens per micro-batch, over which SLTrain's product B A, once per micro-batch, is shared out;
            `sequence_length` by default.

    With a frozen model the first layer's input wants no gradient, so neither do products before the first adapter.
    """
    shape, method = Shape.of(config), method or Method()
    forward, backward, again = (dict.fromkeys(PARTS, 0.0) for _ in range(3))
    for layer_idx in range(shape.num_hidden_layers):
        for part, entries, gradients in _products(shape, method, layer_idx, sequence_length):
            forward[part] += 2 * entries
            backward[part] += 2 * entries * gradients
        for part, entries in _products_again(shape, method, layer_idx, sequence_length):
            again[part] += 2 * entries
        if shape.factorization == "sltrain":
            once = _sltrain_product(shape, layer_idx) / (tokens or sequence_length)
            forward["layers"] += 2 * once
            backward["layers"] += 2 * 3 * once  # W rebuilt, then dA and dB
    head = shape.vocab_size * shape.hidden_size
    forward["head"] = 2 * head
    backward["head"] = 2 * head * (1 if method.adapter is not None else 2)
    return Operations(forward, backward, again)


def training_flops_per_token(config: Any, sequence_length: int) -> int:
    """Forward and backward for one token in a sequence of T tokens, without what a memory policy runs again.

    Forward: 2 per weight of a matrix product (layers and head), 4 T heads head_dim per layer for the two attention
    products, 2 per element of the carried outputs. Backward: twice the forward.
    """
    return int(count_operations(config, sequence_length).model)


def _products(shape: Shape, method: Method, layer_idx: int, T: int) -> Iterator[tuple[str, int, int]]:
    """(part, entries per token, how many gradients are wanted: of the input, of the weights) of one layer."""
    learns = method.adapter is None and method.optimizer != "relora"
    adapters = trained_beside(shape, method, layer_idx)
    below = method.adapter is None or layer_idx > 0  # whether anything below the layer wants a gradient
    reads = dict.fromkeys(("q", "k", "v"), below)
    outputs = {p: reads[p] or p in adapters for p in ("q", "k", "v")}
    reads["o"] = any(outputs.values())
    reads["gate"] = reads["up"] = below or reads["o"] or "o" in adapters
    reads["down"] = reads["gate"] or "gate" in adapters or "up" in adapters
    for position in POSITIONS:
        in_features, out_features = shape.linear_shape(position)
        rank = shape.linear_rank(layer_idx, position)
        entries = [in_features * out_features]
        if rank is not None and shape.factorization != "sltrain":
            entries = [rank * in_features, rank * out_features]
        for number in entries:
            yield "layers", number, reads[position] + learns
        if position in adapters:
            yield "layers", adapters[position] * in_features, reads[position] + 1
            yield "layers", adapters[position] * out_features, 2
    per_product = T * shape.query_width
    wanted_by_attention = 2 * any(outputs[p] for p in ("q", "k", "v"))  # a fused kernel gives all or nothing
    yield "attention", per_product, wanted_by_attention
    yield "attention", per_product, wanted_by_attention
    if "block" in adapters:
        yield "layers", adapters["block"] * shape.hidden_size, below + 1
        yield "layers", adapters["block"] * shape.hidden_size, 2
    if shape.carries(layer_idx):
        yield "carried", shape.carried_width, 2


def _products_again(shape: Shape, method: Method, layer_idx: int, T: int) -> Iterator[tuple[str, int]]:
    """(part, entries per token) of what the backward runs again in one layer.

    layers      the layer's forward but its last product, whose input is the last thing that is missing
    cola_m      every product with B, and attention
    invert      Y_{l-1} = (Y_l - T B) / b: every product with B; attention, from the rebuilt q, k, v
    replay      every product with B of a layer whose state was not kept; attention of all
    reversible  every product with A and B; attention
    """
    attention = 2 * T * shape.query_width
    linears = {p: _factors(shape, layer_idx, p) for p in POSITIONS}
    if method.recompute == "layers":
        yield "attention", attention
        yield "layers", sum(sum(entries) for entries in linears.values()) - linears["down"][-1]
        if shape.carries(layer_idx):
            yield "carried", shape.carried_width
    elif method.recompute == "cola_m":
        yield "attention", attention
        yield "layers", sum(entries[-1] for entries in linears.values())
    elif method.recompute != "none":
        low_rank_kept, _, inverts = POLICY_KEEPS[method.recompute]
        yield "attention", attention
        if not shape.carries(layer_idx):
            return
        layers = shape.num_hidden_layers
        is_live = layer_idx == layers - 1
        if inverts or not (is_live or keeps_state(method.recompute, method.interval, layers, layer_idx)):
            yield "layers", sum(entries[-1] for entries in linears.values())
            yield "carried", shape.carried_width
        if not low_rank_kept:
            yield "layers", sum(entries[0] for entries in linears.values())


def _factors(shape: Shape, layer_idx: int, position: str) -> tuple[int, ...]:
    in_features, out_features = shape.linear_shape(position)
    rank = shape.linear_rank(layer_idx, position)
    if rank is None or shape.factorization == "sltrain":
        return (in_features * out_features,)
    return rank * in_features, rank * out_features


def _sltrain_product(shape: Shape, layer_idx: int) -> int:
    """Entries of B A in one layer: in out r. The scatter of S, one addition per non-zero, is left out."""
    total = 0
    for position in POSITIONS:
        in_features, out_features = shape.linear_shape(position)
        total += in_features * out_features * (shape.linear_rank(layer_idx, position) or 0)
    return total


def optimizer_operations(config: Any, method: Method, refresh_every: int = 200) -> float:
    """Operations of one optimizer step in projections: per step, not per token, and none for AdamW.

    For a matrix m x n, m <= n, projected to rank r: down and up again, 4 m n r (GaLore), down alone, 2 m n r (APOLLO,
    whose scaling is elementwise), and GaLore's SVD of the gradient every `refresh_every` steps, about
    4 m^2 n + 22 m^3 with the left vectors only (Golub and Van Loan, Matrix Computations, figure 8.6.1).
    """
    shape = Shape.of(config)
    name = method.optimizer.removesuffix("_8bit")
    if name not in ("galore", "apollo", "apollo_mini"):
        return 0.0
    rank = optimizer_rank(shape, method)
    total = 0.0
    for position in POSITIONS:
        m, n = sorted(shape.linear_shape(position))
        total += (4 if name == "galore" else 2) * m * n * min(rank, m)
        if name == "galore":
            total += (4 * m * m * n + 22 * m**3) / refresh_every
    return shape.num_hidden_layers * total


__all__ = [
    "Operations",
    "count_operations",
    "optimizer_operations",
    "training_flops_per_token",
]
