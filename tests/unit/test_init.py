"""Initialisation: sampled statistics against the table in `_init_weights`, and nothing initialised twice."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from crosslayer.crnet import (
    CRNetConfig,
    CRNetForCausalLM,
    CRNetForSequenceClassification,
    CrossLayerLinear,
    LowRankLinear,
)
from model_cases import CASES, FACTORIZATION_CASES, SHAPE, config_of, model_of, tokens
from tolerances import assert_close, assert_far

LARGER = SHAPE | {"hidden_size": 192, "intermediate_size": 400, "vocab_size": 401, "initializer_range": 0.03}


def fresh(seed=0, **fields):
    torch.manual_seed(seed)
    return CRNetForCausalLM(CRNetConfig(**(LARGER | fields)))


def check_normal(weight, std, what):
    """Mean 0 and the expected standard deviation within five standard errors, and the tails of a normal."""
    n = weight.numel()
    assert abs(weight.mean().item()) < 5 * std / n**0.5, what
    assert weight.std().item() == pytest.approx(std, rel=5 * (2 * n) ** -0.5), what
    assert (weight.abs() > 2 * std).float().mean().item() == pytest.approx(0.0455, abs=5 * (0.0455 / n) ** 0.5), what


def check_norms_and_biases(model):
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name


@pytest.mark.parametrize("factorization", FACTORIZATION_CASES)
def test_sampled_statistics(factorization):
    model = fresh(factorization=factorization, attention_bias=True, mlp_bias=True, beta_init=0.75)
    check_norms_and_biases(model)
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, CrossLayerLinear):
            seen.add("cross_layer")
            check_normal(module.A.weight, module.A.in_features**-0.5, name)
            assert (module.B.weight == 0).all(), name
            assert (module.beta == 0.75).all(), name
        elif isinstance(module, LowRankLinear):
            seen.add("low_rank")
            check_factors(module, 0.03, name)
        elif isinstance(module, nn.Linear | nn.Embedding) and not name.endswith((".A", ".B")):
            seen.add("dense")
            weight = module.weight[1:] if isinstance(module, nn.Embedding) else module.weight  # row 0 pads
            check_normal(weight, 0.03, name)
    expected = {"cross_layer": {"cross_layer", "dense"}, "dense": {"dense"}}
    assert seen == expected.get(factorization, {"low_rank", "dense"})


def check_factors(linear, std, what):
    """A and B of one standard deviation, their largest singular values those of a dense matrix of `std`."""
    A, B = linear.A.weight, linear.B.weight
    check_normal(A, B.std().item(), what)
    check_normal(B, B.std().item(), what)
    dense = torch.empty(linear.out_features, linear.in_features).normal_(std=std)
    product = torch.linalg.matrix_norm(A, 2) * torch.linalg.matrix_norm(B, 2)
    assert product.item() == pytest.approx(torch.linalg.matrix_norm(dense, 2).item(), rel=0.08), what


def test_low_rank_first_layer_of_cross_layer():
    """Without a carried output there is nothing to copy: a zero B would be a dead layer."""
    first = fresh(first_layer_rank=48).model.layers[0].mlp.down_proj
    assert (first.B.weight.std() > 0).item()
    check_factors(first, 0.03, "first layer")


@pytest.mark.parametrize("factorization", ["low_rank", "cola"])
def test_another_start_of_low_rank(factorization):
    for given in (0.01, 0.09):
        model = fresh(factorization=factorization, low_rank_initializer_range=given)
        check_factors(model.model.layers[1].mlp.up_proj, given, given)
        check_normal(model.lm_head.weight, 0.03, "head")
        with pytest.raises(AssertionError):
            check_factors(model.model.layers[1].mlp.up_proj, 1.2 * given, given)
    up = fresh(factorization=factorization, low_rank_initializer_range="cola", rank=48).model.layers[1].mlp.up_proj
    for factor in (up.A, up.B):
        check_normal(factor.weight, (192 + 400) ** -0.25 * 48**-0.25, "CoLA's")
    assert (up.B.weight @ up.A.weight).std().item() == pytest.approx((192 + 400) ** -0.5, rel=0.05)


def test_layers_start_as_copies():
    """B = 0 and beta = 1: after k steps each position's output is (1 + eps)^k times the first layer's."""
    torch.manual_seed(0)
    model = CRNetForCausalLM(config_of("cross_layer", num_hidden_layers=4)).double().eval()
    outputs = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda m, i, output, name=name: outputs.update({name: output}))
    model(tokens())
    assert len(outputs) == 28
    for name, output in outputs.items():
        layer = int(name.split(".")[2])
        first = outputs[name.replace(f"layers.{layer}.", "layers.0.")]
        assert_close(output, first * (1 + 1e-6) ** layer, what=name)
        if layer:
            assert_far(output, first, what=name)


@pytest.mark.parametrize("case", FACTORIZATION_CASES)
def test_determined_by_the_seed(case):
    def state(seed):
        torch.manual_seed(seed)
        return CRNetForCausalLM(config_of(case)).state_dict()

    one, same, other = state(1), state(1), state(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("case", CASES)
def test_reloading_never_initialises_again(case, tmp_path):
    """Bit for bit what was saved, with every parameter away from its starting value."""
    model = model_of(case)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    for auto in (CRNetForCausalLM, AutoModelForCausalLM):
        again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(again.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize("case", FACTORIZATION_CASES)
def test_reloading_through_remote_code(case, tmp_path):
    """The same with the classes that the folder itself defines."""
    model = model_of(case)
    model.save_pretrained(tmp_path)
    carried = get_class_from_dynamic_module("modeling_crnet.CRNetForCausalLM", str(tmp_path))
    assert carried is not CRNetForCausalLM
    again, info = carried.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    state = model.state_dict()
    assert all(torch.equal(again.state_dict()[name], state[name]) for name in state)


def test_missing_parts_are_initialised_as_in_the_table(tmp_path):
    """A head that the checkpoint lacks is made new; the decoder under it stays what was saved."""
    model = model_of("cross_layer")
    model.save_pretrained(tmp_path)
    classifier, info = CRNetForSequenceClassification.from_pretrained(tmp_path, num_labels=40, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    check_normal(classifier.score.weight, SHAPE["initializer_range"], "score")
    decoder = model.model.state_dict()
    assert all(torch.equal(classifier.model.state_dict()[name], decoder[name]) for name in decoder)
