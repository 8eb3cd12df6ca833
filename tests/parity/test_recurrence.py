"""Parity with an independent float64 reference: CR-Net's recurrence and the Llama around it, in plain torch.

Nothing of transformers or crosslayer takes part in it but the names of the parameters. The model runs
with sdpa, because transformers' eager attention takes its softmax in float32.
"""

import math

import pytest
import torch

from crosslayer.crnet import CRNetModel, CrossLayerLinear
from model_cases import CASES, gradients, model_of, tokens
from tolerances import assert_all_close, assert_close, assert_far, error_in_tolerances


def silu(x):
    return x / (1 + torch.exp(-x))


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x, theta):
    """RoPE on [B, T, heads, d]. The tables are rounded as in transformers: made in float32, then widened."""
    d = x.shape[-1]
    inverse_frequency = 1.0 / (theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d))
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * inverse_frequency
    cos, sin = angles.cos().double()[:, None, :], angles.sin().double()[:, None, :]
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q, k, v):
    """Causal softmax attention, head by head: q [B, T, heads, d], k and v [B, T, key-value heads, d]."""
    T, heads = q.shape[1], q.shape[2]
    causal = torch.tril(torch.ones(T, T, dtype=torch.float64))
    outputs = []
    for head in range(heads):
        shared = head * k.shape[2] // heads
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / math.sqrt(q.shape[-1])
        scores = torch.exp(scores - scores.amax(-1, keepdim=True)) * causal
        outputs.append(scores / scores.sum(-1, keepdim=True) @ v[:, :, shared])
    return torch.cat(outputs, -1)


