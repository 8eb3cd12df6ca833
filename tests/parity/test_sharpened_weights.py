"""Weights that were trained a little and then made eight times as large, where reversible networks lose the gradient.

Two inversions of a sharpened layer differ by what rounding makes of it, so that a rebuilt state may be far off. Either
the gradient stays as good as plain autograd's in the same precision, or the drift is noticed: the run says so and goes
on with `replay`, whose gradient is that of `none` to the last bit.
"""

import copy
import logging

import pytest
import torch

from family_cases import FAMILY_CASES
from family_checks import REBUILDING, gradients_of, step

LAYERS, STEPS, SHARPENING = 6, 40, 8


def counting(seed, length=24):
    """Rows in which each token follows from the one before, so that there is something to learn."""
    rows = [torch.randint(3, 92, (8, 1), generator=torch.Generator().manual_seed(seed))]
    for _ in range(length - 1):
        rows.append((rows[-1] * 5 + 3) % 89 + 3)
    return torch.cat(rows, 1)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def trained(request):
    torch.manual_seed(0)
    case = FAMILY_CASES[request.param]
    config = case.config(num_hidden_layers=LAYERS, initializer_range=0.02, rank=8)
    model = case.causal_class._from_config(config, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for seed in range(STEPS):
        ids = counting(seed)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    return model


@torch.no_grad()
def sharpened(model, factor=SHARPENING, **fields):
    model = copy.deepcopy(model)
    for name, value in fields.items():
        setattr(model.config, name, value)
    for name, parameter in model.named_parameters():
        if name.endswith(("A.weight", "B.weight")):
            parameter.mul_(factor)
    return model


def exact_gradients(model):
    exact = type(model)._from_config(model.config, attn_implementation="sdpa", dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    return step(exact)


def error(actual, expected):
    """Over all parameters at once, as an optimizer sees them."""
    off = sum(float((actual[name].double() - expected[name]).square().sum()) for name in expected)
    return (off / sum(float(expected[name].square().sum()) for name in expected)) ** 0.5


def allowed(model, expected):
    """What plain autograd gets wrong in the same precision, a few times; no less than a thousandth."""
    return max(1e-3, 4 * error(step(model), expected))


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("policy", REBUILDING)
def test_the_gradient_is_right_or_the_drift_is_noticed(trained, policy, mixed, caplog):
    model = sharpened(trained)
    expected = exact_gradients(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), caplog.at_level(logging.WARNING):
        bound, as_none = allowed(model, expected), step(model, "none")
        found = error(step(model, policy), expected)
        noticed = (model.recompute_drift or 0.0) > model.base_model._drift_bound()
        assert found <= bound or noticed, f"{found:.2g} off, drift {model.recompute_drift}"
        again = gradients_of(model)
    assert ("Going on with recompute='replay'" in caplog.text) == noticed
    if noticed:
        assert all(torch.equal(again[name], as_none[name]) for name in as_none)
    if policy == "reversible" and not mixed:  # is lost here, so that the way out is walked
        assert noticed


def test_unsharpened_weights_stay_with_their_policy(trained):
    model = sharpened(trained, factor=1)
    expected = exact_gradients(model)
    for policy in REBUILDING:
        assert error(step(model, policy), expected) <= 1e-5
        assert (model.recompute_drift or 0.0) < 0.5 * model.base_model._drift_bound()


def test_it_would_go_wrong_unnoticed_without_a_bound(trained):
    """The check above can fail: `reversible` loses the gradient, and only the drift's bound tells."""
    model = sharpened(trained, recompute_drift_bound=1e9)
    expected = exact_gradients(model)
    bound = allowed(model, expected)
    model = sharpened(model, factor=2)  # 16 times in all
    expected = exact_gradients(model)
    assert error(step(model, "reversible"), expected) > 10 * bound
    assert model.recompute_drift < model.base_model._drift_bound()
