"""Mixtures of experts: router logits and the balancing loss, kept choices, ranks that the grouped product refuses."""

import pytest
import torch

from crosslayer.crnet.mixture import CrossLayerMixture, LowRankExperts
from family_cases import FAMILY_CASES, tokens
from family_checks import REBUILDING, plain_autograd, worst_error
from model_cases import gradients
from tolerances import assert_all_close, assert_close, assert_far

MIXTURES = {name: case for name, case in FAMILY_CASES.items() if case.has_experts}
QWEN3_MOE = {name: case for name, case in MIXTURES.items() if name.startswith("qwen3")}

with_mixtures = pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES)
with_balancing = pytest.mark.parametrize("case", QWEN3_MOE.values(), ids=QWEN3_MOE)


@with_balancing
@pytest.mark.parametrize("padded", [False, True])
def test_balancing_loss_is_transformers(case, padded):
    """Loss, balancing loss, router logits and gradients of the dense model."""
    theirs = case.theirs()
    ours = case.causal_class._from_config(case.config(factorization="dense")).eval()
    ours.load_state_dict(theirs.state_dict())
    mask = torch.ones_like(tokens())
    mask[0, : 5 * padded] = 0
    outputs = []
    for model in (ours, theirs):
        model.config.router_aux_loss_coef = 3.0  # by default a thousandth, which would hide its gradient
        model.router_aux_loss_coef = 3.0
        output = model(tokens(), attention_mask=mask, labels=tokens(), output_router_logits=True, use_cache=False)
        output.loss.backward()
        outputs.append(output)
    assert_close(outputs[0].aux_loss, outputs[1].aux_loss)
    assert_close(outputs[0].loss, outputs[1].loss)
    assert len(outputs[0].router_logits) == len(outputs[1].router_logits)
    for logits, expected in zip(outputs[0].router_logits, outputs[1].router_logits, strict=True):
        assert_close(logits, expected)
    assert_all_close(gradients(ours), gradients(theirs))


def balanced_step(model, policy, coefficient):
    """Gradients of a loss that also pulls at the router logits."""
    model.train().zero_grad()
    if policy is not None:
        model.set_recompute(policy)
    uses = plain_autograd() if policy is None else torch.enable_grad()
    with uses:
        output = model.base_model(tokens(), output_router_logits=True, use_cache=False)
    balance = sum(logits.double().softmax(-1).square().sum() for logits in output.router_logits)
    (output.last_hidden_state.double().pow(3).mean() + coefficient * balance).backward()
    return gradients(model)


@with_mixtures
@pytest.mark.parametrize("policy", ["none", *REBUILDING])
def test_router_logits_have_a_gradient(case, policy):
    model = case.model(torch.float64)
    expected = balanced_step(model, None, 0.1)
    found = balanced_step(model, policy, 0.1)
    assert worst_error(found, expected) <= 1e-6  # DeepSeek's router works in float32
    name = next(name for name in expected if name.endswith("mlp.gate.weight"))
    assert_far(balanced_step(model, policy, 0.0)[name], expected[name], torch.float32)


@with_balancing
@pytest.mark.parametrize("policy", ["none", *REBUILDING])
def test_balancing_loss_under_a_policy(case, policy):
    model = case.model(router_aux_loss_coef=1.0).train()

    def balanced(policy):
        model.set_recompute(policy or "none")
        model.zero_grad()
        with plain_autograd() if policy is None else torch.enable_grad():
            output = model(tokens(), labels=tokens(), output_router_logits=True, use_cache=False)
        output.loss.backward()
        return output, gradients(model)

    expected, expected_gradients = balanced(None)
    output, found = balanced(policy)
    assert_close(output.aux_loss, expected.aux_loss)
    assert_close(output.loss, expected.loss)
    assert worst_error(found, expected_gradients) <= 1e-4


@with_mixtures
@pytest.mark.parametrize("policy", REBUILDING)
def test_experts_are_chosen_once(case, policy, monkeypatch):
    """A state rebuilt to rounding may choose others: what the forward chose is kept."""
    chosen = []
    choice = CrossLayerMixture.choice
    monkeypatch.setattr(CrossLayerMixture, "choice", lambda mixture, x: chosen.append(mixture) or choice(mixture, x))
    model = case.model(recompute=policy).train()
    model(tokens(), use_cache=False).logits.square().mean().backward()
    mixtures = [module for module in model.modules() if isinstance(module, CrossLayerMixture)]
    assert chosen == mixtures


@with_mixtures
def test_a_mixture_need_not_carry(case):
    model = case.model(torch.float64, carries={"experts": False})
    mixtures = [module for module in model.modules() if isinstance(module, CrossLayerMixture)]
    assert not any(hasattr(mixture, "beta") for mixture in mixtures)
    expected = balanced_step(model, None, 0.1)
    for policy in ("none", *REBUILDING):
        assert worst_error(balanced_step(model, policy, 0.1), expected) <= 1e-6, policy


@with_mixtures
def test_experts_go_through_grouped_products(case):
    """Those of transformers too, where a layer has no factors: no loop over experts in Python."""
    model = case.model()
    assert model.config._experts_implementation == "grouped_mm"
    kinds = [type(m.experts) for m in model.modules() if isinstance(m, CrossLayerMixture)]
    assert kinds[0] is not LowRankExperts
    assert set(kinds[1:]) == {LowRankExperts}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 5, 8])
def test_experts_of_any_rank(rank, dtype):
    """torch's grouped product wants rows in steps of 16 bytes."""
    case = MIXTURES["qwen3_moe_dense_first"]
    model, exact = case.model(dtype, rank=rank, factorization="cola"), case.model(rank=rank, factorization="cola")
    exact.load_state_dict(model.state_dict())
    losses = []
    for m in (model, exact):
        experts = next(module for module in m.modules() if isinstance(module, LowRankExperts))
        x = torch.randn(20, 48, generator=torch.Generator().manual_seed(0)).to(dtype).to(experts.down_B.dtype)
        chosen = torch.arange(40).view(20, 2) % 6
        output = experts(x.requires_grad_(), chosen, torch.full((20, 2), 0.5, dtype=x.dtype))
        output.square().sum().backward()
        losses.append((output, x.grad, experts.gate_up_A.grad))
    for found, expected in zip(*losses, strict=True):
        assert_close(found.float(), expected, dtype)


@pytest.mark.parametrize("factorization", ["low_rank", "cross_layer"])
def test_experts_start_as_large_as_dense_ones(factorization):
    """Norms of A and B give that of a dense matrix; where the mixture carries, down starts as nothing."""
    fields = {"hidden_size": 96, "moe_intermediate_size": 160, "rank": 24, "factorization": factorization}
    fields |= {"initializer_range": 0.03}
    case = MIXTURES["qwen3_moe_dense_first"]
    torch.manual_seed(0)
    model = case.causal_class(case.config(**fields))
    experts = [module for module in model.modules() if isinstance(module, LowRankExperts)][-1]
    expected = (0.03 * (96**0.5 + 160**0.5) / ((96**0.5 + 24**0.5) * (160**0.5 + 24**0.5))) ** 0.5
    for factor in (experts.gate_up_A, experts.gate_up_B):
        assert factor.std().item() == pytest.approx(expected, rel=0.03)
    carries = factorization == "cross_layer"
    assert (experts.down_B == 0).all().item() is carries
    assert experts.down_A.std().item() == pytest.approx(160**-0.5 if carries else expected, rel=0.03)
