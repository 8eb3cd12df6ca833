"""Passes over memory of a training step, beside its products: norms, rotations, gates, sums b Y, casts, loss, update.

Bytes that kernels read and write as eager PyTorch runs them: one that reads two float32 tensors and writes a third
moves 12 for each element. `tests/unit/test_roofline.py` counts those of real steps and compares. A block is run in one
of two ways: by autograd (dense models, checkpointed layers, other people's methods), or by CR-Net's own backward under
a memory policy (crnet/block_gradient.py), which runs norms and gates once more.

Letters: D hidden size, F output width of a position, n tokens of a micro-batch, r rank, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from .kept import keeps_state, residual_bytes
from .methods import Method, policy_of
from .parameters import count_trainable
from .shapes import Layer, Shape
from .steps import Step


class Pass(NamedTuple):
    """Kernels that go over memory and multiply no matrices.

    Args:
        phase: forward, backward, recompute or update.
        what: norm, rotation, activation, carried, residual, gradient, cast, embedding, loss or optimizer.
        moved: bytes that all of them read and write, of a micro-batch.
        kernels: how many they are.
        element: bytes of the narrowest element.
        operations: of sums b Y, as flops.py counts them.
    """

    phase: str
    what: str
    moved: float
    kernels: int
    element: int
    operations: float = 0.0


# (tensors read and written, kernels), each tensor as wide as what the function reads.
NORM = {"closed": ((7, 6), (13, 8)), "fused": ((2, 1), (3, 2)), "unfused": ((7, 6), (23, 16))}
"""Forward and backward of a norm: `RMSNormGradient`, on a CPU; CUDA's `rms_norm`; a CPU's, taken apart by autograd."""
ROTATION = ((10, 10), (15, 18))
"""transformers' `apply_rotary_pos_emb`, x cos + (-x_2, x_1) sin, forward and backward, of queries and keys."""
TURN = (7, 10)
"""The same in `Scratch`, in either direction (`turn`, crnet/local_functions.py)."""
GATE = ((5, 2), (9, 3))
"""silu(gate) up: silu, product; two products, and the gradient of silu."""
LOSS = ((2, 3), (4, 2))
"""log-softmax of float32 logits; zeros, and the gradient of the logits."""
DRIFT = 5
"""A rebuilt tensor against the kept one: the difference, two norms."""


def list_passes(shape: Shape, step: Step, method: Method) -> Counter[Pass]:
    """Every pass of forward, backward and recomputation of a micro-batch, and how often it is there."""
    found: Counter[Pass] = Counter()
    seen: dict[tuple, list[Pass]] = {}
    last = shape.num_hidden_layers - 1
    for index, layer in enumerate(shape.layers):
        above = shape.layers[index + 1] if index < last else None
        at_hand = index == last or keeps_state(shape, method, index)
        kept_below = index == 0 or keeps_state(shape, method, index - 1)
        kind = (id(layer), id(above), at_hand, kept_below)
        if kind not in seen:
            block = _Block(shape, layer, above, step, method)
            seen[kind] = [*(block.by_autograd() if block.policy is None else block.by_policy(at_hand, kept_below))]
        found.update(seen[kind])
    found.update(_around(shape, step, method))
    return found


def list_update_passes(shape: Shape, step: Step, method: Method) -> list[Pass]:
    """The optimizer's: AdamW reads weights, gradients and two moments, and writes all but the gradients."""
    p, trained = step.precision, count_trainable(shape, method) / step.sharding.tensor / step.sharding.fsdp
    state = 1 if method.optimizer.endswith("_8bit") else p.states
    return [Pass("update", "optimizer", trained * (2 * p.weights + p.gradients + 4 * state), 1, p.weights)]


