"""Bytes that the forward of a layer leaves for its backward, tensor by tensor, and those of the state between layers.

Letters: D hidden size, F width of the MLP, r rank.
"""

from .methods import Method, policy_of
from .parameters import trained_beside
from .shapes import Linear, Shape
from .steps import Step


def keeps_state(shape: Shape, method: Method, layer_idx: int) -> bool:
    """Whether the state after a layer outlives the next one, for b near 1. The live state is another matter.

    `replay` keeps it too where a position begins to carry, as its first Y follows from no other.
    """
    policy, layers = policy_of(method, shape.factorization), shape.num_hidden_layers
    if policy is None:
        return False
    begins = any(x.carries and not x.builds for x in shape.layers[layer_idx].linears.values())
    if policy.name == "replay" and begins and layer_idx < layers - 1:
        return True
    return policy.keeps_state(method.interval, layers, layer_idx)


def live_state_bytes(shape: Shape, step: Step, method: Method) -> float:
    """Bytes per token of the state that is alive when the forward has ended."""
    if policy_of(method, shape.factorization) is None:
        return 0.0
    return state_bytes(shape, step) + _ended_bytes(shape, step, method, shape.num_hidden_layers - 1)


def _ended_bytes(shape: Shape, step: Step, method: Method, layer_idx: int) -> float:
    """Bytes per token of the Y that a state holds of positions that ended below, and that no kept state below holds."""
    total = 0.0
    for end, again, name in shape.chain_ends:
        if end < layer_idx < again and not any(keeps_state(shape, method, index) for index in range(end, layer_idx)):
            layer = shape.layers[end]
            total += layer.linears[name].out_features / layer.split_of(name, step.sharding.tensor)
    return total * step.precision.at_least_float32


def state_bytes(shape: Shape, step: Step, layer_idx: int = -1) -> float:
    """Bytes per token of the state after a layer, h and every Y that carries.

    D + 5 D + 2 F elements of float32 in a CR-Net on Llama's block whose heads have keys of their own.
    """
    layer = shape.layers[layer_idx]
    carried = sum(
        x.out_features / layer.split_of(name, step.sharding.tensor) for name, x in layer.linears.items() if x.carries
    )
    return shape.hidden_size * residual_bytes(shape, step) + carried * step.precision.at_least_float32


def residual_bytes(shape: Shape, step: Step) -> int:
    """Bytes of an element of the hidden states between layers: float32 at least, but in dense models their own."""
    precision = step.precision
    return precision.weights if shape.factorization in ("dense", "sltrain") else precision.at_least_float32


def saved_bytes(shape: Shape, step: Step, method: Method, layer_idx: int) -> float:
    """Bytes per token that the forward of a layer leaves for its backward, without the live state."""
    if method.recompute == "layers":
        return shape.hidden_size * residual_bytes(shape, step)
    if method.recompute == "cola_m":  # two hidden states and A x of every position (CoLA's code)
        low_rank = shape.layers[layer_idx].low_rank_width * step.precision.products
        return 2 * shape.hidden_size * step.precision.weights + low_rank
    if policy_of(method, shape.factorization) is not None:
        return _saved_by_policy(shape, step, method, layer_idx)
    return saved_by_autograd(shape, step, method, layer_idx)


def _saved_by_policy(shape: Shape, step: Step, method: Method, layer_idx: int) -> float:
    """The table of crnet/policies.py in numbers, for b near 1, where no state is kept for its error bound.

    A state is h and the Y that carry; X A is r per position, and kept under every policy where the position does not
    carry, as is which experts a token went to. `none` keeps the Y that do not carry beside the state, what attention
    leaves (its output and one sum per head), and all that experts want. The model's input, D, is kept for the first
    layer.
    """
    policy = policy_of(method, shape.factorization)
    assert policy is not None
    layer, precision, split = shape.layers[layer_idx], step.precision, step.sharding.tensor
    size = 0.0
    if layer_idx == 0:
        size += shape.hidden_size * residual_bytes(shape, step)
    if keeps_state(shape, method, layer_idx):
        size += state_bytes(shape, step, layer_idx) + _ended_bytes(shape, step, method, layer_idx)
    for name, linear in layer.linears.items():
        if not linear.carries and policy.name == "none" and not linear.is_mixture:
            size += linear.out_features * precision.products / layer.split_of(name, step.sharding.tensor)
        if linear.position.mixture is not None:
            size += 8 * linear.position.mixture.active
        if policy.name == "none" and linear.is_mixture:
            size += _experts(shape, linear, step, learns=True) / split
        elif linear.is_mixture and linear.carries and not linear.builds:
            continue  # its increment is its Y, which the state holds
        elif policy.keeps_low_rank or not linear.carries:
            size += linear.kept_width * precision.products
    if policy.keeps_attention:
        size += (layer.value_width * precision.products + 4 * layer.attention.heads) / split
        if precision.is_autocast:  # attention casts its own q, k and v
            size += (layer.query_width + layer.key_value_width) * precision.products / split
    return size


