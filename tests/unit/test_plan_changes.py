"""What a plan changes where nothing fits as asked: the fewest changes, in order, and it fits when it runs."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import refused, run  # noqa: F401  run is a fixture
from test_planner import TINY, settings_of

from crosslayer.accounting import PRECISIONS, SIZES, Method, Shape, Step, estimate_memory
from crosslayer.accounting.planner import fastest, list_settings, make_plan, policies_of
from crosslayer.accounting.sizes import plan_sizes
from crosslayer.crnet import CRNetForCausalLM
from crosslayer.errors import ConfigError
from crosslayer.recipes import FOLDER
from crosslayer.train import build_recipe
from crosslayer.train.gradient_release import release_gradients
from crosslayer.train.memory import training_method, training_step
from crosslayer.train.run import build_arguments, build_model_config
from model_cases import config_of
from peak_memory import allocated_peak, make_step

PAGE = Path(__file__).parents[2] / "docs" / "accounting.md"
CARD = {"gpu_memory": 24e9, "sequence": 4096}
CHANGES = ({"optimizer": "adamw_8bit"}, {"precision": "bf16"}, {"gradient_release": True})
"""In the order of the page."""


def sets_of_changes():
    for count in range(len(CHANGES) + 1):
        for several in itertools.combinations(CHANGES, count):
            yield {name: value for change in several for name, value in change.items()}


def smallest(model, method, changes, sequence):
    """Bytes of the smallest setting with a micro-batch of one, by the estimate alone; without a plan."""
    factorization = {"crnet": "cross_layer"}.get(method, method)
    shape = Shape.of(make_shape(model)).factorized(factorization, None)
    step = Step(
        sequence=sequence,
        precision=PRECISIONS[changes.get("precision", "bf16_autocast")],
        accumulates="gradient_release" not in changes,
        releases_gradients="gradient_release" in changes,
    )
    optimizer = changes.get("optimizer", "adamw")
    policies = policies_of(factorization, shape.num_hidden_layers)
    return min(sum(estimate_memory(shape, step, replace(policy, optimizer=optimizer)).values()) for policy in policies)


def make_shape(model):
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    return {**dict(zip(names, SIZES[model], strict=True)), "factorization": "dense"}


@pytest.mark.parametrize("method", ["crnet", "cola", "dense"])
@pytest.mark.parametrize("memory", [60e9, 34e9, 24e9, 20e9, 17e9])
def test_the_fewest_changes_in_order(method, memory):
    """By trying all of them."""
    fitting = (changes for changes in sets_of_changes() if smallest("llama_7b", method, changes, 4096) <= 0.92 * memory)
    expected = next(fitting, None)
    given = {"gpu_memory": memory, "sequence": 4096, "beside": ()}
    if expected is None:
        with pytest.raises(ConfigError, match=r"does not fit .* give \d+ gpus, tensor_parallel"):
            make_plan("llama_7b", method, **given)
        return
    plan = make_plan("llama_7b", method, **given)
    assert plan.changes == expected
    assert plan.recommended.setting.fits
    assert plan.needed_bytes == pytest.approx(smallest("llama_7b", method, {}, 4096) / 0.92)
    asked = make_plan("llama_7b", method, **given | expected)  # what it says is what may be asked for
    assert asked.changes == {}
    assert asked.settings == plan.settings


def test_seven_billion_on_24_gb():
    plan = make_plan("llama_7b", **CARD)
    assert plan.changes == {"optimizer": "adamw_8bit", "precision": "bf16"}
    assert plan.recommended.setting.accumulation == 244  # tokens of a step as asked
    assert "does not fit" in plan.beside["dense"]
    released = make_plan("llama_7b", **CARD | {"gpu_memory": 20e9}, beside=("galore_8bit",))
    assert released.changes == {**plan.changes, "gradient_release": True}
    assert {setting.accumulation for setting in released.settings} == {1}
    beside = make_plan("llama_1b", **CARD, gradient_release=True, beside=("galore",)).beside["galore"]
    assert beside.setting.accumulation > 1, "GaLore does not step within the backward"


def test_eight_bit_states_of_shards_are_torchaos():
    plan = make_plan("llama_13b", **CARD, gpus=4, optimizer="adamw_8bit", beside=())
    assert plan.recommended.setting.fsdp > 1
    assert plan.recommended.recipe["training"]["optim"] == "adamw_torch_8bit"


def test_recipe_lines_hold_the_changes(tmp_path):
    """The recipe trains as planned, by the estimate that `pretrain` itself makes of it."""
    for method, memory in (("crnet", 24e9), ("crnet", 20e9), ("dense", 33e9), ("cola", 60e9)):
        plan = make_plan("llama_7b", method, gpu_memory=memory, sequence=1024, beside=())
        base = yaml.safe_load((FOLDER / "crnet_7b_c4.yaml").read_text())
        del base["model"]["rank"]
        for section, fields in plan.recommended.recipe.items():
            base[section] = {**base.get(section, {}), **fields}
        base["training"]["use_cpu"] = True
        base["training"]["bf16"] = True
        recipe = build_recipe(base)
        arguments = build_arguments(recipe, tmp_path)
        recipe.optimizer.check(arguments, recipe.monitor.on_nonfinite)
        config = build_model_config(recipe)
        step = replace(training_step(recipe, arguments), fused_norms=True)
        assert step.releases_gradients == plan.changes.get("gradient_release", False)
        assert estimate_memory(config, step, training_method(config, arguments)) == (
            plan.recommended.setting.memory_bytes
        ), (method, memory)


def test_a_released_step_fits_when_it_runs():
    """Between what the smallest step takes with gradients kept and released, 5 % left to the estimate."""
    config, rows, tokens = config_of("cross_layer", **TINY), 1, 8

    def peak(release):
        model = CRNetForCausalLM(config).train()
        model.set_recompute("invert")
        model.fused_loss = True
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if release:
            release_gradients(optimizer)
        step = make_step(model, torch.randint(3, 101, (rows, tokens)), optimizer)
        step()
        return sum(3 * p.numel() * p.element_size() for p in model.parameters()) + allocated_peak(step)

    kept, released = peak(False), peak(True)
    limit = (kept + released) / 2
    request, shape, _ = settings_of(config, limit, rows, tokens)
    policies = [Method(recompute="invert")]
    assert released < 0.95 * limit < limit < kept
    assert fastest(list_settings(shape, policies, request)) is None
    assert fastest(list_settings(shape, policies, replace(request, gradient_release=True))) is not None


def test_every_size_with_what_makes_it_fit():
    plans = plan_sizes(**CARD, everything=True).plans
    assert list(dict.fromkeys(plan.model for plan in plans)) == [*reversed(SIZES)]
    assert all(plan.recommended.setting.fits for plan in plans)
    assert len(plans) > len(SIZES)
    least = {}
    for before, plan in itertools.pairwise([None, *plans]):
        first = least.setdefault(plan.model, plan)
        if before is not None and before.model == plan.model:
            assert first.changes.items() < plan.changes.items()
            assert before.recommended.setting.tokens_per_s < plan.recommended.setting.tokens_per_s
        elif "gpus" not in plan.changes:
            assert plan.changes == make_plan(plan.model, **CARD, beside=()).changes
        else:
            with pytest.raises(ConfigError, match=f"give {plan.gpus} gpus"):
                make_plan(plan.model, **CARD, beside=())


def test_sizes_that_have_no_plan():
    some = plan_sizes(gpu_memory=10e9, sequence=4096, gpus=8, tensor_parallel=8)
    assert "llama_130m" in some.refused, "12 heads on 8 ranks"
    assert all(plan.recommended.setting.tensor_parallel == 8 for plan in some.plans if not plan.changes)


def test_the_command_lists_sizes(run, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "80")
    command = ("plan", "--gpu-memory", "24GB", "--device", "rtx-4090", "--sequence", "4096")
    shown = run(*command)
    page = PAGE.read_text(encoding="utf-8").partition(" ".join(command))[2]
    table = page.partition("```text\n")[2].partition("```")[0].splitlines()
    assert table == [line.rstrip() for line in shown.out.splitlines()][3 : 3 + len(table)]
    assert shown.code == 0
    assert "…" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    for part in ("\nllama_7b   8-bit, bf16 ", "\nllama_3b   as asked ", "\nllama_13b  8 gpus "):
        assert part in shown.out
    assert "largest as asked: llama_3b; llama_7b fits with 8-bit states, bf16 weights" in " ".join(shown.out.split())
    everything = run(*command, "--all").out
    assert "8-bit, bf16, release invert" in everything
    assert max(map(len, everything.splitlines())) <= 80
    content = json.loads(run("plan", "--gpus", "512", "--json").out)
    assert [plan["model"] for plan in content["plans"]] == [*reversed(SIZES)]
    refused(run("plan", "--gpu-memory", "100MB"), "does not fit in 100.0 MB", "more gpus would not help")
    refused(run("plan", "--device", "h1000"), "nearest is h100")


def test_the_command_says_what_it_changed(run, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("plan", "--model", "llama_7b", "--gpu-memory", "20GB", "--sequence", "4096")
    assert shown.code == 0
    text = " ".join(shown.out.split())
    assert "as asked it does not fit: the smallest setting needs 55.5 GB" in text
    assert "8-bit states, bf16 weights, gradient release; a step has 4,096 tokens" in text
    for line in ("  dtype: bfloat16", "  optim: adamw_bnb_8bit", "  max_grad_norm: 0.0", "  gradient_release: true"):
        assert f"\n{line}\n" in shown.out
