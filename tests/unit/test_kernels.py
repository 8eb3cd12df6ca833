"""Where a model with a memory policy is compiled, its blocks' functions are compiled one by one: the same gradients."""

from dataclasses import replace

import pytest
import torch

from crosslayer.crnet import kernels, local_functions
from crosslayer.crnet.functions import Attention, CarriedRMSNorm, GatedMLP
from crosslayer.crnet.model import CrossLayerModel
from family_cases import FAMILY_CASES
from model_cases import gradients, model_of, tokens
from tolerances import assert_all_close, error_in_tolerances

pytestmark = pytest.mark.slow
COMPILED = {CarriedRMSNorm.forward, GatedMLP.forward, Attention.prepare, kernels.gradient_sums}


@pytest.fixture
def functions(monkeypatch):
    """Those that were compiled, by `aot_eager`: graphs forwards and backwards as inductor gets them, eager kernels."""
    found = []

    def compiled(function):
        found.append(function)
        return keep(function)

    keep = kernels.compiled
    for name in ("local_functions", "block_gradient"):
        monkeypatch.setattr(f"crosslayer.crnet.{name}.compiled", compiled)
    monkeypatch.setitem(kernels.OPTIONS, "backend", "aot_eager")
    keep.cache_clear()
    torch._dynamo.reset()
    yield found
    keep.cache_clear()
    torch._dynamo.reset()


def compile_around_blocks(monkeypatch):
    """As in a compiled model, whose own graph has tests elsewhere."""
    on_tape = CrossLayerModel._forward_on_tape

    def forward(self, hidden_states, layers, arguments, compiles):
        assert not compiles
        return on_tape(self, hidden_states, layers, arguments, True)

    monkeypatch.setattr(CrossLayerModel, "_forward_on_tape", forward)


def gradients_of(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return gradients(model)


@pytest.mark.parametrize(
    ("case", "policy"),
    [("gqa", "invert"), ("gqa", "replay"), ("gqa", "reversible"), ("silu_increment", "reversible"), ("bias", "replay")],
)
def test_the_same_gradients(case, policy, functions, monkeypatch):
    model = model_of(case, num_hidden_layers=3, recompute=policy).train()
    batches = tokens(), tokens(rows=1, length=9)
    expected = [gradients_of(model, ids) for ids in batches]
    assert not functions
    compile_around_blocks(monkeypatch)
    for ids, grads in zip(batches, expected, strict=True):
        assert_all_close(gradients_of(model, ids), grads)
    assert set(functions) == COMPILED


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])
def test_other_families(family, functions, monkeypatch):
    """Norms of heads, norms of 1 + w between Y and h, and layer norms, which run under graphs of their own."""
    model = FAMILY_CASES[family].model(recompute="invert").train()
    expected = gradients_of(model, tokens())
    compile_around_blocks(monkeypatch)
    assert_all_close(gradients_of(model, tokens()), expected)
    assert kernels.gradient_sums in functions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, functions, monkeypatch):
    """bfloat16 is no further from float64 than eager kernels are, or little."""
    model = model_of("gqa", num_hidden_layers=3, recompute="invert", dtype=dtype).train()
    eager = gradients_of(model, tokens())
    compile_around_blocks(monkeypatch)
    found = gradients_of(model, tokens())
    if dtype == torch.float64:
        assert_all_close(found, eager)
        return
    exact = model_of("gqa", num_hidden_layers=3, dtype=torch.float64).train()
    exact.load_state_dict(model.state_dict())
    expected = gradients_of(exact, tokens())
    ours, theirs = (
        sorted(error_in_tolerances(grads[name], expected[name], torch.bfloat16) for name in expected)
        for grads in (found, eager)
    )
    assert sum(ours) < 1.2 * sum(theirs)


def test_who_is_watched_is_asked(functions, monkeypatch):
    model = model_of("gqa", num_hidden_layers=3, recompute="invert").train()
    compile_around_blocks(monkeypatch)
    seen = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda module, args, output: seen.append(1) or 2 * output)
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: seen.append(1))
    expected = gradients_of(model.eval(), tokens())  # plain autograd
    seen.clear()
    assert_all_close(gradients_of(model.train(), tokens()), expected)
    assert len(seen) == 2 * 2 * 3
    assert CarriedRMSNorm.forward not in functions


