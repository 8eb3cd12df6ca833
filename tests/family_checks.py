"""Checks that hold for every family, written once; `tests/parity/test_families.py` runs them over the table.

Gradients are compared with plain autograd, which is what a model runs on in evaluation mode or without a tape.
"""

import contextlib

import torch

from crosslayer.crnet.cross_layer_linear import LowRankLinear
from crosslayer.crnet.mixture import CrossLayerMixture, LowRankExperts
from crosslayer.crnet.model import CrossLayerModel
from family_cases import FamilyCase, tokens
from model_cases import gradients
from tolerances import assert_all_close, assert_close

REBUILDING = ("invert", "replay", "reversible")


@contextlib.contextmanager
def plain_autograd():
    """The same model in training mode, without a tape."""
    uses_tape = CrossLayerModel._uses_tape
    CrossLayerModel._uses_tape = lambda *_: False
    try:
        yield
    finally:
        CrossLayerModel._uses_tape = uses_tape


def step(model, policy=None, interval=None, ids=None, **call):
    """Gradients of the loss in float64 logits; without a policy, of plain autograd in training mode."""
    model.train()
    if policy is not None:
        model.set_recompute(policy, interval)
    model.zero_grad()
    ids = tokens() if ids is None else ids
    torch.manual_seed(3)  # of dropout
    with plain_autograd() if policy is None else contextlib.nullcontext():
        logits = model(ids, **call, use_cache=False).logits.double()
    (-logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])).mean().backward()
    return gradients(model)


def worst_error(actual, expected):
    """|actual - expected| / |expected| of the worst parameter; below 1e-4 of the largest one's norm, per that.

    Some gradients are zero in theory, and only rounding is left of them: those of keys' biases.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-4 * max(float(g.norm()) for g in expected.values())
    return max(float((actual[n] - expected[n]).norm()) / max(float(expected[n].norm()), floor) for n in expected)


# Parity with transformers


def check_dense_is_theirs(case: FamilyCase, **inputs):
    """Logits and all gradients."""
    theirs = case.theirs()
    ours = case.causal_class._from_config(case.config(factorization="dense"), attn_implementation="sdpa").eval()
    ours.load_state_dict(case.to_ours(theirs.state_dict()), strict=True)
    ids = tokens()
    outputs = [model(ids, labels=ids, use_cache=False, **inputs) for model in (ours, theirs)]
    assert_close(outputs[0].logits, outputs[1].logits, what="logits")
    for output in outputs:
        output.loss.backward()
    assert_all_close(gradients(ours), case.to_ours(gradients(theirs)))


# The recurrence, written out


def reference_route(mixture, x):
    """Weights [tokens, experts] of a mixture in float64, zero for those not chosen."""
    gate, weight = mixture.gate, mixture.gate.weight
    rows = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for row, token in zip(rows, x, strict=True):
        logits = weight @ token
        if not hasattr(gate, "e_score_correction_bias"):
            probabilities = logits.softmax(-1)
            chosen = probabilities.sort(descending=True).indices[: gate.top_k]
        else:
            probabilities = logits.sigmoid()
            scores = (probabilities + gate.e_score_correction_bias).view(gate.num_group, -1)
            groups = scores.sort(descending=True).values[:, :2].sum(-1).sort(descending=True).indices[: gate.topk_group]
            scores[[group for group in range(gate.num_group) if group not in groups.tolist()]] = -torch.inf
            chosen = scores.flatten().sort(descending=True).indices[: gate.top_k]
        row[chosen] = probabilities[chosen]
        if gate.norm_topk_prob:
            row /= row.sum()
        row *= getattr(gate, "routed_scaling_factor", 1.0)
    return rows


def routed(mixture, x):
    """The router's own weights [tokens, experts], after a look at them: it takes them in float32."""
    _, weights, chosen = mixture.gate(x)
    rows = torch.zeros(len(x), len(mixture.gate.weight), dtype=torch.float64)
    rows = rows.scatter(1, chosen, weights.double())
    assert torch.equal(rows > 0, reference_route(mixture, x) > 0)
    assert_close(rows, reference_route(mixture, x), torch.float32, "routing weights")
    return rows


