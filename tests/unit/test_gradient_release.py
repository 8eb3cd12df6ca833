"""Steps within the backward: the same weights, schedule and checkpoints, and no gradients of all layers at once."""

import pytest
import torch

from crosslayer import CRNetConfig, CRNetForCausalLM
from crosslayer.accounting import Precision, Step, estimate_memory
from crosslayer.analysis import measure_peak_memory
from crosslayer.errors import ConfigError
from crosslayer.loading import load_saved
from crosslayer.train import build_recipe
from crosslayer.train.gradient_release import OPTIMIZERS, OptimizerConfig, release_gradients
from crosslayer.train.optimizers import MatrixOptimizer
from crosslayer.train.run import build_arguments, pretrain
from tiny_run import tiny_content, tiny_recipe

POLICIES = ("none", "invert", "replay", "reversible")
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "rank": 16}


def model_of(policy, layers=5):
    torch.manual_seed(0)
    config = CRNetConfig(**SHAPE, num_hidden_layers=layers, recompute=policy, max_position_embeddings=64)
    model = CRNetForCausalLM(config).train()
    model.fused_loss = True
    return model


def trained(policy, kind, release):
    """Weights after four steps under a schedule that changes the rates, and how many gradients ever were there."""
    model = model_of(policy).double()
    optimizer = kind(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    most = 0

    def count(_):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    if release:
        release_gradients(optimizer)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    for step in range(4):
        ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(step))
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.state_dict(), optimizer.state_dict(), most


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_same_weights_and_states_to_the_last_bit(policy, kind):
    weights, states, all_at_once = trained(policy, kind, release=False)
    found, found_states, most = trained(policy, kind, release=True)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert states["param_groups"] == found_states["param_groups"]
    for index, state in states["state"].items():
        assert all(
            torch.equal(found_states["state"][index][name], value) for name, value in state.items() if value is not None
        )
    assert all_at_once == len(list(model_of(policy).parameters()))
    assert most == 0  # gone before the next hook of the same parameter


@pytest.mark.parametrize("policy", POLICIES)
def test_peak_is_what_the_planner_says(policy):
    """Deep enough for gradients to weigh: the allocator's peak of a step against the estimate, with and without."""
    model = model_of(policy, layers=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(64, (1, 32))
    kept = measure_peak_memory(model, ids, optimizer)
    release_gradients(optimizer)
    released = measure_peak_memory(model, ids, optimizer)
    measured = [max(sum(parts.values()) for parts in found.phases.values()) for found in (kept, released)]
    estimates = []
    for release in (False, True):
        step = Step(sequence=32, precision=Precision(), fused_norms=False, releases_gradients=release)
        estimates.append(sum(estimate_memory(model.config, step).values()))
    # Under `none` the peak lies at the top of the backward, where no gradients are yet.
    assert measured[1] < (1.0 if policy == "none" else 0.9) * measured[0]
    assert estimates == pytest.approx(measured, rel=0.1)


def content_of(root, **training):
    content = tiny_content(root, max_grad_norm=0.0, save_total_limit=9, **training)
    content["model"]["recompute"] = "invert"
    return {**content, "optimizer": {"gradient_release": True}}


def test_a_run_and_its_resumption(tmp_path):
    plain = {**content_of(tmp_path), "optimizer": {}}
    expected = pretrain(build_recipe(plain), tmp_path / "plain").model.state_dict()
    report = pretrain(build_recipe(content_of(tmp_path)), tmp_path / "run")
    for name, weight in report.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    for later in (tmp_path / "run" / "checkpoint-8", tmp_path / "run" / "checkpoint-12"):
        later.rename(tmp_path / later.name)
    (tmp_path / "run" / "report.json").unlink()
    pretrain(build_recipe(content_of(tmp_path)), tmp_path / "run", resume=True)
    for name, weight in load_saved(tmp_path / "run" / "model")[0].state_dict().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"max_grad_norm": 1.0}, "does not go with max_grad_norm=1; set it to 0"),
        ({"gradient_accumulation_steps": 2}, "does not go with gradient_accumulation_steps=2; set it to 1"),
        (
            {"optim": "galore_adamw", "optim_target_modules": "all-linear"},
            "does not go with optim=galore_adamw; choose",
        ),
    ],
)
def test_what_wants_all_gradients_is_refused(tmp_path, training, message):
    recipe = build_recipe({**content_of(tmp_path), "training": {**content_of(tmp_path)["training"], **training}})
    with pytest.raises(ConfigError, match=message):
        pretrain(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_asked_of_others(tmp_path):
    OptimizerConfig().check(build_arguments(tiny_recipe(tmp_path, max_grad_norm=1.0), tmp_path / "run"), "skip")


@pytest.mark.parametrize("name", sorted({*OPTIMIZERS} - {"adamw_torch_8bit", "adamw_torch_4bit"}))
def test_every_optimizer_named_steps_one_parameter_alone(name, tmp_path):
    """A step without gradients changes no weight and no state: what `release_gradients` builds on."""
    from transformers import Trainer

    arguments = build_arguments(tiny_recipe(tmp_path, optim=name), tmp_path / "run")
    one, other = torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(64, 64))
    if name == "muon":
        optimizer = MatrixOptimizer([{"params": [one, other], "optimizer": "muon"}])
    else:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([one, other], **settings)
    one.grad = torch.randn(64, 64)
    optimizer.step()
    assert not torch.equal(one, torch.ones(64, 64))
    assert torch.equal(other, torch.ones(64, 64))
    assert not optimizer.state[other] or float(optimizer.state[other].get("step", 0)) == 0
    one.grad, before = None, one.detach().clone()
    optimizer.step()
    assert torch.equal(one, before)
