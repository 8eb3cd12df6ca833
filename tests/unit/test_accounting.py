"""Arithmetic against real modules: parameters, operations, kept activations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crosslayer.accounting import (
    activation_elements_per_token,
    count_parameters,
    dense_counterpart,
    estimate_training_memory,
    peak_flops,
    training_flops_per_token,
)
from crosslayer.analysis import measure_saved_activations
from crosslayer.crnet import CRNetForCausalLM
from model_cases import CASES, config_of

WIDE = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 5, "rank": 16}


@pytest.mark.parametrize("name", CASES)
def test_parameters_equal_the_module(name):
    config = config_of(name)
    assert sum(count_parameters(config).values()) == CRNetForCausalLM(config).num_parameters()


def test_groups_of_a_cross_layer_model():
    counts = count_parameters(config_of("cross_layer", **WIDE))
    layers, hidden, mlp, rank = 5, 64, 176, 16
    assert counts["low_rank"] == (layers - 1) * (11 * hidden * rank + 3 * mlp * rank)
    assert counts["full_rank"] == 4 * hidden**2 + 3 * hidden * mlp
    assert counts["beta"] == 7 * (layers - 1)
    assert counts["norms"] == (2 * layers + 1) * hidden
    assert sum(count_parameters(dense_counterpart(config_of("cross_layer", **WIDE))).values()) > sum(counts.values())


@pytest.mark.parametrize("factorization", ["cross_layer", "low_rank", "cola", "dense"])
def test_operations_of_matrix_products_equal_the_counter(factorization):
    config = config_of("cross_layer", **WIDE, factorization=factorization)
    config._attn_implementation = "eager"  # the counter does not know the CPU kernel of fused attention
    model, tokens = CRNetForCausalLM(config), 32
    ids = torch.randint(3, 101, (2, tokens))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    forward = counter.get_total_flops() / ids.numel()
    carried = 0
    if factorization == "cross_layer":
        carried = 2 * 4 * (5 * 64 + 2 * 176)  # the multiply and add of b Y, which the counter does not see
    assert training_flops_per_token(config, tokens) == 3 * (forward + carried)


def measured_and_estimated(**fields):
    """Elements of the layers, per token."""
    config = config_of("cross_layer", **(WIDE | {"num_hidden_layers": 6} | fields))
    model = CRNetForCausalLM(config).train()
    measured = measure_saved_activations(model, torch.randint(3, 101, (2, 32)))
    estimated = [activation_elements_per_token(config, layer_idx) for layer_idx in range(6)]
    return [size / 4 / measured.tokens for size in measured.layer_bytes], estimated


@pytest.mark.parametrize("factorization", ["low_rank", "cola", "dense"])
def test_kept_activations_are_near_the_measured_ones(factorization):
    measured, estimated = measured_and_estimated(factorization=factorization)
    assert estimated[3] == pytest.approx(measured[3], rel=0.08)


@pytest.mark.parametrize("interval", [None, 2])
@pytest.mark.parametrize("policy", ["none", "low_rank", "replay", "reversible"])
def test_activations_kept_by_a_policy_equal_the_measured_ones(policy, interval):
    if policy == "none" and interval:
        pytest.skip("has no interval")
    measured, estimated = measured_and_estimated(recompute=policy, recompute_interval=interval)
    assert sum(estimated) == pytest.approx(sum(measured), rel=0.01)
    assert estimated == pytest.approx(measured, rel=0.02)  # the rotary tables lie in the first layer


def test_memory_adds_up():
    config = config_of("cross_layer", **WIDE)
    memory = estimate_training_memory(config, 64)
    parameters = sum(count_parameters(config).values())
    assert memory["weights"] + memory["gradients"] + memory["optimizer"] == 16 * parameters
    assert estimate_training_memory(config, 128)["activations"] == 2 * memory["activations"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12), ("abacus", None)],
)
def test_peaks(name, peak):
    assert peak_flops(name) == peak
