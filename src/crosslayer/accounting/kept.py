"""Bytes that the forward of a layer leaves for its backward, tensor by tensor, and those of the state between layers.

Letters: D hidden size, F width of the MLP, r rank.
"""

from .methods import Method, policy_of
from .parameters import trained_beside
from .shapes import Layer, Shape
from .steps import Step


def keeps_state(shape: Shape, method: Method, layer_idx: int) -> bool:
    """Whether the state after a layer outlives the next one, for b near 1. The live state is another matter.

    A policy that inverts keeps it too where a position that carries ends: nothing above could give its Y back.
    """
    policy = policy_of(method, shape.factorization)
    if policy is None:
        return False
    if policy.keeps_state(method.interval, shape.num_hidden_layers, layer_idx):
        return True
    if not policy.inverts or layer_idx == shape.num_hidden_layers - 1:
        return False
    above = shape.layers[layer_idx + 1].linears
    own = shape.layers[layer_idx].linears
    return any(linear.carries and not (name in above and above[name].builds) for name, linear in own.items())


def state_bytes(shape: Shape, step: Step, layer_idx: int = -1) -> float:
    """Bytes per token of the state after a layer, h and every Y that carries.

    D + 5 D + 2 F elements of float32 in a CR-Net on Llama's block whose heads have keys of their own.
    """
    layer = shape.layers[layer_idx]
    carried = sum(x.out_features / split_of(layer, name, step) for name, x in layer.linears.items() if x.carries)
    return shape.hidden_size * residual_bytes(shape, step) + carried * step.precision.at_least_float32


def residual_bytes(shape: Shape, step: Step) -> int:
    """Bytes of an element of the hidden states between layers: float32 in CR-Net, else the embeddings' own."""
    precision = step.precision
    return precision.at_least_float32 if shape.factorization == "cross_layer" else precision.weights


def split_of(layer: Layer, position: str, step: Step) -> int:
    """Over how many devices the output of a position is split; what adds to the hidden states is summed, so whole."""
    return 1 if layer.adds(position) else step.sharding.tensor


def saved_bytes(shape: Shape, step: Step, method: Method, layer_idx: int) -> float:
    """Bytes per token that the forward of a layer leaves for its backward, without the live state."""
    if method.recompute == "layers":
        return shape.hidden_size * residual_bytes(shape, step)
    if method.recompute == "cola_m":  # two hidden states and A x of every position (CoLA's code)
        low_rank = shape.layers[layer_idx].low_rank_width * step.precision.products
        return 2 * shape.hidden_size * residual_bytes(shape, step) + low_rank
    if policy_of(method, shape.factorization) is not None:
        return _saved_by_policy(shape, step, method, layer_idx)
    return _saved_by_autograd(shape, step, method, layer_idx)


def _saved_by_policy(shape: Shape, step: Step, method: Method, layer_idx: int) -> float:
    """The table of crnet/policies.py in numbers, for b near 1, where no state is kept for its error bound.

    A state is h and the Y that carry; X A is r per position, and kept under every policy where the position does not
    carry, as is which experts a token went to. What attention leaves is its output and one sum per head. The model's
    input, D, is kept for the first layer.
    """
    policy = policy_of(method, shape.factorization)
    assert policy is not None
    layer, precision, split = shape.layers[layer_idx], step.precision, step.sharding.tensor
    size = 0.0
    if layer_idx == 0:
        size += shape.hidden_size * residual_bytes(shape, step)
    if keeps_state(shape, method, layer_idx):
        size += state_bytes(shape, step, layer_idx)
    for linear in layer.linears.values():
        if linear.position.mixture is not None:
            size += 8 * linear.position.mixture.active
        if linear.carries and not linear.builds and linear.is_mixture:
            continue
        if policy.keeps_low_rank or not linear.carries:
            size += linear.kept_width * precision.products
    if policy.keeps_attention:
        size += (layer.value_width * precision.products + 4 * layer.attention.heads) / split
        if precision.is_autocast:  # attention casts its own q, k and v
            size += (layer.query_width + layer.key_value_width) * precision.products / split
    return size


def _saved_by_autograd(shape: Shape, step: Step, method: Method, layer_idx: int) -> float:
    """What autograd saves in a layer of Llama's kind, tensor by tensor.

    Norms: the input in float32, one sum, what lies between (unless fused), and the output, which the linears read:
    once, or once for each of them under autocast, which casts. A x, and silu of it in CoLA. Attention: rotated q and k,
    v, its output, one sum per head. MLP: gate, silu of it, up, their product; without a gate, what the activation reads
    and gives. A mixture: that for each active expert, and the token that it reads. A frozen linear saves nothing; an
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
    gates = layer.mlp_width * p.weights * elements
    adding = layer.group(attention=False, adds=True)
    product = layer.mlp_width * p.products * (learns or bool(beside.keys() & set(adding)))
    experts = sum(x.position.mixture.active * hidden * p.products for x in layer.linears.values() if x.position.mixture)
    return norms + low_rank + (attention + gates + product + experts) / split


__all__ = ["keeps_state", "residual_bytes", "saved_bytes", "split_of", "state_bytes"]
