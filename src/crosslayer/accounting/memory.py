"""Bytes of a training step by part, at the moment of its peak.

    weights, gradients, optimizer   one element per parameter (states: what the optimizer keeps)
    activations                     what the forward leaves for the backward
    live                            CR-Net's live state, the states that `replay` makes again, the layer that a
                                    checkpoint runs again
    logits                          logits, their softmax and their gradient
    temporary                       what the backward of one layer, the loss or the optimizer holds for a moment

A step is walked through once: loss, backward of each layer from the top, update. Every moment has its parts; the
largest sum is the peak. What is kept is counted tensor by tensor, as autograd or a memory policy holds it; the working
set of a layer's backward is counted likewise for autograd and measured for CR-Net's own backward (`_WORKING_SET`).

Letters: D hidden size, F width of the MLP, L layers, n tokens of a micro-batch, V vocabulary, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..methods import MATRIX_OPTIMIZERS
from .kept import keeps_state, live_state_bytes, residual_bytes, saved_by_autograd, saved_bytes, state_bytes
from .methods import Method, method_of, policy_of
from .parameters import (
    count_adapter_parameters,
    count_layer_parameters,
    count_local_parameters,
    count_parameters,
    count_relora_factors,
    count_trainable,
    list_matrices,
    optimizer_rank,
    sparse_entries,
)
from .shapes import Shape
from .steps import PRECISIONS, Precision, Sharding, Step

PARTS = ("weights", "gradients", "optimizer", "activations", "live", "logits", "temporary")


def estimate_memory(config: Any, step: Step, method: Method | None = None) -> dict[str, int]:
    """Bytes by part (`PARTS`) on each device at the peak of a step; the method of a CRNetConfig is its `recompute`."""
    shape, method = Shape.of(config), method or method_of(config)
    peak = max(walk(shape, step, method), key=lambda moment: sum(moment[1].values()))[1]
    return {part: round(peak[part]) for part in PARTS}


def walk(shape: Shape, step: Step, method: Method) -> Iterator[tuple[str, dict[str, float]]]:
    """(moment, bytes by part) through one step."""
    sizes = _Sizes(shape, step, method)
    layers = range(shape.num_hidden_layers)
    saved = [step.tokens * saved_bytes(shape, step, method, layer) for layer in layers]
    if method.recompute == "none":
        saved = [size + sizes.cast_weights(layer) for layer, size in zip(layers, saved, strict=True)]
    elsewhere = sizes.elsewhere()
    everything = sum(sizes.gradients_of(layer) for layer in layers) + sizes.gradients_elsewhere
    fixed = {"weights": sizes.weights, "optimizer": sizes.states}

    logits, around_loss = sizes.loss()
    live = sizes.live_state()
    yield (
        "loss",
        {
            **fixed,
            "gradients": everything if step.accumulates else 0.0,
            "activations": sum(saved) + elsewhere,
            "live": live,
            "logits": logits,
            "temporary": around_loss + sizes.communication,
        },
    )
    done = 0.0 if step.releases_gradients else sizes.gradients_of_head
    for layer in reversed(layers):
        for phase, again, working in sizes.backward(layer):
            yield (
                f"layer {layer}, {phase}",
                {
                    **fixed,
                    "gradients": everything if step.accumulates else done + sizes.gradients_by(phase, layer),
                    "activations": sum(saved[: layer + 1]) + sizes.inputs(),
                    "live": again,
                    "logits": 0.0,
                    "temporary": working + sizes.communication,
                },
            )
        done = 0.0 if step.releases_gradients else done + sizes.gradients_of(layer)
    # Released, the gradient of the embeddings is the last one, and the largest.
    yield (
        "update",
        {
            **fixed,
            "gradients": sizes.gradients_of_head if step.releases_gradients else everything,
            "activations": 0.0,
            "live": 0.0,
            "logits": 0.0,
            "temporary": (0.0 if step.releases_gradients else sizes.optimizer_temporary) + sizes.communication,
        },
    )


@dataclass(frozen=True)
class _Widths:
    """Elements per token: `hidden` and `mlp` wide ones, in float32 and in the weights' dtype; how many of the hidden
    ones are really as wide as the keys."""

    hidden_float32: float
    hidden: float
    mlp_float32: float
    mlp: float
    as_keys: float


_WORKING_SET = {
    # What the backward of a block holds at its peak, its reused buffers among it, beside the state and the gradient of
    # its Y. Fitted to the allocator's peaks on a CPU over D 64..96, F 180..340, with and without shared keys, in
    # float32, bf16 and autocast: within 5 % of the working set under policies that rebuild, 15 % under `none`.
    "none": _Widths(14.0, 0.0, 2.4, 0.1, as_keys=2.8),
    "replay": _Widths(6.4, 8.6, 1.2, 1.7, as_keys=1.9),
    "invert": _Widths(5.7, 9.6, 2.2, 1.1, as_keys=1.6),
    "reversible": _Widths(5.7, 9.6, 2.2, 1.1, as_keys=1.6),
}


class _Sizes:
    """The parts that do not depend on the moment, and those that one layer's backward adds."""

    def __init__(self, shape: Shape, step: Step, method: Method) -> None:
        self.shape, self.step, self.method = shape, step, method
        self.policy = policy_of(method, shape.factorization)
        self.layers = shape.num_hidden_layers
        self.counts = count_parameters(shape)
        p, s = step.precision, step.sharding
        self.shards = s.fsdp
        whole = step.accumulates and not step.reduces_each_batch and s.replicas == 1
        self.gradient_shards = 1 if whole else s.fsdp
        self.carry = p.at_least_float32
        vocabulary = shape.vocab_size * shape.hidden_size / s.tensor
        self.in_layer = shape.of_layers(lambda layer: count_local_parameters(shape, layer, s.tensor))
        around = shape.final_norm + shape.position_embeddings
        local = sum(self.in_layer) + vocabulary + bool(self.counts["head"]) * vocabulary + around
        beta = self.counts["beta"]
        extra = self._added_parameters()
        self.local = local + extra
        self.weights = (self.local * p.weights + beta * (4 - min(p.weights, 4)) + self._indices()) / self.shards
        self.trainable = self._trainable(local, extra)
        self.states = optimizer_bytes(shape, method, p.states, self.trainable) / self.shards
        self.gradients_of_head = self._gradient(vocabulary + shape.final_norm)
        self.gradients_elsewhere = self._gradient(vocabulary * (1 + bool(self.counts["head"])) + around)
        self.optimizer_temporary = 0.0 if step.fused_optimizer else self.trainable * p.states / self.shards
        if method.optimizer in MATRIX_OPTIMIZERS:
            self.optimizer_temporary += largest_orthogonalisation(shape, method.optimizer)
        self.communication = 0.0
        if s.fsdp > 1:
            # Weights of two layers (one computed, one on its way), embeddings and head; one layer's whole gradient.
            gathered = 2 * max(self.in_layer) + vocabulary * (1 + bool(self.counts["head"]))
            self.communication = gathered * p.on_the_way + max(self.in_layer) * p.gradients
        elif s.replicas > 1:
            self.communication = self.trainable * p.gradients  # DDP's buckets

    def _added_parameters(self) -> float:
        if self.method.adapter is not None:
            return count_adapter_parameters(self.shape, self.method.adapter)
        if self.method.optimizer == "relora":
            return count_relora_factors(self.shape, self.method.optimizer_rank) / self.step.sharding.tensor
        return 0.0

    def _indices(self) -> float:
        """SLTrain's S is an index of 8 bytes beside each value."""
        if self.shape.factorization != "sltrain":
            return 0.0
        return 8 * sum(sparse_entries(self.shape, linear) for _, _, linear in self.shape.linears())

    def _trainable(self, local: float, extra: float) -> float:
        if self.method.adapter is not None:
            return extra
        if self.method.optimizer == "relora":
            return local + extra - self.counts["full_rank"] / self.step.sharding.tensor
        return local

    def _gradient(self, parameters: float) -> float:
        frozen = self.method.adapter is not None
        return 0.0 if frozen else parameters * self.step.precision.gradients / self.gradient_shards

    def gradients_of(self, layer: int) -> float:
        if self.method.adapter is not None or self.method.optimizer == "relora":
            frozen = 0.0 if self.method.adapter is not None else count_layer_parameters(self.shape, layer)["full_rank"]
            own = 0.0 if self.method.adapter is not None else self.in_layer[layer] - frozen
            added = self._added_parameters() / self.layers
            return (own + added) * self.step.precision.gradients / self.gradient_shards
        return self._gradient(self.in_layer[layer])

    def cast_weights(self, layer: int) -> float:
        """Autocast's copies of the matrices of a layer, which autograd saves; CR-Net's own backward casts anew."""
        p = self.step.precision
        if not p.is_autocast or self.policy is not None:
            return 0.0
        return (self.in_layer[layer] - self.shape.layers[layer].norms) * p.products

    def gradients_by(self, phase: str, layer: int) -> float:
        """Gradients that a layer has at a peak of its backward: of down, and of all but q, k, v in the attention's."""
        own = self.shape.layers[layer]
        positions = own.group(attention=False, adds=True)
        if phase == "attention":
            positions += own.group(attention=False, adds=False) + own.group(attention=True, adds=True)
        entries = {
            name: x.dense_entries if x.rank is None else x.factor_entries(x.rank) for name, x in own.linears.items()
        }
        return sum(entries[name] for name in positions) / sum(entries.values()) * self.gradients_of(layer)

    def inputs(self) -> float:
        """Token ids and the rotary tables, which live as long as the graph."""
        carry = residual_bytes(self.shape, self.step)
        return 8 * self.step.tokens + 2 * self.step.sequence * self.shape.layers[0].attention.key_dim * carry

    def elsewhere(self) -> float:
        """Saved outside the layers: ids, targets, the final norm and what the head reads."""
        p, hidden = self.step.precision, self.shape.hidden_size
        between = 0 if self.step.fused_norms or self.method.adapter is not None else hidden * p.at_least_float32
        norm = hidden * p.at_least_float32 + 4 + between + hidden * p.products
        return self.inputs() + self.step.tokens * (8 + norm)

    def loss(self) -> tuple[float, float]:
        """(logits, temporary) at the loss.

        In one piece: log-softmax, its gradient and that of the logits, all float32. By chunks (torch's
        linear_cross_entropy): two chunks of logits, and the gradients of head and hidden states, made in the forward.
        Under tensor parallelism the logits are gathered, so whole and in one piece.
        """
        p, n, vocabulary = self.step.precision, self.step.tokens, self.shape.vocab_size
        if not self.step.fused_loss or self.step.sharding.tensor > 1:
            return 3.0 * 4 * vocabulary * n, 0.0
        chunk = chunk_of_tokens(n, self.shape.hidden_size, self.shape.vocab_size)
        head = 0.0 if self.method.adapter is not None else vocabulary * self.shape.hidden_size * p.gradients
        return 2 * 4 * vocabulary * chunk, head + n * self.shape.hidden_size * p.products

    def live_state(self) -> float:
        """The live state of the last layer."""
        return self.step.tokens * live_state_bytes(self.shape, self.step, self.method)

    def backward(self, layer: int) -> list[tuple[str, float, float]]:
        """(phase, live, temporary) at each peak within the backward of a layer."""
        p, n, split = self.step.precision, self.step.tokens, self.step.sharding.tensor
        own, hidden = self.shape.layers[layer], self.shape.hidden_size
        mlp = own.mlp_width / split
        if self.policy is not None:
            states = self._states_made_again(layer) * n * state_bytes(self.shape, self.step, layer)
            G = n * (state_bytes(self.shape, self.step, layer) - hidden * residual_bytes(self.shape, self.step))
            for linear in own.linears.values():
                G += 0 if linear.carries else n * p.weights * linear.out_features  # made again, in no state
            if not self.policy.keeps_low_rank:
                G += n * p.products * max(linear.rank or 0 for linear in own.linears.values())  # X A, one by one
            keys = own.attention.key_value_heads * own.attention.key_dim
            narrower = hidden - keys / (split if own.is_split("k", split) else 1)
            widths = _WORKING_SET[self.policy.name]
            working = n * self.carry * (widths.hidden_float32 * hidden - widths.as_keys * narrower)
            working += n * self.carry * widths.mlp_float32 * mlp
            working += n * p.weights * (widths.hidden * hidden + widths.mlp * mlp)
            return [("attention", states, G + working)]
        # The MLP's backward: d h; d product, d silu, d up; the product itself is freed by then.
        freed = mlp * p.products if self.method.adapter is None else 0.0
        if p.is_autocast and self.method.recompute == "layers":
            freed = 0.0  # found by measurement: a checkpoint lets go of the cast product later
        temporary = n * (hidden * residual_bytes(self.shape, self.step) + 3 * mlp * p.weights - freed)
        if self.shape.factorization == "sltrain":  # W and its gradient, dense, of one matrix at a time
            temporary += 2 * hidden * mlp * p.weights
        if self.method.recompute in ("layers", "cola_m"):
            plain = Method(optimizer=self.method.optimizer, adapter=self.method.adapter)
            again = n * saved_by_autograd(self.shape, self.step, plain, layer)
            if self.method.recompute == "cola_m":  # the largest of its segments: gate and up
                again = n * (3 * mlp * p.weights + mlp * p.products + hidden * self.carry)
            elif residual_bytes(self.shape, self.step) == self.carry:
                again += self.cast_weights(layer) - n * hidden * self.carry  # the checkpoint is the norm's input
            return [("mlp", again, temporary)]
        return [("mlp", 0.0, temporary)]

    def _states_made_again(self, layer: int) -> float:
        """Full states alive at the backward of a layer, beside the kept ones below it."""
        method, layers = self.method, self.layers
        assert self.policy is not None
        # S_l, which is the live one, was replayed, or is counted as kept
        own = 0.0 if keeps_state(self.shape, method, layer) else 1.0
        if self.policy.inverts or layer == 0:
            return own
        interval = self.policy.interval(method.interval, layers)
        assert interval is not None
        return own + (layer - 1) % interval  # replayed up to S_{l - 1}