def reference_logits(state, config, ids):
    """The whole model; `linear` is the recurrence."""
    Y = {}  # the previous layer's output of each position

    def linear(layer, position, x):
        name = f"model.layers.{layer}.{'self_attn' if position in 'qkvo' else 'mlp'}.{position}_proj"
        if f"{name}.weight" in state:
            y = x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)
        else:
            u = x @ state[f"{name}.A.weight"].T
            u = silu(u) if config.factorization == "cola" or config.increment_activation else u
            y = u @ state[f"{name}.B.weight"].T + state.get(f"{name}.B.bias", 0)
        if f"{name}.beta" in state:
            beta = state[f"{name}.beta"]
            # |beta| written as s beta, which has derivative 1 at beta = 0 too
            s = -1.0 if beta < 0 else 1.0
            y = s * (s * beta + config.beta_epsilon) * Y[position] + y
        Y[position] = y
        return y

    h = state["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        norm = f"model.layers.{layer}.{{}}_layernorm.weight".format
        x = rms_norm(h, state[norm("input")], config.rms_norm_eps)
        q, k, v = (linear(layer, position, x).unflatten(-1, (-1, config.head_dim)) for position in "qkv")
        theta = config.rope_parameters["rope_theta"]
        h = h + linear(layer, "o", attend(rotate(q, theta), rotate(k, theta), v))
        x = rms_norm(h, state[norm("post_attention")], config.rms_norm_eps)
        gate, up = linear(layer, "gate", x), linear(layer, "up", x)
        h = h + linear(layer, "down", (gate if config.hidden_act == "linear" else silu(gate)) * up)
    return rms_norm(h, state["model.norm.weight"], config.rms_norm_eps) @ state["lm_head.weight"].T


def reference_loss(logits, ids):
    log_probabilities = logits - torch.logsumexp(logits, -1, keepdim=True)
    return -log_probabilities[:, :-1].gather(-1, ids[:, 1:, None]).mean()


def state_of(model, requires_grad=False):
    """The model's parameters by name, as leaves of their own; a tied head stays tied."""
    state = {name: p.detach().clone().requires_grad_(requires_grad) for name, p in model.named_parameters()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    return state


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_reference(case):
    model = model_of(case, dtype=torch.float64)
    ids = tokens()
    output = model(ids, labels=ids)
    output.loss.backward()
    state = state_of(model, requires_grad=True)
    expected = reference_logits(state, model.config, ids)
    loss = reference_loss(expected, ids)
    loss.backward()
    assert output.logits.dtype == torch.float64
    assert_close(output.logits, expected, what="logits")
    # transformers takes the loss of float64 logits in float32, and with it the gradients.
    assert_close(output.loss, loss, torch.float32)
    expected_grads = {name: state[name].grad for name in dict(model.named_parameters())}
    assert_all_close(gradients(model), expected_grads, torch.float32)


@pytest.mark.parametrize("case", ["cross_layer", "gqa", "silu_increment"])
def test_beta_takes_every_sign(case):
    """Otherwise the cases above would not test s(beta)."""
    betas = [m.beta.item() for m in model_of(case).modules() if isinstance(m, CrossLayerLinear)]
    assert len(betas) == 14
    assert min(betas) < -0.5
    assert 0.0 in betas
    assert max(betas) > 0.5


def float64_loss(model, ids):
    """transformers' own loss goes through float32."""
    return reference_loss(model(ids).logits, ids)


@pytest.mark.parametrize("case", ["cross_layer", "silu_increment"])
def test_gradients_in_float64(case):
    """With the loss in float64 too, equal to 1e-10, and beta's gradients to finite differences."""
    model = model_of(case, dtype=torch.float64)
    ids = tokens()
    float64_loss(model, ids).backward()
    state = state_of(model, requires_grad=True)
    reference_loss(reference_logits(state, model.config, ids), ids).backward()
    assert_all_close(gradients(model), {name: state[name].grad for name in dict(model.named_parameters())})

    step = 1e-5
    for name, parameter in model.named_parameters():
        beta = parameter.item() if name.endswith("beta") else 0.0
        if beta == 0:  # b jumps by 2 eps there
            continue
        with torch.no_grad():
            parameter.fill_(beta + step)
            above = float64_loss(model, ids)
            parameter.fill_(beta - step)
            below = float64_loss(model, ids)
            parameter.fill_(beta)
        difference = (above - below) / (2 * step)
        assert parameter.grad.item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-9), name


def test_base_model_is_the_same_decoder():
    model = model_of("cross_layer", dtype=torch.float64)
    base = CRNetModel._from_config(model.config, dtype=torch.float64).eval()
    base.load_state_dict(model.model.state_dict())
    expected = reference_logits(state_of(model), model.config, tokens())
    assert_close(base(tokens()).last_hidden_state @ model.lm_head.weight.T, expected)


# Shown able to fail


def _betas(state):
    return [tensor for name, tensor in state.items() if name.endswith("beta")]


def without_beta(state, config):
    for beta in _betas(state):
        beta.fill_(1)


def beta_without_sign(state, config):
    for beta in _betas(state):
        beta.abs_()


def sign_of_zero(state, config):
    """Only s(0) differs: b = -1e-6 instead of 1e-6 at the one beta that is 0."""
    for beta in _betas(state):
        beta[beta == 0] = -1e-300


def without_epsilon(state, config):
    config.beta_epsilon = 0.0


def scaled_a(state, config):
    state["model.layers.2.mlp.up_proj.A.weight"].mul_(1 + 1e-6)


def transposed_a(state, config):
    A = state["model.layers.1.self_attn.q_proj.A.weight"]
    A.copy_(A.T.reshape(A.shape))


def layer_skipped(state, config):
    config.num_hidden_layers -= 1


@pytest.mark.parametrize(
    "damage",
    [without_beta, beta_without_sign, sign_of_zero, without_epsilon, scaled_a, transposed_a, layer_skipped],
)
def test_reference_check_can_fail(damage):
    model = model_of("cross_layer", dtype=torch.float64)
    state = state_of(model)
    logits = model(tokens()).logits
    assert error_in_tolerances(logits, reference_logits(state, model.config, tokens())) <= 1
    damage(state, model.config)
    assert_far(logits, reference_logits(state, model.config, tokens()), what=damage.__name__)


@pytest.mark.parametrize(("case", "other"), [("cola", "low_rank"), ("low_rank", "cola")])
def test_cola_and_low_rank_checks_can_fail(case, other):
    model = model_of(case, dtype=torch.float64)
    logits = model(tokens()).logits
    model.config.factorization = other
    assert_far(logits, reference_logits(state_of(model), model.config, tokens()))
