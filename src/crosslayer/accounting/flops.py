"""Floating-point operations per token: forward, backward, and what is run again.

A product with a matrix of n entries costs 2 n forward, 2 n for the gradient of its input and 2 n for that of the
matrix, wherever these are wanted. Attention counts the full square, as usual for model FLOPs utilisation (PaLM, arXiv
2204.02311, appendix B), of a sliding window too: scores and their sum over values, 2 T D' each for queries and for
values D' wide. Norms, rotary embeddings, softmax and the gate are left out (about 1 % at D = 512).

Letters: D hidden size, L layers, T tokens in a sequence, V vocabulary, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..methods import MATRIX_OPTIMIZERS
from .kept import keeps_state
from .methods import Method, policy_of
from .parameters import list_matrices, optimizer_rank, trained_beside
from .shapes import Layer, Shape

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
    config: Any, sequence_length: int, method: Method | None = None, *, tokens: int | None = None, tensor: int = 1
) -> Operations:
    """Operations of one training step per token, on each of `tensor` devices that split the layers.

    Args:
        config: a configuration or `Shape`.
        sequence_length: T, tokens that attend to one another.
        method: what is trained and kept; plain training by default.
        tokens: tokens per micro-batch, over which SLTrain's product B A, once per micro-batch, is shared out;
            `sequence_length` by default.
        tensor: as `Sharding.tensor`; more than one repeat what layout R leaves whole.

    With a frozen model the first layer's input wants no gradient, so neither do products before the first adapter.
    """
    shape, method = Shape.of(config), method or Method()
    forward, backward, again = (dict.fromkeys(PARTS, 0.0) for _ in range(3))
    once = shape.of_layers(lambda layer_idx: _sltrain_product(shape, layer_idx) / (tokens or sequence_length))
    T, last = sequence_length, shape.num_hidden_layers - 1
    alike: dict[Any, list[tuple[str, float, int]]] = {}  # many layers are one object
    alike_again: dict[Any, list[tuple[str, float]]] = {}
    for layer_idx, layer in enumerate(shape.layers):
        beside = trained_beside(shape, method, layer_idx)
        kind = (id(layer), layer_idx > 0, *beside.items())
        if kind not in alike:
            alike[kind] = [*_products(shape, method, layer_idx, T, tensor)]
        for part, entries, gradients in alike[kind]:
            forward[part] += 2 * entries
            backward[part] += 2 * entries * gradients
        at_hand = layer_idx == last or keeps_state(shape, method, layer_idx)
        if (id(layer), at_hand) not in alike_again:
            alike_again[id(layer), at_hand] = [*_products_again(shape, method, layer, T, tensor, at_hand)]
        for part, entries in alike_again[id(layer), at_hand]:
            again[part] += 2 * entries
        if shape.factorization == "sltrain":
            forward["layers"] += 2 * once[layer_idx]
            backward["layers"] += 2 * 3 * once[layer_idx]  # W rebuilt, then dA and dB
    head = shape.vocab_size * shape.hidden_size / tensor
    forward["head"] = 2 * head
    backward["head"] = 2 * head * (1 if method.adapter is not None else 2)
    return Operations(forward, backward, again)


def training_flops_per_token(config: Any, sequence_length: int) -> int:
    """Forward and backward for one token in a sequence of T tokens, without what a memory policy runs again.

    Forward: 2 per weight of a matrix product (layers and head), 4 T heads head_dim per layer for the two attention
    products, 2 per element of the carried outputs. Backward: twice the forward.
    """
    return int(count_operations(config, sequence_length).model)


def _products(shape: Shape, method: Method, layer_idx: int, T: int, tensor: int) -> Iterator[tuple[str, float, int]]:
    """(part, entries per token, how many gradients are wanted: of the input, of the weights) of one layer."""
    learns = method.adapter is None and method.optimizer != "relora"
    adapters = trained_beside(shape, method, layer_idx)
    below = method.adapter is None or layer_idx > 0  # whether anything below the layer wants a gradient
    layer = shape.layers[layer_idx]
    reads = _inputs_that_learn(shape, layer, adapters, below)
    for position, linear in layer.linears.items():
        for number in layer.products_on_one(position, tensor, is_dense=shape.factorization == "sltrain"):
            yield "layers", number, reads[position] + learns
        if linear.router:
            yield "layers", linear.router, reads[position] + learns
        if position in adapters:
            yield "layers", adapters[position] * linear.in_features, reads[position] + 1
            yield "layers", adapters[position] * linear.out_features, 2
    into_attention = layer.group(attention=True, adds=False)
    wanted = 2 * any(reads[p] or p in adapters for p in into_attention)  # a fused kernel gives all or nothing
    yield "attention", T * layer.query_width / tensor, wanted
    yield "attention", T * layer.value_width / tensor, wanted
    if "block" in adapters:
        yield "layers", adapters["block"] * shape.hidden_size, below + 1
        yield "layers", adapters["block"] * shape.hidden_size, 2
    yield "carried", layer.built_width(tensor), 2


def _inputs_that_learn(shape: Shape, layer: Layer, adapters: dict[str, int], below: bool) -> dict[str, bool]:
    """Whether the input of each linear wants a gradient: whether anything that is trained lies before it.

    Attention first, then the MLP; within either, what reads a linear's output, as MLA's q_b does, comes after it.
    """
    reads: dict[str, bool] = {}
    for attention in (True, False):
        before = below
        for position in layer.group(attention=attention, adds=False):
            is_second = layer.linears[position].in_features != shape.hidden_size
            reads[position] = before if is_second else below
            before = before or reads[position] or position in adapters
        for position in layer.group(attention=attention, adds=True):
            reads[position] = before
            below = below or before or position in adapters
    return reads


def _products_again(
    shape: Shape, method: Method, layer: Layer, T: int, tensor: int, is_at_hand: bool
) -> Iterator[tuple[str, float]]:
    """(part, entries per token) of what the backward runs again in one layer, whose state may be at hand.

    layers      the layer's forward but its last product, whose input is the last thing that is missing
    cola_m      every product with B, and attention
    invert      Y_{l-1} = (Y_l - T B) / b: every product with B; attention, from the rebuilt q, k, v
    replay      every product with B of a layer whose state was not kept; attention of all
    reversible  every product with A and B; attention

    The Y of a position that does not carry is in no state: its product with B comes again under each of the last three,
    and where `replay` makes a state. A mixture of experts runs again as a whole, and its router once more under every
    policy, since the choice is made ahead.
    """
    attention = T * (layer.query_width + layer.value_width) / tensor
    is_sltrain = shape.factorization == "sltrain"
    linears = {name: layer.products_on_one(name, tensor, is_sltrain) for name in layer.linears}
    policy = policy_of(method, shape.factorization)
    if method.recompute == "layers":
        yield "attention", attention
        yield "layers", sum(sum(entries) for entries in linears.values()) - list(linears.values())[-1][-1]
        yield "carried", layer.built_width(tensor)
    elif method.recompute == "cola_m":
        yield "attention", attention
        yield "layers", sum(entries[-1] for entries in linears.values())
    elif policy is not None:
        if not policy.keeps_attention:
            yield "attention", attention
        for name, linear in layer.linears.items():
            if linear.is_mixture:
                again = 0 if policy.name == "none" else sum(linears[name]) + linear.router
                yield "layers", linear.router + again
            elif linear.rank is None or (linear.carries and not linear.builds):
                continue  # its input is at hand, and so is its Y
            elif not linear.carries:
                times = (policy.name != "none") + (policy.name == "replay" and not is_at_hand)
                yield "layers", times * linears[name][-1]
            else:
                if policy.inverts or not is_at_hand:
                    yield "layers", linears[name][-1]
                    yield "carried", linear.out_features / layer.split_of(name, tensor)
                if not policy.keeps_low_rank:
                    yield "layers", linears[name][0]


def _sltrain_product(shape: Shape, layer_idx: int) -> int:
    """Entries of B A in one layer: in out r. The scatter of S, one addition per non-zero, is left out."""
    return sum(linear.dense_entries * (linear.rank or 0) for linear in shape.layers[layer_idx].linears.values())


def optimizer_operations(config: Any, method: Method, refresh_every: int = 200) -> float:
    """Operations of one optimizer step in matrix products: per step, not per token, and none for AdamW.

    Newton-Schulz, 5 iterations over a matrix m x n, m <= n: two products of 2 m^2 n and one of 2 m^3 each (Muon); for
    factors one more of the two (Spectron).

    For a matrix m x n, m <= n, projected to rank r: down and up again, 4 m n r (GaLore), down alone, 2 m n r (APOLLO,
    whose scaling is elementwise), and GaLore's SVD of the gradient every `refresh_every` steps, about
    4 m^2 n + 22 m^3 with the left vectors only (Golub and Van Loan, Matrix Computations, figure 8.6.1).
    """
    shape = Shape.of(config)
    name = method.optimizer.removesuffix("_8bit")
    if name in MATRIX_OPTIMIZERS:
        sizes = ((*sorted(matrix[:2]), matrix[2]) for matrix in list_matrices(shape))
        return sum(
            5 * (4 * m * m * n + 2 * m**3) + (4 * m * m * n if is_factor and name == "spectron" else 0)
            for m, n, is_factor in sizes
        )
    if name not in ("galore", "apollo", "apollo_mini"):
        return 0.0
    rank = optimizer_rank(shape, method)
    total = 0.0
    for _, _, linear in shape.linears():
        for in_features, out_features, count in linear.position.matrices:
            m, n = sorted((in_features, out_features))
            total += count * (4 if name == "galore" else 2) * m * n * min(rank, m)
            if name == "galore":
                total += count * (4 * m * m * n + 22 * m**3) / refresh_every
    return total


__all__ = [
    "Operations",
    "count_operations",
    "optimizer_operations",
    "training_flops_per_token",
]
