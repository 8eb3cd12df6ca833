"""What devices send to one another in a step, collective by collective, and how long their links take over it.

    tensor     layout R (crnet/tensor_parallel.py): X A of o and down in the forward, the gradient of the others' X A in
               the backward, h wide in a dense first layer; embeddings, and the logits, which every device needs whole.
               Dense models as Megatron-LM sums them, 4 h a layer (arXiv 1909.08053)
    fsdp       FSDP2: the weights of a block gathered before its forward and again before its backward, its gradients
               reduced and scattered after it; `replay` gathers once more each block that it runs again. Embeddings as
               a block, head and last norm once (transformers' plan)
    replicas   gradients, once a step: DDP's, or of the shares that FSDP leaves

Counted on two and four processes (tests/integration/test_communication.py): equal to the byte.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .kept import keeps_state
from .methods import Method, method_of, policy_of
from .parameters import count_adapter_parameters, count_local_parameters, count_relora_factors, count_trainable
from .shapes import Layer, Shape
from .steps import Sharding, Step

Axis = Literal["tensor", "fsdp", "replicas"]
Phase = Literal["forward", "backward", "update"]
AXES: tuple[Axis, ...] = ("tensor", "fsdp", "replicas")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Bytes of the whole tensors that a kind of collective works on: of a micro-batch, or in "update" of a step."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce"]
    axis: Axis
    phase: Phase
    size: float

    def sent(self, sharding: Sharding) -> float:
        """Bytes that each device sends, in a ring: (n - 1) / n of the size, for an all-reduce twice that.

        The factors by which nccl-tests turns times into bus bandwidths (its doc/PERFORMANCE.md).
        """
        devices = getattr(sharding, self.axis)
        return self.size * (devices - 1) / devices * (2 if self.kind == "all_reduce" else 1)


def count_collectives(config: Any, step: Step, method: Method | None = None) -> list[Collective]:
    """What a step sends, for the devices of `step.sharding`; a tensor's rows are taken to divide among them."""
    shape, method = Shape.of(config), method or method_of(config)
    found = (*_of_tensor(shape, step, method), *_of_fsdp(shape, step, method), *_of_replicas(shape, step, method))
    return [collective for collective in found if collective.size]


def _of_tensor(shape: Shape, step: Step, method: Method) -> Iterator[Collective]:
    n, p, tensor = step.tokens, step.precision, step.sharding.tensor
    if tensor == 1:
        return
    forward = sum(shape.of_layers(lambda index: _summed_forward(shape.layers[index])))
    backward = sum(shape.of_layers(lambda index: _summed_backward(shape, method, shape.layers[index], tensor)))
    betas = sum(shape.of_layers(lambda index: _summed_betas(shape.layers[index], tensor)))
    embeddings, head = n * shape.hidden_size * p.weights, n * shape.hidden_size * p.products
    yield Collective(kind="all_reduce", axis="tensor", phase="forward", size=n * forward * p.products + embeddings)
    yield Collective(kind="all_gather", axis="tensor", phase="forward", size=n * shape.vocab_size * p.products)
    yield Collective(
        kind="all_reduce", axis="tensor", phase="backward", size=n * backward * p.products + head + 4 * betas
    )


def _summed_forward(layer: Layer) -> int:
    """Numbers per token that a layer sums in its forward: X A of o and down, or a dense one's output."""
    return sum(x.rank or x.out_features for name, x in layer.linears.items() if layer.adds(name))


def _summed_backward(shape: Shape, method: Method, layer: Layer, tensor: int) -> int:
    """In its backward: the gradient of the other X A, or of a dense one's input; of keys and values that all hold;
    and what runs again."""
    total = 0
    for attention in (True, False):
        names = [name for name in layer.group(attention=attention, adds=False) if layer.is_split(name, tensor)]
        if shape.factorization == "dense":
            total += shape.hidden_size if names else 0  # one sum for those that read the same
        else:
            total += sum(layer.linears[name].rank or layer.linears[name].in_features for name in names)
    if not layer.is_split("k", tensor):
        total += layer.key_value_width
    return total + _summed_again(shape, method, layer)


def _summed_betas(layer: Layer, tensor: int) -> int:
    """Gradients of beta, of which every device has a part where Y is split."""
    split = (name for name in layer.linears if not layer.adds(name) and layer.is_split(name, tensor))
    return sum(layer.linears[name].builds for name in split)


def _summed_again(shape: Shape, method: Method, layer: Layer) -> int:
    """What runs again in the backward sums: X A of o and down; a checkpointed layer stops before down."""
    policy = policy_of(method, shape.factorization)
    if policy is not None and not policy.keeps_low_rank:
        return sum(x.rank or 0 for name, x in layer.linears.items() if layer.adds(name))
    if method.recompute == "layers":
        return sum(layer.linears[n].rank or shape.hidden_size for n in layer.group(attention=True, adds=True))
    return 0


