"""Muon and Spectron: steps against float64, the bound, which parameter is stepped by what, runs, resumption."""

import math
import shutil

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from crosslayer.crnet import CRNetForCausalLM
from crosslayer.errors import ConfigError
from crosslayer.loading import load_saved
from crosslayer.methods import MATRIX_OPTIMIZERS
from crosslayer.train import build_recipe
from crosslayer.train.arguments import training_arguments
from crosslayer.train.optimizers import check_optim, matrix_settings, part_names
from crosslayer.train.parameter_groups import group_names
from crosslayer.train.run import build_arguments, pretrain
from crosslayer.train.spectron import FIRST_ITERATIONS, Spectron, orthogonalized, product_rate, spectral_norm
from family_cases import FAMILY_CASES
from model_cases import CASES, config_of, model_of
from optimizer_cases import optimizer_of
from tiny_run import tiny_content, tiny_recipe

RANK, IN, OUT = 6, 20, 33


def factor(*shape, seed=0):
    """Random, with a largest singular value far above the next: there the power method is exact."""
    torch.manual_seed(seed)
    matrix = torch.randn(shape, dtype=torch.float64)
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    S[0] *= 3
    return U @ S.diag() @ V


def polynomial_polar(matrix, steps=5, last=True):
    """The polar factor as Newton-Schulz finds it: its polynomial on every singular value, scaled by the Frobenius
    norm."""
    U, S, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    S = S / matrix.double().norm()
    for _ in range(steps):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return U @ (1.5 * S - 0.5 * S**3 if last else S).diag() @ V


# Steps


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("rule", "ratio"), [(None, math.sqrt(OUT / IN)), ("match_rms_adamw", 0.2 * math.sqrt(OUT))])
def test_steps_of_spectron(rule, ratio, nesterov):
    lr, decay, momentum = 0.05, 0.1, 0.9
    A, B = nn.Parameter(factor(RANK, IN)), nn.Parameter(factor(OUT, RANK, seed=1))
    expected = [A.detach().clone(), B.detach().clone()]
    optimizer = Spectron([A, B], lr, decay, momentum, nesterov, adjust_lr_fn=rule)
    means = [torch.zeros_like(A), torch.zeros_like(B)]
    for step in range(2):
        A.grad, B.grad = factor(RANK, IN, seed=2 + step), factor(OUT, RANK, seed=9 + step)
        norms = sum(torch.linalg.matrix_norm(weight, 2) for weight in expected)
        for index, gradient in enumerate((A.grad, B.grad)):
            means[index] = momentum * means[index] + (1 - momentum) * gradient
            ahead = (1 - momentum) * gradient + momentum * means[index] if nesterov else means[index]
            size = lr * ratio / (norms + 1)
            expected[index] = (1 - lr * decay) * expected[index] - size * polynomial_polar(ahead)
        optimizer.step()
        for found, wanted in zip((A, B), expected, strict=True):
            torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e-7)


def test_muon_and_adamw_of_one_model():
    """Every parameter of a model after a step, against its own formula in float64."""
    model = model_of("cross_layer").train()
    lr, decay, eps = 1e-2, 0.1, 1e-8
    optimizer = optimizer_of(model, "muon", lr, decay)
    rates = {"other": lr, "embeddings": 2 * lr, "full_rank": 0.1 * lr, "low_rank": 3 * lr, "beta": 0.5 * lr}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        kind, gradient = group_names(model)[name], gradients[name]
        rate = rates[kind]
        if kind in ("full_rank", "low_rank"):
            size = rate * 0.2 * math.sqrt(max(parameter.shape))
            polar = polynomial_polar(gradient, last=False)
            expected = (1 - rate * decay) * before[name] - size * polar
            assert (parameter - expected).norm() < 0.04 * size * polar.norm(), name  # Muon works in bfloat16
        else:
            expected = before[name] - rate * gradient / (gradient.abs() + eps)
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-6)


