"""torch.compile and torch.export of the whole model."""

import pytest
import torch

from crosslayer.crnet.kernels import OPTIONS
from model_cases import gradients, model_of, tokens
from tolerances import assert_all_close, assert_close

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setitem(OPTIONS, "backend", "aot_eager")
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param("cross_layer", "inductor", marks=pytest.mark.long),
        ("cross_layer", "aot_eager"),
        ("cola", "aot_eager"),
        ("dense", "aot_eager"),
    ],
)
def test_compile_without_graph_breaks(case, backend):
    model = model_of(case, num_hidden_layers=2).train()
    eager = model(tokens(), labels=tokens(), use_cache=False)
    eager.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    output = compiled(tokens(), labels=tokens(), use_cache=False)
    output.loss.backward()
    assert_close(output.logits, eager.logits)
    assert_close(output.loss, eager.loss)
    assert_all_close(gradients(model), expected)


@pytest.mark.parametrize("policy", ["invert", "replay", "reversible"])
def test_compile_with_a_memory_policy(policy):
    """The graph breaks around the layers, whose functions are compiled; the numbers are the same."""
    model = model_of("cross_layer", num_hidden_layers=3).train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_recompute(policy)
    compiled = torch.compile(model, backend="aot_eager")
    calls = torch._dynamo.utils.counters["stats"]
    for _ in range(2):
        model.zero_grad()
        compiled(tokens(), labels=tokens(), use_cache=False).loss.backward()
        assert_all_close(gradients(model), expected)
    assert calls["unique_graphs"] >= 6  # before and after the blocks, and their norm, rotation, gate, sums


def test_compile_with_fused_loss():
    model = model_of("cross_layer", num_hidden_layers=2).train()
    model.fused_loss = True
    expected = model(tokens(), labels=tokens(), use_cache=False).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens(), labels=tokens(), use_cache=False).loss, expected)


@pytest.mark.parametrize("case", ["cross_layer", "cola"])
def test_export(case):
    model = model_of(case)
    exported = torch.export.export(
        model,
        (),
        {"input_ids": tokens(), "use_cache": False},
        dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2, max=64)}, "use_cache": None},
        strict=False,
    )
    for length in (17, 11):
        ids = tokens(length=length)
        assert_close(exported.module()(input_ids=ids, use_cache=False).logits, model(ids, use_cache=False).logits)
