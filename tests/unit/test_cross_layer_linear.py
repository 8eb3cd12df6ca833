"""CrossLayerLinear and LowRankLinear alone: formula, b(beta), state-dict keys, and the fused product."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from crosslayer.crnet import CrossLayerLinear, LowRankLinear
from model_cases import CASES, model_of
from tolerances import assert_close, assert_far

EPSILON = 1e-6


def linear_of(bias=False, activation=None, beta=-0.7, dtype=torch.float64):
    linear = CrossLayerLinear(48, 130, 7, bias, activation, beta_init=beta).to(dtype)
    for parameter in (linear.A.weight, linear.B.weight, *([linear.B.bias] if bias else [])):
        nn.init.normal_(parameter)
    return linear


def inputs_of(dtype=torch.float64):
    x = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True)
    previous = torch.randn(2, 5, 130, dtype=dtype, requires_grad=True)
    return x, previous


def formula(linear, x, previous):
    """s(beta) (|beta| + eps) Y_{l-1} + (X A) B, with A and B as the paper writes them."""
    A, B = linear.A.weight.T, linear.B.weight.T
    beta = linear.beta.item()
    increment = x @ A
    if linear.activation == "silu":
        increment = increment * torch.sigmoid(increment)
    increment = increment @ B
    if linear.B.bias is not None:
        increment = increment + linear.B.bias
    return (-1 if beta < 0 else 1) * (abs(beta) + EPSILON) * previous + increment


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0, -0.7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_formula(beta, bias, activation):
    linear = linear_of(bias, activation, beta)
    x, previous = inputs_of()
    assert_close(linear(x, previous), formula(linear, x, previous))


def test_formula_check_can_fail():
    linear = linear_of(beta=-0.7)
    x, previous = inputs_of()
    expected = formula(linear, x, previous)
    assert_far(linear(x, -previous), expected)
    assert_far(linear(x, previous * (1 + 1e-7)), expected)
    with torch.no_grad():
        linear.A.weight.mul_(1 + 1e-7)
    assert_far(linear(x, previous), expected)


@pytest.mark.parametrize(
    ("beta", "b"),
    [
        (1.0, 1 + EPSILON),
        (0.25, 0.25 + EPSILON),
        (0.0, EPSILON),
        (-0.0, EPSILON),
        (-1e-9, -1e-9 - EPSILON),
        (-2.0, -2 - EPSILON),
    ],
)
def test_b(beta, b):
    """s(0) = +1, for minus zero too; the derivative is 1 everywhere, so that no beta is stuck at 0."""
    linear = linear_of(beta=beta)
    assert linear.b().shape == (1,)
    assert linear.b().item() == pytest.approx(b, rel=1e-12)
    (derivative,) = torch.autograd.grad(linear.b(), linear.beta)
    assert derivative.item() == 1.0


def test_b_is_never_zero():
    linear = linear_of(dtype=torch.float32)
    for beta in (0.0, -0.0, 1e-45, -1e-45, EPSILON, -EPSILON):
        nn.init.constant_(linear.beta, beta)
        assert linear.b().abs().item() >= EPSILON * 0.999


@pytest.mark.parametrize("activation", [None, "silu"])
def test_low_rank_formula(activation):
    linear = LowRankLinear(48, 130, 7, bias=True, activation=activation).double()
    x, _ = inputs_of()
    increment = x @ linear.A.weight.T
    if activation:
        increment = nn.functional.silu(increment)
    assert_close(linear(x), increment @ linear.B.weight.T + linear.B.bias)


def test_state_dict_keys():
    assert {name: tuple(p.shape) for name, p in linear_of(bias=True).state_dict().items()} == {
        "A.weight": (7, 48),
        "B.weight": (130, 7),
        "B.bias": (130,),
        "beta": (1,),
    }
    assert list(LowRankLinear(48, 130, 7).state_dict()) == ["A.weight", "B.weight"]


POSITION_NAMES = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


def test_state_dict_keys_of_the_model():
    """A contract with checkpoints and tools: names and shapes of every tensor."""
    state = model_of("cross_layer").state_dict()
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        expected |= {prefix + "input_layernorm.weight", prefix + "post_attention_layernorm.weight"}
        for name in POSITION_NAMES:
            kinds = ("weight",) if layer == 0 else ("A.weight", "B.weight", "beta")
            expected |= {f"{prefix}{name}.{kind}" for kind in kinds}
    assert state.keys() == expected
    q_proj = "model.layers.1.self_attn.q_proj"
    assert state[f"{q_proj}.A.weight"].shape == (7, 48)
    assert state[f"{q_proj}.B.weight"].shape == (48, 7)
    assert state[f"{q_proj}.beta"].shape == (1,)
    assert state["model.layers.0.self_attn.q_proj.weight"].shape == (48, 48)


def test_kinds_of_linear():
    """Layer 0 of CR-Net is a plain nn.Linear; the bias belongs to B; A and B are nn.Linear everywhere."""
    layers = model_of("bias").model.layers
    assert type(layers[0].self_attn.q_proj) is nn.Linear
    q_proj = layers[1].self_attn.q_proj
    assert type(q_proj) is CrossLayerLinear
    assert (type(q_proj.A), type(q_proj.B)) == (nn.Linear, nn.Linear)
    assert q_proj.A.bias is None
    assert q_proj.B.bias is not None
    assert type(model_of("first_layer_rank").model.layers[0].self_attn.q_proj) is LowRankLinear
    for case in ("low_rank", "cola"):
        assert type(model_of(case).model.layers[0].mlp.up_proj) is LowRankLinear
    assert model_of("cola").model.layers[0].mlp.up_proj.activation == "silu"
    assert model_of("low_rank").model.layers[0].mlp.up_proj.activation is None


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_the_configured_ones(case):
    model = model_of(case)
    for layer_idx, layer in enumerate(model.model.layers):
        for name in POSITION_NAMES:
            position = name.split(".")[1].removesuffix("_proj")
            linear = layer.get_submodule(name)
            rank = linear.A.out_features if isinstance(linear, LowRankLinear) else None
            assert rank == model.config.linear_rank(layer_idx, position)


def test_frozen_beta():
    model = model_of("cross_layer", beta_trainable=False, beta_init=0.5)
    betas = [parameter for name, parameter in model.named_parameters() if name.endswith("beta")]
    assert len(betas) == 14
    assert not any(beta.requires_grad for beta in betas)


# The product with a hand-written backward


def watched(linear):
    """The same linear on autograd's own operations: a hook on B makes it step aside."""
    linear.B.register_forward_hook(lambda module, inputs, output: None)
    return linear


