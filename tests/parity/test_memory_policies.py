"""Gradients under every memory policy against plain autograd, which is what the same model runs on in evaluation mode.

Error of a gradient: of the worst parameter tensor in float64, where rounding leaves room; over all parameters of the
layers at once in float32 and bf16, where the gradient of one beta is a sum that nearly cancels. Every bar is shown able
to fail, by the three mistakes of `MISTAKES`.
"""

import pytest
import torch

from crosslayer.crnet import CRNetConfig, CRNetForCausalLM
from crosslayer.crnet.block_gradient import BlockRun, Step
from crosslayer.crnet.tape import Tape
from model_cases import CASES, SHAPE, gradients, model_of, tokens

REBUILDING = ("invert", "replay", "reversible")
POLICIES = [("none", None)] + [(policy, interval) for policy in REBUILDING for interval in (None, 3, 8)]
CROSS_LAYER_CASES = [case for case, fields in CASES.items() if fields.get("factorization") is None]


@torch.no_grad()
def deep_model(layers, b, dtype=torch.float64, seed=0):
    """A narrow, deep net near its initialisation, with every b close to the given one."""
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "num_hidden_layers": layers}
    model = CRNetForCausalLM._from_config(CRNetConfig(**(SHAPE | shape)), attn_implementation="sdpa", dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("beta"):
            parameter.fill_(b + 0.02 * float(noise.clamp(-1, 1)))
        elif "norm" not in name:
            scale = parameter.shape[-1] ** -0.5 if name.endswith("A.weight") else 0.02
            parameter.copy_(noise if "embed" in name else scale * noise)
    return model


def gradients_of(model, policy=None, interval=None, autocast=False, length=40, **call):
    """Gradients of the loss in float64 logits; without a policy, of plain autograd."""
    model.train(policy is not None)
    if policy is not None:
        model.set_recompute(policy, interval)
    model.zero_grad()
    ids = tokens(length=length)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids, **call, use_cache=False).logits.double()
    (-logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])).mean().backward()
    return gradients(model)