# The parts of Spectron's step


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_orthogonalized_is_near_the_polar_factor_and_never_above_1(shape, dtype):
    torch.manual_seed(0)
    matrix = torch.randn(shape).to(dtype)
    found = orthogonalized(matrix)
    assert found.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    torch.testing.assert_close(found.double(), polynomial_polar(matrix), rtol=0, atol=1e-5)
    values = torch.linalg.svdvals(found.double())
    assert values.max() <= 1 + 1e-6
    if shape[0] != shape[1]:  # a square random matrix has singular values near 0
        assert values.min() > 0.8
    assert not orthogonalized(torch.zeros(shape)).any()


def test_spectral_norm_comes_from_below_and_gets_there():
    matrix = torch.randn(RANK, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix, 2)
    vector = nn.functional.normalize(torch.ones(RANK, dtype=torch.float64), dim=0)
    found = [spectral_norm(matrix, vector, iterations)[0] for iterations in (1, 5, 200)]
    assert found == sorted(found)
    assert found[-1] <= exact * (1 + 1e-12)
    assert found[-1] == pytest.approx(exact.item(), rel=1e-9)
    zero, same = spectral_norm(torch.zeros(RANK, IN, dtype=torch.float64), vector, 3)
    assert zero == 0
    assert torch.equal(same, vector)


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_product_moves_no_further_than_the_bound(rule, start):
    """Through large steps that change both factors a lot, from B = 0 or not, under one power iteration a step."""
    torch.manual_seed(0)
    A, B = nn.Parameter(torch.randn(RANK, IN) / IN**0.5), nn.Parameter(start * torch.randn(OUT, RANK))
    optimizer = Spectron([A, B], lr=0.2, weight_decay=0.0, adjust_lr_fn=rule)
    bound = product_rate(0.2, rule, OUT, IN)
    assert bound == pytest.approx(0.2 * (math.sqrt(OUT / IN) if rule == "original" else 0.2 * math.sqrt(OUT)))
    moved = []
    for _ in range(60):
        target = torch.randn(OUT, IN) if len(moved) % 2 else torch.ones(OUT, IN)
        A.grad, B.grad = B.detach().T @ target, target @ A.detach().T
        before = (B @ A).detach().double()
        optimizer.step()
        moved.append(torch.linalg.matrix_norm((B @ A).detach().double() - before, 2).item() / bound)
    assert max(moved) <= 1 + 1e-5
    assert max(moved) > 0.5  # the bound is not far off either
    assert torch.linalg.matrix_norm(B.detach(), 2) > 1


def test_vectors_are_kept():
    A, B = nn.Parameter(torch.randn(RANK, IN)), nn.Parameter(torch.randn(OUT, RANK))
    optimizer = Spectron([A, B])
    for _ in range(2):
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
        before = spectral_norm(A.detach(), optimizer.state[A]["power_vector"], 1)[1] if optimizer.state else None
        optimizer.step()
    torch.testing.assert_close(optimizer.state[A]["power_vector"], before)  # one iteration from the last one's
    assert optimizer.state[B]["power_vector"].shape == (RANK,)
    assert FIRST_ITERATIONS > 1


def test_nothing_happens_without_gradients():
    A, B = nn.Parameter(torch.randn(RANK, IN)), nn.Parameter(torch.randn(OUT, RANK))
    before = A.detach().clone()
    optimizer = Spectron([A, B])
    optimizer.step()
    assert torch.equal(A, before)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        ([(2, 3), (4, 5)], {}, r"not \[2, 3\] and \[4, 5\]"),
        ([(2, 3, 1), (4, 2)], {}, "are wanted"),
        ([(2, 3)], {}, "zip"),
        ([(2, 3), (4, 2)], {"momentum": 1.0}, "momentum=1.0"),
        ([(2, 3), (4, 2)], {"ns_steps": 0}, "ns_steps=0"),
        ([(2, 3), (4, 2)], {"adjust_lr_fn": "none"}, "adjust_lr_fn='none'"),
    ],
)
def test_what_spectron_refuses(shapes, settings, message):
    with pytest.raises(ValueError, match=message):
        Spectron([nn.Parameter(torch.ones(shape)) for shape in shapes], **settings)


