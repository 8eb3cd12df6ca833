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
from dataclasses import dataclass, field
from typing import Any

from .methods import POLICY_KEEPS, Method, keeps_state, policy_interval
from .parameters import (
    count_adapter_parameters,
    count_layer_parameters,
    count_parameters,
    count_relora_factors,
    count_trainable,
    optimizer_rank,
    sparse_entries,
    trained_beside,
)
from .shapes import POSITIONS, Shape

PARTS = ("weights", "gradients", "optimizer", "activations", "live", "logits", "temporary")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes of an element. `products` below `weights` is autocast: matrix products in it, the rest in `weights`."""

    weights: int = 4
    gradients: int = 4
    states: int = 4
    products: int = 4

    @property
    def is_autocast(self) -> bool:
        return self.products < self.weights

    @property
    def at_least_float32(self) -> int:
        """Norms and CR-Net's carried state."""
        return max(4, self.weights)


PRECISIONS = {
    "float32": Precision(),
    "bf16": Precision(weights=2, gradients=2, states=2, products=2),
    "bf16_autocast": Precision(products=2),
}


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How many devices share what.

    `data` replicas each take their own micro-batch; `fsdp` shards weights, gradients and states over them (ZeRO-3,
    arXiv 1910.02054), otherwise DDP holds a second copy of the gradients in its buckets. `tensor` devices split the
    linears (Megatron, arXiv 1909.08053: the MLP and heads, head and embeddings by vocabulary); norms, hidden states and
    rank-r products stay whole on each.
    """

    data: int = 1
    tensor: int = 1
    fsdp: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step works on.

    Args:
        sequence, micro_batch: tokens of a sequence, sequences of a micro-batch.
        precision: bytes of the elements.
        sharding: over devices.
        fused_loss: the loss is taken by vocabulary chunks (`CRNetForCausalLM.fused_loss`, our recipes).
        fused_norms: the norm keeps its input and output, not what lies between: CUDA's kernel. False on a CPU.
        fused_optimizer: AdamW updates in place (`adamw_torch_fused`, the Trainer's default); otherwise one more copy of
            the parameters passes by.
        accumulates: gradients of earlier micro-batches are there already.
    """

    sequence: int
    micro_batch: int = 1
    precision: Precision = field(default_factory=Precision)
    sharding: Sharding = field(default_factory=Sharding)
    fused_loss: bool = True
    fused_norms: bool = True
    fused_optimizer: bool = True
    accumulates: bool = False

    @property
    def tokens(self) -> int:
        return self.sequence * self.micro_batch


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
    live = sizes.live_state() if method.recompute in POLICY_KEEPS and shape.factorization == "cross_layer" else 0.0
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
    done = sizes.gradients_of_head
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
        done += sizes.gradients_of(layer)
    yield (
        "update",
        {
            **fixed,
            "gradients": everything,
            "activations": 0.0,
            "live": 0.0,
            "logits": 0.0,
            "temporary": sizes.optimizer_temporary + sizes.communication,
        },
    )


def saved_bytes(shape: Shape, step: Step, method: Method, layer_idx: int) -> float:
    """Bytes per token that the forward of a layer leaves for its backward, without CR-Net's live state."""
    if method.recompute == "layers":
        return shape.hidden_size * residual_bytes(shape, step)
    if method.recompute == "cola_m":  # two hidden states and A x of every position (CoLA's code)
        low_rank = sum(shape.linear_rank(layer_idx, p) or 0 for p in POSITIONS)
        return 2 * shape.hidden_size * residual_bytes(shape, step) + low_rank * step.precision.products
    if shape.factorization == "cross_layer":
        return _saved_by_policy(shape, step, method, layer_idx)
    return _saved_by_autograd(shape, step, method, layer_idx)


def residual_bytes(shape: Shape, step: Step) -> int:
    """Bytes of an element of the hidden states between layers: float32 in CR-Net, else the embeddings' own."""
    precision = step.precision
    return precision.at_least_float32 if shape.factorization == "cross_layer" else precision.weights


def _saved_by_policy(shape: Shape, step: Step, method: Method, layer_idx: int) -> float:
    """The table of crnet/memory_policies.py in numbers, for b near 1, where no state is kept for its error bound.

    A state is D + the seven Y, in float32; X A is r per position; what attention leaves is its output and one sum per
    head. The model's input, D, is kept for the first layer.
    """
    precision, split = step.precision, step.sharding.tensor
    low_rank_kept, attention_kept, _ = POLICY_KEEPS[method.recompute]
    size = 0.0
    if layer_idx == 0:
        size += shape.hidden_size * precision.at_least_float32
    if keeps_state(method.recompute, method.interval, shape.num_hidden_layers, layer_idx):
        size += state_bytes(shape, step)
    if low_rank_kept:
        size += sum(shape.linear_rank(layer_idx, p) or 0 for p in POSITIONS) * precision.products
    if attention_kept:
        size += (shape.query_width * precision.products + 4 * shape.num_attention_heads) / split
        if precision.is_autocast:  # attention casts its own q, k and v
            size += sum(shape.linear_shape(p)[1] for p in ("q", "k", "v")) * precision.products / split
    return size


