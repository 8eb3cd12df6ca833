"""Parameters, operations and bytes of a model of the CR-Net family, from its configuration alone.

Letters: D hidden size, L layers, T tokens in a sequence, V vocabulary, r rank.
"""

from copy import deepcopy

from ..crnet.configuration_crnet import POSITIONS, CRNetConfig
from ..crnet.memory_policies import POLICIES

ATTENTION_POSITIONS = ("q", "k", "v", "o")


def count_parameters(config: CRNetConfig) -> dict[str, int]:
    """Number of parameters by group; their sum is the model's `num_parameters()`.

    Groups: `embeddings`, `head` (0 when tied), `full_rank` (dense matrices of the layers), `low_rank` (A and B),
    `beta`, `norms`, `biases`. CR-Net: arXiv 2509.18993; (L - 1)(11 D r + 3 F r) in `low_rank` when F_in = F_out = D
    for the four attention positions and F is the MLP's width.
    """
    counts = dict.fromkeys(("embeddings", "head", "full_rank", "low_rank", "beta", "norms", "biases"), 0)
    counts["embeddings"] = config.vocab_size * config.hidden_size
    counts["head"] = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    counts["norms"] = (2 * config.num_hidden_layers + 1) * config.hidden_size
    for layer_idx in range(config.num_hidden_layers):
        for position in POSITIONS:
            in_features, out_features = config.linear_shape(position)
            rank = config.linear_rank(layer_idx, position)
            if rank is None:
                counts["full_rank"] += in_features * out_features
            else:
                counts["low_rank"] += rank * (in_features + out_features)
                counts["beta"] += config.factorization == "cross_layer" and layer_idx > 0
            has_bias = config.attention_bias if position in ATTENTION_POSITIONS else config.mlp_bias
            counts["biases"] += out_features * has_bias
    return counts


def dense_counterpart(config: CRNetConfig) -> CRNetConfig:
    """The same shape with every linear dense: what transformers' Llama would be."""
    dense = deepcopy(config)
    dense.factorization, dense.increment_activation, dense.rank_pattern = "dense", None, {}
    return dense


def training_flops_per_token(config: CRNetConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token in a sequence of T tokens.

    Forward: 2 per weight of a matrix product (layers and head), 4 T heads head_dim per layer for the two attention
    products (the full square, as usual for model FLOPs utilisation: PaLM, arXiv 2204.02311, appendix B), 2 per
    element of the carried outputs. Backward: twice the forward. Norms, rotary embeddings, softmax and the activation
    are left out (about 1 % at D = 512).
    """
    parameters = count_parameters(config)
    products = parameters["full_rank"] + parameters["low_rank"] + config.vocab_size * config.hidden_size
    attention = 2 * sequence_length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    carried = 0
    if config.factorization == "cross_layer":
        carried = (config.num_hidden_layers - 1) * _carried_width(config)
    return 3 * 2 * (products + attention + carried)


def activation_elements_per_token(config: CRNetConfig, layer_idx: int) -> int:
    """Elements kept for the backward pass of one layer, per token: by plain autograd, in CR-Net by its memory policy.

    Plain autograd, without a policy of ours:
    Two norm inputs and two norm outputs (4 D), query, key, value, output and contiguous output of fused attention,
    gate, up, activation and product of the MLP (4 F), A x of every low-rank position (and silu of it).
    """
    if config.factorization == "cross_layer":
        return _elements_kept_by_policy(config, layer_idx)
    _, query_width = config.linear_shape("q")
    _, key_value_width = config.linear_shape("k")
    elements = 4 * config.hidden_size
    elements += 3 * query_width + 2 * key_value_width
    elements += 4 * config.intermediate_size
    for position in POSITIONS:
        rank = config.linear_rank(layer_idx, position)
        elements += (rank or 0) * (2 if config.factorization == "cola" else 1)
    return elements


def _elements_kept_by_policy(config: CRNetConfig, layer_idx: int) -> int:
    """The table of crnet/memory_policies.py in numbers, for b near 1, where no state is kept for its error bound.

    A state, where it is kept or the live one of the last layer, is D + the carried widths; X A is r per position; what
    attention leaves is its output and one sum per head. The model's input, D, counts for the first layer.
    """
    policy = POLICIES[config.recompute]
    interval = policy.interval(config.recompute_interval, config.num_hidden_layers)
    last = layer_idx == config.num_hidden_layers - 1
    on_interval = interval is not None and layer_idx % interval == 0 and (layer_idx > 0 or not policy.inverts)
    elements = config.hidden_size if layer_idx == 0 else 0
    if last or on_interval:
        elements += config.hidden_size + _carried_width(config)
    if policy.keeps_low_rank:
        elements += sum(config.linear_rank(layer_idx, position) or 0 for position in POSITIONS)
    if policy.keeps_attention:
        elements += config.linear_shape("q")[1] + config.num_attention_heads
    return elements


def estimate_training_memory(
    config: CRNetConfig, tokens_per_micro_batch: int, *, parameter_bytes: int = 4, activation_bytes: int = 4
) -> dict[str, int]:
    """Bytes of a training step with AdamW: weights, gradients, optimizer, activations, logits.

    Weights, gradients and the two moments are exact (`parameter_bytes` each); activations are
    `activation_elements_per_token`; logits count V elements per token and their gradient in float32, the most that the
    loss can take. Temporary buffers and the process itself are not in it.
    """
    parameters = sum(count_parameters(config).values())
    activations = sum(activation_elements_per_token(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
    return {
        "weights": parameter_bytes * parameters,
        "gradients": parameter_bytes * parameters,
        "optimizer": 2 * parameter_bytes * parameters,
        "activations": activation_bytes * activations * tokens_per_micro_batch,
        "logits": 2 * 4 * config.vocab_size * tokens_per_micro_batch,
    }


def _carried_width(config: CRNetConfig) -> int:
    return sum(config.linear_shape(position)[1] for position in POSITIONS)