# Groups


def arguments_of(tmp_path, optim, **training):
    return build_arguments(tiny_recipe(tmp_path, optim=optim, **training), tmp_path / "unused")


@pytest.mark.parametrize("optim", MATRIX_OPTIMIZERS)
@pytest.mark.parametrize("case", [*CASES, *FAMILY_CASES])
def test_every_parameter_is_stepped_by_one(case, optim):
    model = CRNetForCausalLM(config_of(case)) if case in CASES else FAMILY_CASES[case].model()
    optimizer = optimizer_of(model, optim)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    assert optimizer.param_groups[0]["name"] == "other"  # its rate is the one that gets logged
    kinds = group_names(model)
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        is_matrix = parameter.ndim == 2 and kinds[name] in ("full_rank", "low_rank")
        of_pair = name.endswith((".A.weight", ".B.weight"))
        assert group["optimizer"] == ((optim if of_pair else "muon") if is_matrix else "adamw"), name
        assert group["name"] == kinds[name]
        assert group["weight_decay"] == (0.1 if kinds[name] in ("full_rank", "low_rank") else 0.0)
    assert sum(len(list(part.param_groups)) for part in optimizer.parts.values()) == len(optimizer.param_groups)


def test_a_factor_without_its_partner_is_a_matrix():
    model = CRNetForCausalLM(config_of("cross_layer"))
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).A.weight.requires_grad_(False)
    assert part_names(model, "spectron")[f"{name}.B.weight"] == "muon"
    assert part_names(model, "spectron")["model.layers.1.mlp.gate_proj.B.weight"] == "spectron"
    optimizer_of(model, "spectron")


@pytest.mark.parametrize("optim", MATRIX_OPTIMIZERS)
def test_rates_of_a_loaded_state_are_those_that_are_taken(optim):
    """load_state_dict puts new groups in place, which schedules then change."""
    model = model_of("cross_layer").train()
    optimizer = optimizer_of(model, optim)
    optimizer.load_state_dict(optimizer.state_dict())
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for rate in (0.0, 1e-2):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        changed = [not torch.equal(weight, weights[name]) for name, weight in model.state_dict().items()]
        assert all(changed) if rate else not any(changed)