def _of_fsdp(shape: Shape, step: Step, method: Method) -> Iterator[Collective]:
    p, s = step.precision, step.sharding
    if s.fsdp == 1:
        return
    layers = shape.of_layers(lambda index: _padded(shape, index, s))
    table, added = _vocabulary(shape, s.tensor), _added(shape, method)
    # A tied table is in two groups, with the last norm and alone, and neither is freed before the backward.
    forward = sum(layers) + 2 * table + shape.position_embeddings + shape.final_norm + added
    again = 0.0 if shape.tie_word_embeddings else table + shape.position_embeddings
    backward = sum(layers) + again + sum(layers[index] for index in _replayed(shape, method)) + added
    trained = count_trainable(shape, method) if added else forward
    yield Collective(kind="all_gather", axis="fsdp", phase="forward", size=forward * p.on_the_way)
    yield Collective(kind="all_gather", axis="fsdp", phase="backward", size=backward * p.on_the_way)
    yield Collective(kind="reduce_scatter", axis="fsdp", phase="backward", size=trained * p.gradients)


def _of_replicas(shape: Shape, step: Step, method: Method) -> Iterator[Collective]:
    s = step.sharding
    if s.replicas == 1:
        return
    trained = float(count_trainable(shape, method))
    if not _added(shape, method):
        tables = 1 if shape.tie_word_embeddings and s.fsdp == 1 else 2
        trained = sum(shape.of_layers(lambda index: _padded(shape, index, s)))
        trained += tables * _vocabulary(shape, s.tensor) + shape.position_embeddings + shape.final_norm
    size = trained / s.fsdp * step.precision.gradients
    yield Collective(kind="all_reduce", axis="replicas", phase="update", size=size)


def _added(shape: Shape, method: Method) -> int:
    """Parameters of adapters, or of ReLoRA's factors, beside those of the model."""
    if method.adapter is not None:
        return count_adapter_parameters(shape, method.adapter)
    return count_relora_factors(shape, method.optimizer_rank) if method.optimizer == "relora" else 0


def _padded(shape: Shape, layer_idx: int, sharding: Sharding) -> float:
    """Parameters of a layer as FSDP2 shards them: a beta, one number, fills up a row on every device."""
    betas = sum(linear.builds for linear in shape.layers[layer_idx].linears.values())
    return count_local_parameters(shape, layer_idx, sharding.tensor) + betas * (sharding.fsdp - 1)


def _vocabulary(shape: Shape, tensor: int) -> float:
    return shape.vocab_size * shape.hidden_size / tensor


def _replayed(shape: Shape, method: Method) -> list[int]:
    """Layers that `replay` runs again."""
    policy = policy_of(method, shape.factorization)
    if policy is None or policy.name != "replay":
        return []
    return [index for index in range(shape.num_hidden_layers - 1) if not keeps_state(shape, method, index)]


# Time


@dataclass(frozen=True, kw_only=True)
class Links:
    """How fast devices send, each in one direction.

    Args:
        node: devices of a node.
        within, between: bytes per second of each device to others of its node, and to other nodes.
    """

    node: int
    within: float
    between: float

    def bandwidth(self, sharding: Sharding, axis: Axis) -> float:
        """Of a group along an axis. Across nodes, all its members on a node send at once, each on its own card."""
        stride = {"tensor": 1, "fsdp": sharding.tensor, "replicas": sharding.tensor * sharding.fsdp}[axis]
        size: int = getattr(sharding, axis)
        if stride * size <= self.node:
            return self.within
        return min(self.within, max(1, self.node // stride) * self.between)

    def seconds(self, collectives: Iterable[Collective], sharding: Sharding) -> dict[tuple[Axis, Phase], float]:
        """Of a micro-batch by axis and phase; bandwidth alone, without what starting a collective takes."""
        found: dict[tuple[Axis, Phase], float] = {}
        for collective in collectives:
            key = (collective.axis, collective.phase)
            taken = collective.sent(sharding) / self.bandwidth(sharding, collective.axis)
            found[key] = found.get(key, 0.0) + taken
        return found


def step_seconds(
    compute: Mapping[str, float], sends: Mapping[tuple[Axis, Phase], float], accumulation: int, overlap: bool
) -> float:
    """Seconds of an optimizer step: `compute` and `sends` of a micro-batch by phase, and of the update.

    Sums of tensor parallelism are waited for, since what follows needs them. With `overlap`, gathers and reductions of
    FSDP2 go on beside the computation of a phase, and the replicas' reduction beside the last backward.
    """

    def phase(name: Phase, beside: float) -> float:
        own = compute[name] + sends.get(("tensor", name), 0.0)
        return max(own, beside) if overlap else own + beside

    forward, backward = sends.get(("fsdp", "forward"), 0.0), sends.get(("fsdp", "backward"), 0.0)
    reduced = sends.get(("replicas", "update"), 0.0)
    micro_batch = phase("forward", forward) + phase("backward", backward)
    last = phase("forward", forward) + phase("backward", backward + reduced)
    return (accumulation - 1) * micro_batch + last + compute["update"]


__all__ = ["AXES", "Axis", "Collective", "Links", "Phase", "count_collectives", "step_seconds"]