def worst_error(actual, expected):
    assert actual.keys() == expected.keys()
    return max(float((actual[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


def global_error(actual, expected):
    layers = [name for name in expected if ".layers." in name]
    error = sum(float((actual[n].double() - expected[n]).square().sum()) for n in layers)
    return (error / sum(float(expected[n].square().sum()) for n in layers)) ** 0.5


def forget_b(monkeypatch):
    total_gradient = Step.total_gradient

    def without_b(step, *given):
        step.above = {name: (G, 1.0) for name, (G, _) in step.above.items()}
        return total_gradient(step, *given)

    monkeypatch.setattr(Step, "total_gradient", without_b)


def skip_a_layer(monkeypatch):
    """The gradient of what layer 3 hands on counts for nothing."""
    backward = Tape.backward

    def skipping(tape, index, *arguments):
        if index == 2:
            tape.gradient_above = None
        return backward(tape, index, *arguments)

    monkeypatch.setattr(Tape, "backward", skipping)


def round_the_state(monkeypatch):
    output_below = Step.output_below

    def rounded(*arguments):
        y = output_below(*arguments)
        return y.copy_(y.bfloat16())

    monkeypatch.setattr(Step, "output_below", rounded)


MISTAKES = [forget_b, skip_a_layer, round_the_state]


# float64: every policy is the true gradient


@pytest.mark.parametrize("b", [1.0, 0.9, -0.7])
def test_float64_worst_tensor(b):
    model = deep_model(8, b)
    expected = gradients_of(model)
    for policy, interval in POLICIES:
        assert worst_error(gradients_of(model, policy, interval), expected) <= 1e-12, (policy, interval)
        assert model.recompute_drift is None or model.model.recompute_drift < 1e-12


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("policy", ["none", *REBUILDING])
def test_float64_bar_can_fail(policy, mistake, monkeypatch):
    model = deep_model(8, 0.9)
    expected = gradients_of(model)
    mistake(monkeypatch)
    assert worst_error(gradients_of(model, policy), expected) > 1e-4


@pytest.mark.parametrize("case", CROSS_LAYER_CASES)
def test_float64_every_case(case):
    """Weights far from their initialisation, beta of both signs; where beta is 0 the inversion keeps some 9 digits."""
    model = model_of(case, dtype=torch.float64, num_hidden_layers=5)
    expected = gradients_of(model)
    for policy, interval in (("none", None), *((policy, n) for policy in REBUILDING for n in (None, 2))):
        bar = 1e-12 if policy in ("none", "replay") else 1e-4
        assert worst_error(gradients_of(model, policy, interval), expected) <= bar, (policy, interval)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("beta") and abs(parameter.item()) < 0.5:
                parameter.fill_(0.5)
    expected = gradients_of(model)
    for policy, interval in POLICIES[:-2]:
        if interval in (None, 3):
            assert worst_error(gradients_of(model, policy, interval), expected) <= 1e-10, (policy, interval)


def test_forward_is_the_same():
    """To the last bit in float32, under every policy and in evaluation."""
    model = deep_model(8, 0.9, torch.float32)
    ids = tokens()
    evaluated = model.eval()(ids, use_cache=False).logits
    model.train()
    trained = []
    for policy, interval in POLICIES:
        model.set_recompute(policy, interval)
        trained.append(model(ids, use_cache=False).logits)
    assert all(torch.equal(logits, trained[0]) for logits in trained)
    assert torch.equal(evaluated, trained[0])


# replay is `none`, bit for bit


@pytest.mark.parametrize("b", [1.0, 0.5])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "mixed"])
def test_replay_equals_none(precision, b):
    autocast = precision == "mixed"
    model = deep_model(24, b, torch.float32 if autocast else getattr(torch, precision))
    expected = gradients_of(model, "none", autocast=autocast)
    for interval in (None, 4, 8):
        actual = gradients_of(model, "replay", interval, autocast)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_replay_equals_none_can_fail(monkeypatch):
    """The last bit of one carried output is noticed; so is inversion, which is not bit for bit."""
    model = deep_model(24, 1.0, torch.float32)
    expected = gradients_of(model, "none")
    inverted = gradients_of(model, "invert")
    assert not all(torch.equal(inverted[name], expected[name]) for name in expected)

    replay = BlockRun.replay

    def off_by_one_bit(*arguments):
        state = replay(*arguments)
        state.Y["v"] = torch.nextafter(state.Y["v"], torch.tensor(torch.inf))
        return state

    monkeypatch.setattr(BlockRun, "replay", off_by_one_bit)
    actual = gradients_of(model, "replay")
    assert not all(torch.equal(actual[name], expected[name]) for name in expected)


# float32 and bf16: deep nets


@pytest.mark.parametrize("b", [1.0, 0.9])
def test_float32_deep(b, monkeypatch):
    exact = deep_model(48, b)
    model = deep_model(48, b, torch.float32)
    exact.load_state_dict(model.state_dict())
    expected = gradients_of(exact)
    for policy in REBUILDING:
        assert global_error(gradients_of(model, policy, 8), expected) <= 5e-6, policy
    round_the_state(monkeypatch)
    for policy in REBUILDING:
        assert global_error(gradients_of(model, policy, 8), expected) > 5e-5, policy


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "mixed"])
@pytest.mark.parametrize(
    ("policy", "interval", "b"),
    [("invert", None, 1.0), ("invert", None, 0.9), *(("reversible", 8, b) for b in (1.0, 0.9, 0.5))],
)
def test_bf16_deep(policy, interval, b, autocast, monkeypatch):
    """bf16 products, float32 state: no further from the truth than plain autograd in the same precision."""
    model = deep_model(48, b, torch.float32 if autocast else torch.bfloat16)
    exact = deep_model(48, b)
    exact.load_state_dict(model.state_dict())
    expected = gradients_of(exact)
    bar = 1.2 * global_error(gradients_of(model, autocast=autocast), expected)
    assert global_error(gradients_of(model, policy, interval, autocast), expected) <= bar
    round_the_state(monkeypatch)
    assert global_error(gradients_of(model, policy, 48, autocast), expected) > bar  # no state kept in between