def test_settings_and_rates_reach_the_parts(tmp_path):
    content = tiny_content(tmp_path, optim="spectron", optim_args="momentum=0.8, nesterov=False", adam_beta2=0.95)
    report = pretrain(build_recipe({**content, "training": {**content["training"], "max_steps": 2}}), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    groups = {(group["optimizer"], group["name"]): group for group in state["param_groups"]}
    assert {("adamw", "other"), ("muon", "full_rank"), ("spectron", "low_rank")} <= groups.keys()
    for part in (("muon", "full_rank"), ("spectron", "low_rank")):
        assert groups[part]["momentum"] == 0.8
        assert groups[part]["nesterov"] is False
        assert groups[part]["adjust_lr_fn"] == "match_rms_adamw"
    assert groups["adamw", "other"]["betas"] == (0.9, 0.95)
    assert groups["muon", "full_rank"]["initial_lr"] == pytest.approx(0.2 * groups["adamw", "other"]["initial_lr"])
    assert groups["muon", "full_rank"]["lr"] == pytest.approx(0.2 * groups["adamw", "other"]["lr"])
    assert report.after["eval_loss"] < report.before["eval_loss"]


# Runs


@pytest.mark.parametrize(("optim", "dtype"), [("muon", "float32"), ("spectron", "float32"), ("spectron", "bfloat16")])
def test_a_resumed_run_equals_an_uninterrupted_one(optim, dtype, tmp_path):
    content = tiny_content(tmp_path, optim=optim, save_total_limit=9, learning_rate=2e-2)
    content["model"]["dtype"] = dtype
    whole = pretrain(build_recipe(content), tmp_path / "whole")
    assert whole.after["eval_loss"] < whole.before["eval_loss"] - 0.5
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for later in ("checkpoint-8", "checkpoint-12", "model"):
        shutil.rmtree(tmp_path / "run" / later)
    (tmp_path / "run" / "report.json").unlink()
    resumed = pretrain(build_recipe(content), tmp_path / "run", resume=True)
    saved = load_saved(tmp_path / "run" / "model")[0].state_dict()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
        assert torch.equal(saved[name], weight), name
    states = [
        torch.load(tmp_path / run / "checkpoint-12" / "optimizer.pt", weights_only=True)["state"]
        for run in ("whole", "run")
    ]
    for index, state in states[0].items():
        assert all(torch.equal(states[1][index][name], value) for name, value in state.items())
    assert any("power_vector" in state for state in states[0].values()) == (optim == "spectron")
    content["training"]["optim"] = "adamw_torch"
    with pytest.raises(ConfigError, match=f"optim='adamw_torch', was '{optim}': the state of the optimizer is of its"):
        pretrain(build_recipe(content), tmp_path / "run", resume=True)


def test_gradient_release_takes_the_same_steps(tmp_path):
    content = tiny_content(tmp_path, optim="muon", max_grad_norm=0.0, max_steps=4)
    plain = pretrain(build_recipe(content), tmp_path / "plain").model.state_dict()
    content["optimizer"] = {"gradient_release": True}
    released = pretrain(build_recipe(content), tmp_path / "released").model.state_dict()
    assert all(torch.equal(released[name], weight) for name, weight in plain.items())


# Wrong input


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optim": "moun"}, "optim='moun' is none of .*muon, spectron; the nearest is muon"),
        ({"optim_args": "momentun=0.9"}, "optim_args: 'momentun' is none of momentum, .*; the nearest is momentum"),
        ({"optim_args": "momentum=high"}, "'momentum=high' is not momentum=float"),
        ({"optim_args": "nesterov=1"}, "'nesterov=1' is not nesterov=bool"),
        ({"optim_args": "momentum=1.5"}, r"momentum=1.5 in \[0, 1\)"),
        ({"optim_args": "adjust_lr_fn=none"}, "'none' is neither original nor match_rms_adamw"),
        ({"optim_target_modules": "all-linear"}, "optim=muon steps all matrices of the layers; leave it out"),
    ],
)
def test_wrong_settings(tmp_path, training, message):
    with pytest.raises(ConfigError, match=message):
        arguments_of(tmp_path, **{"optim": "muon", **training})


def test_fine_tuning_has_the_names_of_transformers_alone(tmp_path):
    with pytest.raises(ConfigError, match="muon is not a valid OptimizerNames, please select one of"):
        training_arguments(TrainingArguments, {"optim": "muon", "use_cpu": True}, tmp_path)


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    arguments = arguments_of(tmp_path, "muon")
    arguments.deepspeed = {"zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError, match="deepspeed hands an optimizer a flat part"):
        check_optim(arguments)


def test_spectron_does_not_step_in_the_backward(tmp_path):
    content = tiny_content(tmp_path, optim="spectron", max_grad_norm=0.0)
    with pytest.raises(ConfigError, match="optim=spectron; choose muon: a step of A or B needs the gradients of both"):
        pretrain(build_recipe({**content, "optimizer": {"gradient_release": True}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_of_matrices():
    assert matrix_settings(None) == {}
    assert matrix_settings("ns_steps=6, nesterov=TRUE,momentum=0.5") == {
        "ns_steps": 6,
        "nesterov": True,
        "momentum": 0.5,
    }