class _Block:
    """One layer."""

    def __init__(self, shape: Shape, layer: Layer, above: Layer | None, step: Step, method: Method) -> None:
        self.shape, self.layer, self.step, self.method = shape, layer, step, method
        self.policy = policy_of(method, shape.factorization)
        self.p, self.w, self.c = step.precision.products, step.precision.weights, step.precision.at_least_float32
        self.built_above = {name for name, x in above.linears.items() if x.builds} if above else set()
        self.first = [name for name in layer.linears if not layer.adds(name)]
        self.adding = [name for name in layer.linears if layer.adds(name)]
        split = step.sharding.tensor
        self.width = {name: x.out_features / layer.split_of(name, split) for name, x in layer.linears.items()}
        self.turned = (layer.query_width + layer.attention.key_value_heads * layer.attention.key_dim) / split
        self.gate = layer.mlp_width / split if layer.is_gated else 0.0

    def over(
        self, phase: str, what: str, width: float, *elements: int, kernels: int = 1, operations: float = 0.0
    ) -> Pass:
        """A pass over tensors of this width, by the bytes of an element of each that is read or written."""
        n = self.step.tokens
        return Pass(phase, what, n * width * sum(elements), kernels, min(elements), n * width * operations)

    def function(self, phase: str, what: str, width: float, cost: tuple[int, int], element: int) -> Pass:
        """A function of the block by its row of the tables above."""
        return self.over(phase, what, width, *[element] * cost[0], kernels=cost[1])

    def norm_groups(self) -> Iterator[tuple[float, list[str]]]:
        """(width, positions that read it) of each norm; a mixture reads one too."""
        layer = self.layer
        for part in (True, False):
            readers = [*layer.group(attention=part, adds=False)]
            readers += [name for name in layer.group(attention=part, adds=True) if layer.linears[name].is_mixture]
            for width in dict.fromkeys(layer.linears[name].in_features for name in readers):
                yield width, [name for name in readers if layer.linears[name].in_features == width]

    def autocasts(self, phase: str, name: str, matrices: slice = slice(None)) -> Iterator[Pass]:
        """What a position reads, and its matrices, in the dtype of products; their gradients back in the backward."""
        p, w, linear = self.p, self.w, self.layer.linears[name]
        factors = self.layer.factors_on_one(name, self.step.sharding.tensor)[matrices]
        if p != w:
            yield Pass(phase, "cast", sum(i * o * count for i, o, _, count in factors) * (w + p), len(factors), p)
            if matrices.start is None:
                yield self.over(phase, "cast", linear.in_features, w, p)

    def attention_casts(self, phase: str) -> Iterator[Pass]:
        """Queries, keys and values in the dtype of products."""
        layer = self.layer
        if self.p != self.w:
            width = (layer.query_width + layer.key_value_width) / self.step.sharding.tensor
            yield self.over(phase, "cast", width, self.w, self.p)

    # By autograd

    def by_autograd(self) -> Iterator[Pass]:
        """Forward and backward; once more forward where layers are checkpointed."""
        forward, backward = self.autograd_forward("forward"), self.autograd_backward()
        yield from forward
        yield from backward
        if self.method.recompute in ("layers", "cola_m"):
            yield from self.autograd_forward("recompute")

    def autograd_forward(self, phase: str) -> Iterator[Pass]:
        p, w, c = self.p, self.w, self.c
        kind, residual = "fused" if self.step.fused_norms else "unfused", residual_bytes(self.shape, self.step)
        for width, _ in self.norm_groups():
            if w < c:
                yield self.over(phase, "cast", width, residual, c, c, w, kernels=2)
            yield self.function(phase, "norm", width, NORM[kind][0], c)
        yield self.function(phase, "rotation", self.turned, ROTATION[0], w)
        yield from self.attention_casts(phase)
        if self.gate:
            yield self.function(phase, "activation", self.gate, GATE[0], w)
        for name, linear in self.layer.linears.items():
            yield from self.autocasts(phase, name)
            if self.shape.factorization == "cola" and linear.rank:
                yield self.over(phase, "activation", linear.rank, p, p)
            if p != w and name in self.first:  # functions read Y in the dtype of weights
                yield self.over(phase, "cast", self.width[name], p, w)
            if linear.builds:
                yield self.over(phase, "carried", self.width[name], c, c, c, operations=2)
            if name in self.adding:
                yield self.over(phase, "residual", self.width[name], residual, p, residual)

    def autograd_backward(self) -> Iterator[Pass]:
        phase, p, w, c = "backward", self.p, self.w, self.c
        kind, residual = "fused" if self.step.fused_norms else "unfused", residual_bytes(self.shape, self.step)
        for width, readers in self.norm_groups():
            if w < c:
                yield self.over(phase, "cast", width, w, c, c, residual, kernels=2)
            yield self.function(phase, "norm", width, NORM[kind][1], c)
            for _ in readers[1:]:
                yield self.over(phase, "gradient", width, w, w, w)
            yield self.over(phase, "residual", width, residual, residual, residual)
        yield self.function(phase, "rotation", self.turned, ROTATION[1], w)
        yield from self.attention_casts(phase)
        if self.gate:
            yield self.function(phase, "activation", self.gate, GATE[1], w)
        for name, linear in self.layer.linears.items():
            yield from self.autocasts(phase, name)
            if self.shape.factorization == "cola" and linear.rank:
                yield self.over(phase, "activation", linear.rank, p, p, p)
            if p != w and name in self.first:
                yield self.over(phase, "cast", self.width[name], p, w)
            if linear.builds:  # d of b Y: b G, and G Y summed; G is added to what comes from above
                yield self.over(phase, "carried", self.width[name], *[c] * 9, kernels=4, operations=4)

    # By a memory policy

    def by_policy(self, at_hand: bool, kept_below: bool) -> Iterator[Pass]:
        """Functions, then the positions; what the policy runs again is the phase recompute."""
        c, w, policy = self.c, self.w, self.policy
        assert policy is not None
        kind = "fused" if self.step.fused_norms else "closed"
        for width, _ in self.norm_groups():
            for phase in ("forward", "backward"):
                yield self.function(phase, "norm", width, NORM[kind][0], c)
                if w < c:  # what it gives; the gradient that it gets
                    yield self.over(phase, "cast", width, c, w)
            yield self.function("backward", "norm", width, NORM[kind][1], c)
            if kind == "fused":  # added to the gradient of h; the closed form does it on the way
                yield self.over("backward", "residual", width, c, c, c)
            if w < c:
                yield self.over("backward", "cast", width, w, c)
        for phase in ("forward", "backward", "backward"):
            yield self.function(phase, "rotation", self.turned, TURN, w)
            yield from self.attention_casts(phase)
        if self.gate:
            for phase, cost in (("forward", GATE[0]), ("backward", GATE[0]), ("backward", GATE[1])):
                yield self.function(phase, "activation", self.gate, cost, w)
        for name in self.layer.linears:
            yield from self.position(name, at_hand, kept_below)

    def position(self, name: str, at_hand: bool, kept_below: bool) -> Iterator[Pass]:
        """One position under a memory policy."""
        linear, policy, F, p, w, c = self.layer.linears[name], self.policy, self.width[name], self.p, self.w, self.c
        assert policy is not None
        y = c if linear.carries else p
        # A CPU's product adds to b Y_{l-1}, scaled ahead of it; one of another dtype is written by itself. An
        # accelerator's reads Y_{l-1}, and writes a sum as wide as that.
        on_accelerator = self.step.fused_norms
        summed = (c, *[c - p] * (p != c)) if on_accelerator else (c, c) if p == c else (p, c, c)
        rebuilds = linear.builds and (policy.inverts or not at_hand)
        # Forward
        if linear.builds:
            yield self.over("forward", "carried", F, *summed, operations=2)
        elif linear.carries and p != c:
            yield self.over("forward", "cast", F, p, c)
        if name in self.adding:
            yield self.over("forward", "residual", F, c, y, c)
        elif y != w:
            for phase in ("forward", "backward"):
                yield self.over(phase, "cast", F, y, w)
        for phase in ("forward", "backward"):
            yield from self.autocasts(phase, name)
        if self.shape.factorization == "cola" and linear.rank:
            yield self.over("forward", "activation", linear.rank, p, p)
            yield self.over("backward", "activation", linear.rank, *[p] * 5, kernels=2)
        # Backward
        d = c if name in self.adding else w
        if name in self.adding and self.layer.in_attention(name):
            yield self.over("backward", "residual", F, c, y, c)
        if linear.carries:
            is_built = name in self.built_above
            yield self.over("backward", "carried", F, d, c, *[c] * is_built, operations=2 * is_built)
            d = c
        if p != d:
            yield self.over("backward", "cast", F, d, p)
        if p != w:
            yield self.over("backward", "gradient", linear.in_features, p, w, w)
        if linear.builds:
            yield self.over("backward", "carried", F, c, c, operations=2)
        # Recomputation
        if rebuilds:
            yield from self.autocasts("recompute", name, slice(None if not policy.keeps_low_rank else -1, None))
            yield self.over("recompute", "carried", F, *summed, operations=2)
            if policy.inverts and p != c and not on_accelerator:
                yield self.over("recompute", "carried", F, c, c)
            if policy.inverts and kept_below:
                yield self.over("recompute", "carried", F, *[c] * DRIFT, kernels=3)
        if name in self.adding and (policy.inverts or (policy.name == "replay" and not at_hand)):
            yield self.over("recompute", "residual", F, c, y, c)