def state_bytes(shape: Shape, step: Step) -> float:
    """Bytes per token of h and the seven Y: D + 5 D + 2 F elements of float32 when all heads have their own keys."""
    carried = sum(shape.linear_shape(p)[1] / _split(p, step) for p in POSITIONS)
    return (shape.hidden_size + carried) * step.precision.at_least_float32


def _saved_by_autograd(shape: Shape, step: Step, method: Method, layer_idx: int) -> float:
    """What autograd saves in a Llama layer, tensor by tensor.

    Norms: the input in float32, one sum, what lies between (unless fused), and the output, which the linears read:
    once, or once for each of them under autocast, which casts. A x, and silu of it in CoLA. Attention: rotated q and k,
    v, its output, one sum per head. MLP: gate, silu of it, up, their product. A frozen linear saves nothing; an adapter
    beside it what it reads, and A x. Below the first adapter of a frozen model nothing is saved.
    """
    p, split = step.precision, step.sharding.tensor
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    beside = trained_beside(shape, method, layer_idx)
    is_frozen = method.adapter is not None
    learns = not is_frozen and method.optimizer != "relora"  # the matrices of the layer

    low_rank = sum(beside.values()) * p.products
    if shape.factorization in ("low_rank", "cola"):
        ranks = sum(shape.linear_rank(layer_idx, position) or 0 for position in POSITIONS)
        low_rank += ranks * p.products * (2 if shape.factorization == "cola" else 1)
    if is_frozen and layer_idx == 0 and not set(beside) & set(POSITIONS):  # LoR2C's first pair reads the embeddings
        return low_rank + hidden * p.weights * bool(beside)

    norms = 0.0
    for positions in (("q", "k", "v"), ("gate", "up")):
        if not is_frozen or layer_idx > 0 or positions[0] == "gate":
            norms += hidden * p.at_least_float32 + 4
        if not (is_frozen or step.fused_norms):
            norms += hidden * p.at_least_float32
        readers = sum(learns or position in beside for position in positions)
        norms += hidden * p.products * (readers if p.is_autocast else min(1, readers))
    heads = 2 * shape.query_width + shape.linear_shape("k")[1] + shape.linear_shape("v")[1]
    attention = heads * p.products + 4 * shape.num_attention_heads
    gates = mlp * p.weights * (2 if shape.hidden_act == "linear" else 3)
    product = mlp * p.products * (learns or "down" in beside)
    return norms + low_rank + (attention + gates + product) / split


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
    # What CR-Net's own backward of a layer holds at its peaks, its reused buffers among it, beside the state and the
    # gradient of its Y: (phase, whether the policy inverts). Measured with torch's profiler of allocations over
    # D 64..96, F 180..340, in float32, bf16 and autocast; linear in D and F to 1 %.
    ("attention", False): _Widths(13.6, 0.0, 0.0, 3.0, as_keys=2.0),
    ("attention", True): _Widths(13.3, 3.0, 0.0, 3.0, as_keys=5.0),
    ("mlp", True): _Widths(9.5, 0.0, 4.0, 0.0, as_keys=2.0),
}