def run(linear, x, previous):
    x, previous = x.detach().requires_grad_(), previous.detach().requires_grad_()
    output = linear(x, previous)
    parameters = [p for p in linear.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((output * output.cos()).sum(), [x, previous, *parameters])
    return [output, *gradients]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("beta", [0.8, -0.7, 0.0])
def test_fused_product_equals_autograd(dtype, activation, beta):
    linear = linear_of(activation=activation, beta=beta, dtype=dtype)
    x, previous = inputs_of(dtype)
    fused = run(linear, x, previous)
    for one, other in zip(fused, run(watched(linear), x, previous), strict=True):
        assert one.dtype == other.dtype == dtype
        assert_close(one, other)


def test_fused_product_takes_strided_and_flat_inputs():
    linear = linear_of()
    x, previous = torch.randn(48, 6).double().T, torch.randn(130, 6).double().T
    assert_close(linear(x, previous), formula(linear, x, previous))
    assert_close(linear(x[0], previous[0]), formula(linear, x[0], previous[0]))


def test_gradients_of_first_and_second_order():
    linear = CrossLayerLinear(3, 5, 2, beta_init=-0.6).double()
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    previous = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    names = ["A.weight", "B.weight", "beta"]
    parameters = [linear.get_parameter(name) for name in names]

    def call(x, previous, *parameters):
        return torch.func.functional_call(linear, dict(zip(names, parameters, strict=True)), (x, previous))

    assert torch.autograd.gradcheck(call, (x, previous, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, previous, *parameters))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 48)])
@torch.no_grad()
def test_one_row_in_decoding(activation, shape):
    """A single row takes another way: the same numbers, and a watched B is still asked."""
    x = torch.randn(shape, dtype=torch.float64)
    for beta in (1.0, 0.0, -0.7):
        linear = linear_of(activation=activation, beta=beta)
        previous = torch.randn(*shape[:-1], 130, dtype=torch.float64)
        assert_close(linear(x, previous), formula(linear, x, previous))
        assert linear(x, previous).shape == previous.shape
    low_rank = LowRankLinear(48, 130, 7, activation=activation).double()
    assert_close(low_rank(x), low_rank.B(low_rank.low_rank(x)))
    calls = []
    linear.B.register_forward_hook(lambda *_: calls.append(1))
    linear(x, previous)
    assert calls


def test_replaced_or_watched_factors_are_asked():
    """A hook on B, a subclass in its place, a parametrization of A: none is bypassed."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, previous = inputs_of()
    linear = linear_of(beta=1.0)
    plain = linear(x, previous) - previous * (1 + EPSILON)

    doubled = Doubled(7, 130, bias=False).double()
    doubled.weight = linear.B.weight
    kept, linear.B = linear.B, doubled
    assert_close(linear(x, previous), 2 * plain + previous * (1 + EPSILON))
    linear.B = kept

    seen = []
    hooks = [
        linear.B.register_forward_hook(lambda *_: seen.append("forward")),
        linear.B.register_forward_pre_hook(lambda *_: seen.append("before")),
    ]
    linear(x, previous)
    assert sorted(seen) == ["before", "forward"]
    for hook in hooks:
        hook.remove()

    linear.B.register_full_backward_hook(lambda *_: seen.append("backward"))
    linear.B.register_full_backward_pre_hook(lambda *_: seen.append("before backward"))
    linear(x, previous).sum().backward()
    assert {"backward", "before backward"} <= set(seen)


def test_runs_on_fake_tensors():
    """Memory estimates run the model without data, where b has no value to read."""
    with FakeTensorMode():
        linear = CrossLayerLinear(48, 130, 7)
        output = linear(torch.randn(2, 5, 48), torch.randn(2, 5, 130))
        output.sum().backward()
    assert output.shape == (2, 5, 130)


def test_backward_pre_hook_alone_is_called():
    linear = linear_of()
    seen = []
    linear.B.register_full_backward_pre_hook(lambda *_: seen.append(1))
    linear(*inputs_of()).sum().backward()
    assert seen == [1]
