"""Who gets which learning rate and weight decay."""

import pytest
import torch

from crosslayer.crnet import CRNetForCausalLM, CRNetForSequenceClassification
from crosslayer.train import ParameterGroups, optimizer_groups
from crosslayer.train.parameter_groups import divide_groups, group_names
from model_cases import CASES, config_of

FACTORS = ParameterGroups(embedding_lr_factor=2.0, full_rank_lr_factor=0.1, low_rank_lr_factor=3.0, beta_lr_factor=0.5)


def groups_of(model, **kwargs):
    groups = optimizer_groups(model, FACTORS, learning_rate=1e-2, weight_decay=0.1, **kwargs)
    return {group["name"]: group for group in groups}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_in_one_group(name):
    model = CRNetForCausalLM(config_of(name))
    members = [parameter for group in groups_of(model).values() for parameter in group["params"]]
    assert len(members) == len(set(map(id, members))) == len(list(model.parameters()))


def test_groups_of_a_cross_layer_model():
    model = CRNetForCausalLM(config_of("bias"))
    names = group_names(model)
    assert names["model.embed_tokens.weight"] == names["lm_head.weight"] == "embeddings"
    assert names["model.layers.0.self_attn.q_proj.weight"] == "full_rank"
    assert names["model.layers.1.self_attn.q_proj.A.weight"] == "low_rank"
    assert names["model.layers.1.mlp.down_proj.B.weight"] == "low_rank"
    assert names["model.layers.1.mlp.down_proj.beta"] == "beta"
    for other in (
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.B.bias",
    ):
        assert names[other] == "other"


def test_rates_and_decay():
    groups = groups_of(CRNetForCausalLM(config_of("cross_layer")))
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == pytest.approx(
        {"other": 1e-2, "embeddings": 2e-2, "full_rank": 1e-3, "low_rank": 3e-2, "beta": 5e-3}
    )
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {"other": 0.0, "embeddings": 0.0, "full_rank": 0.1, "low_rank": 0.1, "beta": 0.0}
    assert next(iter(groups)) == "other"  # its rate is the one that gets logged


def test_tied_head_is_one_embedding():
    model = CRNetForCausalLM(config_of("tied"))
    assert len(groups_of(model)["embeddings"]["params"]) == 1


def test_frozen_parameters_are_left_out():
    model = CRNetForCausalLM(config_of("cross_layer"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("beta"))
    groups = groups_of(model)
    assert list(groups) == ["beta"]
    assert len(groups["beta"]["params"]) == 14


def test_classifier_is_a_full_rank_matrix():
    model = CRNetForSequenceClassification(config_of("cross_layer"))
    assert group_names(model)["score.weight"] == "full_rank"


def test_weight_decay_leaves_beta_alone():
    model = CRNetForCausalLM(config_of("cross_layer"))
    optimizer = torch.optim.AdamW(optimizer_groups(model, FACTORS, 1e-2, 0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all(".A." in name or "layers.0." in name for name in moved)  # B is zero at the start
    assert not any(name.endswith(("beta", "norm.weight", "embed_tokens.weight", "lm_head.weight")) for name in moved)


def test_groups_of_an_optimizer_with_its_own_are_divided():
    model = CRNetForCausalLM(config_of("cross_layer"))
    projected = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    theirs = [
        {"params": [p for p in model.parameters() if all(p is not q for q in projected)]},
        {"params": projected, "rank": 4},
    ]
    divided = divide_groups(theirs, optimizer_groups(model, FACTORS, 1e-2, 0.5))
    assert sum(len(group["params"]) for group in divided) == len(list(model.parameters()))
    assert len({id(p) for group in divided for p in group["params"]}) == len(list(model.parameters()))
    names = group_names(model)
    of = {id(p): names[name] for name, p in model.named_parameters()}
    for group in divided:
        assert {of[id(p)] for p in group["params"]} == {group["name"]}
        assert ("rank" in group) == any(p is q for p in group["params"] for q in projected)
    rates = {group["name"]: group["lr"] for group in divided}
    ours = {group["name"]: group["lr"] for group in optimizer_groups(model, FACTORS, 1e-2, 0.5)}
    assert rates == ours