def reference_mixture(mixture, x, config):
    """sum_k w_k E_k(x), token by token and expert by expert: x [tokens, D] -> [tokens, D]."""
    experts, outputs = mixture.experts, torch.zeros_like(x)
    bends = config.factorization == "cola" or config.increment_activation == "silu"

    def bent(u):
        return u * u.sigmoid() if bends else u

    for token, weights in enumerate(routed(mixture, x)):
        for e in weights.nonzero().flatten():
            row, w = x[token], weights[e]
            if isinstance(experts, LowRankExperts):
                r, width = experts.rank, experts.gate_up_B.shape[1] // 2
                gate = experts.gate_up_B[e, :width] @ bent(experts.gate_up_A[e, :r] @ row)
                up = experts.gate_up_B[e, width:] @ bent(experts.gate_up_A[e, r:] @ row)
                inner = gate * gate.sigmoid() * up
                outputs[token] += w * (experts.down_B[e] @ bent(experts.down_A[e] @ inner))
            else:
                width = experts.down_proj.shape[-1]
                gate, up = experts.gate_up_proj[e, :width] @ row, experts.gate_up_proj[e, width:] @ row
                outputs[token] += w * (experts.down_proj[e] @ (gate * gate.sigmoid() * up))
    return outputs


@torch.no_grad()
def check_recurrence(case: FamilyCase, **fields):
    """Every linear output of every block, from its input alone and the reference's own output below: 1e-10."""
    model = case.model(torch.float64, **fields)
    config, seen = model.config, {}

    def remember(key):
        return lambda module, inputs, output: seen.update({key: (inputs[0], output)})

    for index, block in enumerate(model.base_model.blocks):
        for name in block.places:
            block.linear(name).register_forward_hook(remember((index, name)))
    model(tokens(), use_cache=False)

    below, carried = {}, set()
    for index, block in enumerate(model.base_model.blocks):
        for name, place in block.places.items():
            linear, (x, output) = block.linear(name), seen[index, name]
            flat = x.reshape(-1, x.shape[-1])
            if isinstance(linear, CrossLayerMixture):
                output = output[0]
                y = reference_mixture(linear, flat, config)
            elif isinstance(linear, LowRankLinear):
                u = flat @ linear.A.weight.T
                bends = linear.activation == "silu"
                y = (u * u.sigmoid() if bends else u) @ linear.B.weight.T
                y += 0 if linear.B.bias is None else linear.B.bias
            else:
                y = flat @ linear.weight.T + (0 if linear.bias is None else linear.bias)
            if hasattr(linear, "beta"):
                beta = linear.beta.item()
                b = (1 if beta >= 0 else -1) * (abs(beta) + config.beta_epsilon)
                y = y + b * below[name]
                carried.add(name)
            if place.carries:
                below[name] = y
            assert_close(output.reshape(y.shape), y, torch.float64, f"layers.{index}.{name}")
    names = [name for block in model.base_model.blocks for name, place in block.places.items() if place.carries]
    assert carried == {name for name in names if names.count(name) > 1}


# Memory policies


def check_policies(case: FamilyCase, bound=1e-12, **fields):
    """Every policy's gradients in float64, with states kept at several distances."""
    model = case.model(torch.float64, **({"num_hidden_layers": 5} | fields))
    expected = step(model)
    policies = ("none", *REBUILDING) if model.config.factorization == "cross_layer" else ("none", *REBUILDING[:2])
    for policy in policies:
        for interval in (None,) if policy == "none" else (None, 2, 3):
            error = worst_error(step(model, policy, interval), expected)
            assert error <= bound, f"{policy}, interval {interval}: {error:.2g}"


def check_replay_is_none(case: FamilyCase):
    """Bit for bit in float32."""
    model = case.model()
    expected = step(model, "none")
    for interval in (None, 3):
        actual = step(model, "replay", interval)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


# Checkpoints


def check_save_and_load(case: FamilyCase, folder, auto):
    """Through an Auto class, with equal logits and an equal configuration."""
    model = case.model(eos_token_id=None)
    model.save_pretrained(folder)
    again = auto.from_pretrained(folder).eval()
    assert type(again) is type(model)
    fields = model.config.to_dict() | {"dtype": None}
    assert again.config.to_dict() | {"dtype": None} == fields
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    return again
