"""Floating-point operations per token: forward, backward, and what is run again.

A product with a matrix of n entries costs 2 n forward, 2 n for the gradient of its input and 2 n for that of the
matrix, wherever these are wanted. Attention counts the full square, as usual for model FLOPs utilisation (PaLM, arXiv
2204.02311, appendix B), of a sliding window too: scores and their sum over values, 2 T D' each for queries and for
values D' wide. Norms, rotary embeddings, softmax and the gate are left out (about 1 % at D = 512).

Letters: D hidden size, L layers, T tokens in a sequence, V vocabulary, r rank.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..methods import MATRIX_OPTIMIZERS
from .kept import keeps_state
from .methods import Method, policy_of
from .parameters import list_matrices, optimizer_rank, trained_beside
from .shapes import Factor, Layer, Linear, Shape

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


class Multiplication(NamedTuple):
    """One product with a matrix `inner` x `outer`, or with `copies` of which a token meets `active`.

    Args:
        phase: forward, backward or recompute.
        of: what it gives: the "output", or in the backward the gradient of the "input" or of the "weights".
    """

    phase: str
    part: str
    of: str
    inner: float
    outer: float
    active: float = 1
    copies: int = 1

    @property
    def operations(self) -> float:
        """Per token."""
        return 2 * self.active * self.inner * self.outer


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
    found = {phase: dict.fromkeys(PARTS, 0.0) for phase in ("forward", "backward", "recompute")}
    products = list_products(Shape.of(config), sequence_length, method or Method(), tokens=tokens, tensor=tensor)
    for product, times in products.items():
        found[product.phase][product.part] += times * product.operations
    return Operations(**found)


def list_products(
    shape: Shape, sequence_length: int, method: Method, *, tokens: int | None = None, tensor: int = 1
) -> Counter[Multiplication]:
    """Every product of a training step and how often it is there; arguments as in `count_operations`.

    Attention has two for queries and for values, T x width; sums b Y are the part "carried", 1 x width.
    """
    T, last = sequence_length, shape.num_hidden_layers - 1
    alike: Counter[Any] = Counter()  # many layers are one object
    for layer_idx, layer in enumerate(shape.layers):
        beside = trained_beside(shape, method, layer_idx)
        at_hand = layer_idx == last or keeps_state(shape, method, layer_idx)
        alike[id(layer), at_hand, layer_idx > 0, *beside.items()] += 1
    found: Counter[Multiplication] = Counter()
    for layer_idx, layer in enumerate(shape.layers):
        beside = trained_beside(shape, method, layer_idx)
        at_hand = layer_idx == last or keeps_state(shape, method, layer_idx)
        times = alike.pop((id(layer), at_hand, layer_idx > 0, *beside.items()), 0)
        if not times:
            continue
        for part, (inner, outer, active, count), of_input, of_weights in _products(shape, method, layer_idx, T, tensor):
            gradients = [("backward", "input")] * of_input + [("backward", "weights")] * of_weights
            for phase, of in [("forward", "output"), *gradients]:
                found[Multiplication(phase, part, of, inner, outer, active, count)] += times
        for part, factor in _products_again(shape, method, layer, T, tensor, at_hand):
            found[Multiplication("recompute", part, "output", *factor)] += times
        if shape.factorization == "sltrain":
            for linear in layer.linears.values():
                for inner, outer, _, count in linear.factors(is_dense=True):  # B A, of r rows
                    share = count * (linear.rank or 0) / (tokens or sequence_length)
                    found[Multiplication("forward", "layers", "output", inner, outer, share)] += times
                    rebuilt = Multiplication("backward", "layers", "output", inner, outer, share)
                    found[rebuilt] += 3 * times  # W again, then dA and dB
    head = (float(shape.hidden_size), shape.vocab_size / tensor)
    found[Multiplication("forward", "head", "output", *head)] += 1
    found[Multiplication("backward", "head", "input", *head)] += 1
    if method.adapter is None:
        found[Multiplication("backward", "head", "weights", *head)] += 1
    return found


def training_flops_per_token(config: Any, sequence_length: int) -> int:
    """Forward and backward for one token in a sequence of T tokens, without what a memory policy runs again.

    Forward: 2 per weight of a matrix product (layers and head), 4 T heads head_dim per layer for the two attention
    products, 2 per element of the carried outputs. Backward: twice the forward.
    """
    return int(count_operations(config, sequence_length).model)


def _products(
    shape: Shape, method: Method, layer_idx: int, T: int, tensor: int
) -> Iterator[tuple[str, Factor, bool, bool]]:
    """(part, matrix, whether the gradient of the input is wanted, and that of the weights) of one layer."""
    learns = method.adapter is None and method.optimizer != "relora"
    adapters = trained_beside(shape, method, layer_idx)
    below = method.adapter is None or layer_idx > 0  # whether anything below the layer wants a gradient
    layer = shape.layers[layer_idx]
    reads = _inputs_that_learn(shape, layer, adapters, below)
    hidden = shape.hidden_size
    for position, linear in layer.linears.items():
        for factor in layer.factors_on_one(position, tensor, is_dense=shape.factorization == "sltrain"):
            yield "layers", factor, reads[position], learns
        if linear.router:
            yield "layers", _router(linear), reads[position], learns
        if position in adapters:
            yield "layers", (linear.in_features, adapters[position], 1, 1), reads[position], True
            yield "layers", (adapters[position], linear.out_features, 1, 1), True, True
    into_attention = layer.group(attention=True, adds=False)
    wanted = any(reads[p] or p in adapters for p in into_attention)  # a fused kernel gives all or nothing
    for factor in _attention(layer, T, tensor):
        yield "attention", factor, wanted, wanted
    if "block" in adapters:
        yield "layers", (hidden, adapters["block"], 1, 1), below, True
        yield "layers", (adapters["block"], hidden, 1, 1), True, True
    yield "carried", (1, layer.built_width(tensor), 1, 1), True, True


def _attention(layer: Layer, T: int, tensor: int) -> tuple[Factor, Factor]:
    """Scores, and their sum over values."""
    return (T, layer.query_width / tensor, 1, 1), (T, layer.value_width / tensor, 1, 1)


def _router(linear: Linear) -> Factor:
    """Of a mixture."""
    return (linear.in_features, linear.router / linear.in_features, 1, 1)


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
) -> Iterator[tuple[str, Factor]]:
    """(part, matrix) of what the backward runs again in one layer, whose state may be at hand.

    layers      the layer's forward but its last product, whose input is the last thing that is missing
    cola_m      every product with B, and attention
    invert      Y_{l-1} = (Y_l - T B) / b: every product with B; attention, from the rebuilt q, k, v
    replay      every product with B of a layer whose state was not kept; attention of all
    reversible  every product with A and B; attention

    The Y of a position that does not carry is in no state: its product with B comes again under each of the last three,
    and where `replay` makes a state. A mixture of experts runs again as a whole, and its router once more under every
    policy, since the choice is made ahead.
    """
    is_sltrain = shape.factorization == "sltrain"
    linears = {name: layer.factors_on_one(name, tensor, is_sltrain) for name in layer.linears}
    policy = policy_of(method, shape.factorization)
    runs_attention = method.recompute in ("layers", "cola_m") or (policy is not None and not policy.keeps_attention)
    if runs_attention:
        for factor in _attention(layer, T, tensor):
            yield "attention", factor
    if method.recompute == "layers":
        for factor in [factor for factors in linears.values() for factor in factors][:-1]:
            yield "layers", factor
        yield "carried", (1, layer.built_width(tensor), 1, 1)
    elif method.recompute == "cola_m":
        for factors in linears.values():
            yield "layers", factors[-1]
    elif policy is not None:
        for name, linear in layer.linears.items():
            if linear.is_mixture:
                again = () if policy.name == "none" else (*linears[name], _router(linear))
                for factor in (_router(linear), *again):
                    yield "layers", factor
            elif linear.rank is None or (linear.carries and not linear.builds):
                continue  # its input is at hand, and so is its Y
            elif not linear.carries:
                for _ in range((policy.name != "none") + (policy.name == "replay" and not is_at_hand)):
                    yield "layers", linears[name][-1]
            else:
                if policy.inverts or not is_at_hand:
                    yield "layers", linears[name][-1]
                    yield "carried", (1, linear.out_features / layer.split_of(name, tensor), 1, 1)
                if not policy.keeps_low_rank:
                    yield "layers", linears[name][0]


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
    "Multiplication",
    "Operations",
    "count_operations",
    "list_products",
    "optimizer_operations",
    "training_flops_per_token",
]