class _Sizes:
    """The parts that do not depend on the moment, and those that one layer's backward adds."""

    def __init__(self, shape: Shape, step: Step, method: Method) -> None:
        self.shape, self.step, self.method = shape, step, method
        self.layers = shape.num_hidden_layers
        self.counts = count_parameters(shape)
        p, s = step.precision, step.sharding
        self.shards = s.data if s.fsdp else 1
        self.norms_of_layer = 2 * shape.hidden_size
        self.carry = p.at_least_float32
        vocabulary = shape.vocab_size * shape.hidden_size / s.tensor
        self.in_layer = [self._local(layer) for layer in range(self.layers)]
        local = sum(self.in_layer) + vocabulary + bool(self.counts["head"]) * vocabulary + shape.hidden_size
        beta = self.counts["beta"]
        extra = self._added_parameters()
        self.local = local + extra
        self.weights = (self.local * p.weights + beta * (4 - min(p.weights, 4)) + self._indices()) / self.shards
        self.trainable = self._trainable(local, extra)
        self.states = optimizer_bytes(shape, method, p.states, self.trainable) / self.shards
        self.gradients_of_head = self._gradient(vocabulary + shape.hidden_size)
        self.gradients_elsewhere = self._gradient(vocabulary * (1 + bool(self.counts["head"])) + shape.hidden_size)
        self.optimizer_temporary = 0.0 if step.fused_optimizer else self.trainable * p.states / self.shards
        self.communication = 0.0
        if s.fsdp and s.data > 1:
            # Weights of two layers (one computed, one on its way), embeddings and head; one layer's whole gradient.
            gathered = 2 * max(self.in_layer) + vocabulary * (1 + bool(self.counts["head"]))
            self.communication = gathered * p.products + max(self.in_layer) * p.gradients
        elif s.data > 1:
            self.communication = self.trainable * p.gradients  # DDP's buckets

    def _local(self, layer: int) -> float:
        """Parameters of a layer on one device: split linears, whole norms, beta, and A or B that face whole tensors."""
        total = float(self.norms_of_layer)
        if self.step.sharding.tensor == 1:
            return total + sum(count_layer_parameters(self.shape, layer).values())
        for position in POSITIONS:
            in_features, out_features = self.shape.linear_shape(position)
            rank = self.shape.linear_rank(layer, position)
            split = self.step.sharding.tensor
            if rank is None or self.shape.factorization == "sltrain":
                total += in_features * out_features / split
                continue
            by_columns = position not in ("o", "down")
            total += rank * (in_features + out_features / split if by_columns else in_features / split + out_features)
            total += self.shape.carries(layer)
        return total

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
        return 8 * self.layers * sum(sparse_entries(self.shape, p) for p in POSITIONS)

    def _trainable(self, local: float, extra: float) -> float:
        if self.method.adapter is not None:
            return extra
        if self.method.optimizer == "relora":
            return local + extra - self.counts["full_rank"] / self.step.sharding.tensor
        return local

    def _gradient(self, parameters: float) -> float:
        frozen = self.method.adapter is not None
        return 0.0 if frozen else parameters * self.step.precision.gradients / self.shards

    def gradients_of(self, layer: int) -> float:
        if self.method.adapter is not None or self.method.optimizer == "relora":
            frozen = 0.0 if self.method.adapter is not None else count_layer_parameters(self.shape, layer)["full_rank"]
            own = 0.0 if self.method.adapter is not None else self.in_layer[layer] - frozen
            added = self._added_parameters() / self.layers
            return (own + added) * self.step.precision.gradients / self.shards
        return self._gradient(self.in_layer[layer])

    def cast_weights(self, layer: int) -> float:
        """Autocast's copies of the matrices of a layer, which autograd saves; CR-Net's own backward casts anew."""
        p = self.step.precision
        if not p.is_autocast or (self.shape.factorization == "cross_layer" and self.method.recompute in POLICY_KEEPS):
            return 0.0
        return (self.in_layer[layer] - self.norms_of_layer) * p.products

    def gradients_by(self, phase: str, layer: int) -> float:
        """Gradients that a layer has at a peak of its backward: of down, and of all but q, k, v in the attention's."""
        positions = {"mlp": ("down",), "attention": ("o", "gate", "up", "down")}[phase]
        share = sum(map(self._entries, positions)) / sum(map(self._entries, POSITIONS))
        return share * self.gradients_of(layer)

    def _entries(self, position: str) -> int:
        """What the parameters of a position are proportional to: in out, or in + out at one rank for all."""
        in_features, out_features = self.shape.linear_shape(position)
        is_low_rank = self.shape.linear_rank(self.layers - 1, position) is not None
        return in_features + out_features if is_low_rank else in_features * out_features

    def inputs(self) -> float:
        """Token ids and the rotary tables, which live as long as the graph."""
        carry = self.carry if self.shape.factorization == "cross_layer" else self.step.precision.weights
        return 8 * self.step.tokens + 2 * self.step.sequence * self.shape.head_dim * carry

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
        """
        p, n = self.step.precision, self.step.tokens
        vocabulary = self.shape.vocab_size / self.step.sharding.tensor
        if not self.step.fused_loss:
            return 3 * 4 * vocabulary * n, 0.0
        chunk = chunk_of_tokens(n, self.shape.hidden_size, self.shape.vocab_size)
        head = 0.0 if self.method.adapter is not None else vocabulary * self.shape.hidden_size * p.gradients
        return 2 * 4 * vocabulary * chunk, head + n * self.shape.hidden_size * p.products

    def live_state(self) -> float:
        """CR-Net's live state of the last layer."""
        return self.step.tokens * state_bytes(self.shape, self.step)

    def backward(self, layer: int) -> list[tuple[str, float, float]]:
        """(phase, live, temporary) at each peak within the backward of a layer."""
        p, n, split = self.step.precision, self.step.tokens, self.step.sharding.tensor
        hidden, mlp = self.shape.hidden_size, self.shape.intermediate_size / split
        if self.shape.factorization == "cross_layer" and self.method.recompute in POLICY_KEEPS:
            states = self._states_made_again(layer) * n * state_bytes(self.shape, self.step)
            G = n * (state_bytes(self.shape, self.step) - hidden * self.carry)
            if not POLICY_KEEPS[self.method.recompute][0]:
                G += n * p.products * max(self.shape.linear_rank(layer, q) or 0 for q in POSITIONS)  # X A, one by one
            inverts = POLICY_KEEPS[self.method.recompute][2]
            narrower = hidden - self.shape.linear_shape("k")[1]
            working = {
                phase: n * self.carry * (widths.hidden_float32 * hidden - widths.as_keys * narrower)
                + n * self.carry * widths.mlp_float32 * mlp
                + n * p.weights * (widths.hidden * hidden + widths.mlp * mlp)
                for (phase, of_inverting), widths in _WORKING_SET.items()
                if of_inverting == inverts
            }
            return [(phase, states, G + size) for phase, size in working.items()]
        # The MLP's backward: d h; d product, d silu, d up; the product itself is freed by then.
        freed = mlp * p.products if self.method.adapter is None else 0.0
        if p.is_autocast and self.method.recompute == "layers":
            freed = 0.0  # found by measurement: a checkpoint lets go of the cast product later
        temporary = n * (hidden * residual_bytes(self.shape, self.step) + 3 * mlp * p.weights - freed)
        if self.shape.factorization == "sltrain":  # W and its gradient, dense, of one matrix at a time
            temporary += 2 * hidden * mlp * p.weights
        if self.method.recompute in ("layers", "cola_m"):
            plain = Method(optimizer=self.method.optimizer, adapter=self.method.adapter)
            again = n * saved_bytes(self.shape, self.step, plain, layer)
            if self.method.recompute == "cola_m":  # the largest of its segments: gate and up
                again = n * (3 * mlp * p.weights + mlp * p.products + hidden * self.carry)
            elif residual_bytes(self.shape, self.step) == self.carry:
                again += self.cast_weights(layer) - n * hidden * self.carry  # the checkpoint is the norm's input
            return [("mlp", again, temporary)]
        return [("mlp", 0.0, temporary)]

    def _states_made_again(self, layer: int) -> float:
        """Full states alive at the backward of a layer, beside the kept ones below it."""
        method, layers = self.method, self.layers
        is_kept = keeps_state(method.recompute, method.interval, layers, layer)
        own = 0.0 if is_kept else 1.0  # S_l, which is the live one, was replayed, or is counted as kept
        if method.recompute != "replay" or layer == 0:
            return own
        interval = policy_interval("replay", method.interval, layers)
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
    """
    shape = Shape.of(config)
    counts = count_parameters(shape)
    trainable = count_trainable(shape, method) if trainable is None else trainable
    name = method.optimizer
    eight_bits = 1 + 4 / 256
    moment = eight_bits if name.endswith("_8bit") else state_bytes
    if name in ("adamw", "adamw_8bit", "relora"):
        return 2 * trainable * moment
    rank = optimizer_rank(shape, method)
    split = trainable / sum(counts.values())
    projected = projections = 0.0
    for position in POSITIONS:
        low, high = sorted(shape.linear_shape(position))
        projected += 2 * min(rank, low) * high
        projections += min(rank, low) * low
    rest = sum(counts.values()) - counts["full_rank"]
    total = 2 * rest * moment + shape.num_hidden_layers * projected * moment
    if name.startswith("galore"):
        total += shape.num_hidden_layers * projections * state_bytes
    return total * split


def chunk_of_tokens(tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Tokens whose logits torch's chunked loss holds at a time: next power of 2 of n / ceil(V / D), halved."""
    target = -(-tokens // -(-vocab_size // hidden_size))
    return max(1, min((1 << (target - 1).bit_length()) // 2, tokens))


def _split(position: str, step: Step) -> int:
    """Over how many devices the output of a position is split: o and down are summed, so whole on each."""
    return 1 if position in ("o", "down") else step.sharding.tensor


def method_of(config: Any, *, checkpointing: bool = False, optimizer: str = "adamw") -> Method:
    """The memory policy of a CRNetConfig; whole-layer or `invert` where `activation_checkpointing` asks for it."""
    policy = getattr(config, "recompute", "none")
    if checkpointing and policy == "none":
        policy = "invert" if getattr(config, "factorization", "dense") == "cross_layer" else "layers"
    return Method(recompute=policy, interval=getattr(config, "recompute_interval", None), optimizer=optimizer)


__all__ = [
    "PARTS",
    "PRECISIONS",
    "Precision",
    "Sharding",
    "Step",
    "estimate_memory",
    "method_of",
    "optimizer_bytes",
    "saved_bytes",
    "state_bytes",
]
