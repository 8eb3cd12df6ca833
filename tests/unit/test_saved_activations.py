"""What every memory policy keeps, counted: the bars of the design, and that the count sees what it should."""

from dataclasses import replace

import pytest
import torch

from crosslayer.analysis import measure_saved_activations
from crosslayer.crnet import CRNetConfig, CRNetForCausalLM, CRNetModel, policies
from crosslayer.crnet.local_functions import AttentionGraph
from model_cases import SHAPE, tokens

D = 128  # heads of 64, an MLP of 2.69 D and rank D / 4, as in models of the usual sizes
SIZES = {"hidden_size": D, "intermediate_size": 344, "num_attention_heads": 2, "max_position_embeddings": 64}


def measure(layers, factorization="cross_layer", policy=None, interval=None, dtype=torch.float32):
    config = CRNetConfig(**(SHAPE | SIZES | {"num_hidden_layers": layers, "factorization": factorization}))
    model = CRNetForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype).train()
    if policy is not None:
        model.set_recompute(policy, interval)
    return measure_saved_activations(model, tokens(length=64))


def growth(dtype=torch.float32, interval=None, **arguments):
    """Saved per token and layer, in float32 numbers of the hidden size, between 4 and 16 layers."""
    shallow, deep = (
        measure(layers, dtype=dtype, interval=interval(layers) if interval else None, **arguments) for layers in (4, 16)
    )
    return shallow.growth_per_layer(deep) / (4 * D)


def plainly(monkeypatch):
    monkeypatch.setattr(CRNetModel, "_uses_tape", lambda *_: False)


@pytest.mark.parametrize(
    ("policy", "interval", "expected", "bar"),
    [
        ("none", None, 14.14, 14.5),
        ("invert", None, 1.75, 1.8),
        ("replay", lambda layers: 4, 1.75 + 3 * 11.375 / 12, 4.7),
        ("reversible", lambda layers: layers, 0.0, 0.0),
        ("reversible", lambda layers: min(layers, 8), 11.375 / 12, 1.5),
    ],
)
def test_bars(policy, interval, expected, bar):
    found = growth(policy=policy, interval=interval)
    assert found == pytest.approx(expected, abs=0.01)
    assert found <= bar


def test_reversible_stays_below_its_bar_at_any_depth():
    """Where the 16 layers above have one kept state: (32 - 8) / 8 more of them."""
    shallow, deep = (measure(layers, policy="reversible", interval=8) for layers in (9, 33))
    assert shallow.growth_per_layer(deep) / (4 * D) == pytest.approx(11.375 / 8)


def test_half_precision_halves_the_low_rank_outputs():
    assert growth(policy="invert", dtype=torch.bfloat16) == pytest.approx(1.75 / 2, abs=0.01)
    assert growth(policy="none", dtype=torch.bfloat16) <= 14.5 - 1.75 / 2


@pytest.mark.parametrize(("factorization", "expected"), [("dense", 20.8), ("cola", 24.3), ("cross_layer", 26.5)])
def test_plain_autograd(factorization, expected, monkeypatch):
    """The reference, and what the bars are there for."""
    plainly(monkeypatch)
    assert growth(factorization=factorization) == pytest.approx(expected, abs=0.1)


def test_whole_layer_checkpointing_keeps_the_hidden_states():
    config = CRNetConfig(**(SHAPE | SIZES | {"factorization": "dense"}))
    model = CRNetForCausalLM(config).train()
    model.activation_checkpointing_enable()
    found = measure_saved_activations(model, tokens(length=64))
    assert [size / found.tokens / (4 * D) for size in found.layer_bytes] == [1.0] * 3


def test_bars_can_fail(monkeypatch):
    """q and k held instead of rotated again; low-rank outputs held without need."""
    init = AttentionGraph.__init__

    def hoarding(run, attention, inputs, arguments, parameters, call, waits):
        init(run, attention, inputs, arguments, parameters, call, waits)
        if waits:
            run.held.extend(tensor.detach().clone() for tensor in attention.prepare(*inputs, **arguments)[:2])

    with monkeypatch.context() as patch:
        patch.setattr(AttentionGraph, "__init__", hoarding)
        assert growth(policy="none") > 14.5
    for name, policy in policies.POLICIES.items():
        hoarder = replace(policy, keeps_low_rank=True, keeps_attention=True)
        monkeypatch.setitem(policies.POLICIES, name, hoarder)
    assert growth(policy="invert") > 1.8
    assert growth(policy="reversible", interval=lambda layers: layers) > 1.0


def test_nothing_is_saved_in_evaluation():
    config = CRNetConfig(**(SHAPE | SIZES))
    model = CRNetForCausalLM(config).eval()
    with torch.no_grad():
        assert measure_saved_activations(model, tokens()).total_bytes == 0