def optimizer_bytes(config: Any, method: Method, state_bytes: int, trainable: float | None = None) -> float:
    """Bytes that the optimizer keeps between steps.

    adamw        two moments
    adamw_8bit   two moments of one byte, and a float32 scale for each block of 256 (bitsandbytes' default)
    galore       two moments of the projected gradient and the projection, r (2 max + min) for a matrix min x max
                 (arXiv 2403.03507, table 1); Adam for the rest. galore_8bit: moments of one byte, the projection not
    apollo       two moments of the projected gradient, 2 r max; the projection is drawn again from a seed
                 (arXiv 2412.05270, table 1). apollo_mini: r = 1
    muon         one moment of the layers' matrices, two of everything else. spectron: a vector [r] for each factor too
    """
    shape = Shape.of(config)
    counts = count_parameters(shape)
    trainable = count_trainable(shape, method) if trainable is None else trainable
    name = method.optimizer
    eight_bits = 1 + 4 / 256
    moment = eight_bits if name.endswith("_8bit") else state_bytes
    if name in ("adamw", "adamw_8bit", "relora"):
        return 2 * trainable * moment
    split = trainable / sum(counts.values())
    if name in MATRIX_OPTIMIZERS:
        matrices = list(list_matrices(shape))
        vectors = sum(min(m, n) for m, n, is_factor in matrices if is_factor and name == "spectron")
        return (2 * sum(counts.values()) - sum(m * n for m, n, _ in matrices)) * split * moment + vectors * moment
    rank = optimizer_rank(shape, method)
    projected = projections = 0.0
    for _, _, linear in shape.linears():
        for in_features, out_features, count in linear.position.matrices:
            low, high = sorted((in_features, out_features))
            projected += count * 2 * min(rank, low) * high
            projections += count * min(rank, low) * low
    rest = sum(counts.values()) - counts["full_rank"]
    total = 2 * rest * moment + projected * moment
    if name.startswith("galore"):
        total += projections * state_bytes
    return total * split


def largest_orthogonalisation(shape: Shape, optimizer: str) -> float:
    """Bytes around Newton-Schulz for the largest matrix, m x n, m <= n, whole on every device.

    Muon: the momentum in float32, the matrix twice and its Gram matrix twice in bfloat16. Spectron, for a pair: all in
    float32, the Gram matrix three times, the other factor's result beside it.
    """
    found = [0.0]
    for rows, columns, is_factor in list_matrices(shape):
        low, size = min(rows, columns), rows * columns
        found.append(16 * size + 12 * low**2 if is_factor and optimizer == "spectron" else 8 * size + 4 * low**2)
    return max(found)


def chunk_of_tokens(tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Tokens whose logits torch's chunked loss holds at a time: next power of 2 of n / ceil(V / D), halved."""
    target = -(-tokens // -(-vocab_size // hidden_size))
    return max(1, min((1 << (target - 1).bit_length()) // 2, tokens))


__all__ = [
    "PARTS",
    "PRECISIONS",
    "Precision",
    "Sharding",
    "Step",
    "estimate_memory",
    "optimizer_bytes",
    "saved_bytes",
    "state_bytes",
]
