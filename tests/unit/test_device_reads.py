"""A number that Python reads waits for an accelerator to do all that it was asked: one in a forward, none elsewhere."""

import pytest

from crosslayer.crnet.policies import POLICIES
from device_reads import reads_of
from family_cases import FAMILY_CASES, tokens
from model_cases import model_of

# Those choose experts by number in transformers' own code, once a layer.
NAMES = [name for name, case in FAMILY_CASES.items() if not case.fields.get("num_experts") and "deepseek" not in name]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_one_read_in_a_forward_and_none_in_a_backward(name, policy):
    model = FAMILY_CASES[name].model(recompute=policy, num_hidden_layers=4).train()
    forward, backward = reads_of(model, tokens())
    assert forward == {"tolist": 1}
    assert not backward


@pytest.mark.parametrize("policy", ["none", "replay"])
def test_nothing_is_read_where_nothing_is_carried(policy):
    model = model_of("cola", recompute=policy).train()
    assert reads_of(model, tokens()) == ({}, {})


def test_a_layer_that_reads_is_seen():
    model = FAMILY_CASES["llama"].model(recompute="invert").train()
    for layer in model.base_model.blocks:
        layer.register_forward_pre_hook(lambda module, args: (args[0] * (1 + 0 * args[0].sum().item()), *args[1:]))
    forward, _ = reads_of(model, tokens())
    assert forward["_local_scalar_dense"] == len(model.base_model.blocks)