def test_sums_written_wrongly_are_seen(functions, monkeypatch):
    model = model_of("gqa", num_hidden_layers=3, recompute="invert").train()
    expected = gradients_of(model, tokens())
    compile_around_blocks(monkeypatch)

    def wrong(local, above, factor, previous):
        G = above.copy_(local + above)
        return G, (G * previous).sum().view(1)

    monkeypatch.setattr("crosslayer.crnet.block_gradient.gradient_sums", wrong)
    found = gradients_of(model, tokens())
    assert max(error_in_tolerances(found[name], expected[name]) for name in expected) > 100


@pytest.mark.long
def test_by_inductor(functions, monkeypatch):
    kernels.OPTIONS["backend"] = "inductor"
    model = model_of("gqa", num_hidden_layers=3, recompute="invert").train()
    expected = gradients_of(model, tokens())
    compile_around_blocks(monkeypatch)
    assert_all_close(gradients_of(model, tokens()), expected)


def wide_addmm(calls):
    """What CUDA's `addmm` with an `out_dtype` computes."""
    addmm = torch.addmm

    def stand_in(total, left, right, out_dtype=None, **given):
        if out_dtype is None:
            return addmm(total, left, right, **given)
        assert left.dtype == right.dtype == torch.bfloat16
        assert total.dtype == out_dtype == given["out"].dtype == torch.float32
        calls.append(given)
        return addmm(total, left.float(), right.float(), **given)

    return stand_in


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("policy", ["none", "invert", "replay", "reversible"])
def test_narrow_products_added_to_wide_sums(policy, bias, monkeypatch):
    """Where `addmm` can do it, it does: gradients come closer to float64, since T B is not rounded."""
    case = "bias" if bias else "gqa"
    model = model_of(case, num_hidden_layers=3, recompute=policy, dtype=torch.bfloat16).train()
    rounded = gradients_of(model, tokens())
    calls = []
    monkeypatch.setattr("crosslayer.crnet.product.adds_wide", lambda device_type, narrow: True)
    monkeypatch.setattr(torch, "addmm", wide_addmm(calls))
    found = gradients_of(model, tokens())
    assert len(calls) >= 2 * 7
    exact = model_of(case, num_hidden_layers=3, dtype=torch.float64).train()
    exact.load_state_dict(model.state_dict())
    expected = gradients_of(exact, tokens())
    ours, before = (
        sum(error_in_tolerances(grads[name], expected[name], torch.bfloat16) for name in expected)
        for grads in (found, rounded)
    )
    assert ours < 1.1 * before


def test_where_it_can():
    """The signature holds for torch's own description of the kernel; on a CPU it is not there."""
    narrow, wide = (torch.empty(16, 16, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    assert torch.addmm(wide, narrow, narrow.t(), torch.float32, beta=0.5, alpha=-1.0, out=wide) is wide
    assert not kernels.adds_wide("cpu", torch.bfloat16)
    assert not kernels.adds_wide("meta", torch.bfloat16)  # no answer to look at


def test_norms_of_an_accelerator(monkeypatch):
    """There a norm is run by torch's own kernel, under a graph of its own: the same gradients."""
    model = model_of("gqa", num_hidden_layers=3, recompute="invert").train()
    expected = gradients_of(model, tokens())
    kept = local_functions.CLOSED_FORMS.copy()
    made = []
    for kind, form in kept.items():
        monkeypatch.setitem(
            local_functions.CLOSED_FORMS, kind, lambda *given, form=form: made.append(form) or form(*given)
        )
    monkeypatch.setattr(local_functions, "GateGradient", local_functions.CLOSED_FORMS[GatedMLP])
    run_function = local_functions.run_function

    def on_accelerator(name, module, inputs, arguments, parameters, strays, call, waits=False):
        there = replace(call, device_type="cuda")
        there.autocast = call.autocast
        return run_function(name, module, inputs, arguments, parameters, strays, there, waits)

    monkeypatch.setattr("crosslayer.crnet.block_gradient.run_function", on_accelerator)
    assert_all_close(gradients_of(model, tokens()), expected)
    assert set(made) == {kept[GatedMLP]}