def saved_by_autograd(shape: Shape, step: Step, method: Method, layer_idx: int) -> float:
    """What autograd saves in a layer of Llama's kind, tensor by tensor.

    Norms: the input in float32, one sum, what lies between (unless fused), and the output, which the linears read:
    once, or once for each of them under autocast, which casts. A x, and silu of it in CoLA. Attention: rotated q and k,
    v, its output, one sum per head. MLP: gate, silu of it, up, their product; without a gate, what the activation reads
    and gives. A mixture: see `_experts`. A frozen linear saves nothing; an
    adapter beside it what it reads, and A x. Below the first adapter of a frozen model nothing is saved.
    """
    p, split = step.precision, step.sharding.tensor
    layer, hidden = shape.layers[layer_idx], shape.hidden_size
    beside = trained_beside(shape, method, layer_idx)
    is_frozen = method.adapter is not None
    learns = not is_frozen and method.optimizer != "relora"  # the matrices of the layer

    low_rank = sum(beside.values()) * p.products
    if shape.factorization in ("low_rank", "cola"):
        low_rank += layer.low_rank_width * p.products * (2 if shape.factorization == "cola" else 1)
    if (
        is_frozen and layer_idx == 0 and not beside.keys() & layer.linears.keys()
    ):  # LoR2C's first pair reads the embeddings
        return low_rank + hidden * p.weights * bool(beside)

    norms = 0.0
    for in_attention in (True, False):
        readers_by_width: dict[int, list[str]] = {}
        for name, linear in layer.linears.items():
            if layer.in_attention(name) == in_attention and (linear.is_mixture or not layer.adds(name)):
                readers_by_width.setdefault(linear.in_features, []).append(name)
        for width, names in readers_by_width.items():
            if not is_frozen or layer_idx > 0 or not in_attention:
                norms += width * p.at_least_float32 + 4
            if not (is_frozen or step.fused_norms):
                norms += width * p.at_least_float32
            readers = sum(learns or name in beside for name in names)
            norms += width * p.products * (readers if p.is_autocast else min(1, readers))
    attention = (layer.query_width + layer.key_value_width + layer.value_width) * p.products + 4 * layer.attention.heads
    elements = (2 if shape.hidden_act == "linear" else 3) if layer.is_gated else 1
    mlp = 0.0
    for name in layer.group(attention=False, adds=True):
        linear = layer.linears[name]
        if linear.is_mixture:
            mlp += _experts(shape, linear, step, learns)
        else:
            mlp += linear.in_features * (p.weights * elements + p.products * (learns or name in beside))
    return norms + low_rank + (attention + mlp) / split


def _experts(shape: Shape, linear: Linear, step: Step, learns: bool) -> float:
    """What autograd saves in a mixture, an estimate: 7 to 10 % too little in a tiny model.

    The router's probabilities; for each active expert the token that it reads, its output before and after the weight,
    four indices, gate, silu of it, up, their product, and A x of the three.
    """
    mixture, p = linear.position.mixture, step.precision
    assert mixture is not None
    width = mixture.width * (3 * p.weights + p.products * learns)
    rank = 3 * (linear.rank or 0) * p.products * (2 if shape.factorization == "cola" else 1)
    return 2 * 4 * mixture.experts + mixture.active * (3 * shape.hidden_size * p.products + 4 * 8 + width + rank)


__all__ = [
    "keeps_state",
    "live_state_bytes",
    "residual_bytes",
    "saved_by_autograd",
    "saved_bytes",
    "state_bytes",
]