def _around(shape: Shape, step: Step, method: Method) -> Iterator[Pass]:
    """Embeddings, the norm after the last block, the loss, and gradients that are added up over micro-batches."""
    precision, n = step.precision, step.tokens
    w, c, hidden = precision.weights, precision.at_least_float32, shape.hidden_size
    learns = method.adapter is None
    vocabulary = shape.vocab_size / step.sharding.tensor
    kind = "fused" if step.fused_norms else "unfused"
    yield Pass("forward", "embedding", 2 * n * hidden * w, 1, w)
    if learns:  # zeros, and a row for each token
        yield Pass("backward", "embedding", vocabulary * hidden * precision.gradients + 3 * n * hidden * w, 2, w)
    for phase, (norm, kernels), (logits, of_loss) in zip(("forward", "backward"), NORM[kind], LOSS, strict=True):
        yield Pass(phase, "norm", norm * n * hidden * c, kernels, c)
        yield Pass(phase, "loss", logits * n * vocabulary * 4, of_loss, 4)
        if precision.products < 4:
            yield Pass(phase, "loss", n * vocabulary * (4 + precision.products), 1, precision.products)
    if step.accumulates:
        trained = count_trainable(shape, method) / step.sharding.tensor
        yield Pass("backward", "gradient", 3 * trained * precision.gradients, shape.num_hidden_layers, w)


__all__ = ["Pass", "list_passes", "list_update_passes"]
