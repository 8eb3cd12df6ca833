"""`recompute: auto`: the planner's choice for the device at hand, in a real run."""

import pytest

from crosslayer.errors import ConfigError
from crosslayer.train import build_recipe, memory
from crosslayer.train.run import build_arguments, build_model_config, pretrain
from tiny_run import tiny_content, tiny_recipe

MODEL = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "rank": 16}
BATCH = {"per_device_train_batch_size": 32, "use_cpu": True}


def chosen(tmp_path, monkeypatch, free, **model):
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    fields = {**MODEL, "num_hidden_layers": 8, "recompute": "auto", **model}
    recipe = build_recipe({"name": "x", "model": fields, "data": {"block_size": 128}, "training": BATCH})
    config, arguments = build_model_config(recipe), build_arguments(recipe, tmp_path)
    return config, arguments, memory.choose_recompute(config, recipe, arguments)


def test_the_fastest_that_fits(tmp_path, monkeypatch):
    policies = []
    for free in (10e9, 150e6, 110e6):
        config, _, reason = chosen(tmp_path, monkeypatch, free)
        assert reason.startswith(config.recompute)
        policies.append(config.recompute)
    assert policies[0] == "none"
    assert "none" not in policies[1:]
    config, _, _ = chosen(tmp_path, monkeypatch, 66e6)
    assert config.recompute in ("invert", "reversible")


def test_dense_models_checkpoint_whole_layers(tmp_path, monkeypatch):
    _, arguments, _ = chosen(tmp_path, monkeypatch, 10e9, factorization="dense")
    assert not arguments.activation_checkpointing
    config, arguments, reason = chosen(tmp_path, monkeypatch, 60e6, factorization="dense")
    assert arguments.activation_checkpointing
    assert config.recompute == "none"
    assert reason.startswith("layers")


def test_cola_has_policies_too(tmp_path, monkeypatch):
    found = {chosen(tmp_path, monkeypatch, free, factorization="cola")[0].recompute for free in (10e9, 120e6, 90e6)}
    assert "none" in found
    assert found & {"invert", "replay"}


def test_nothing_fits(tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"nothing fits in the 9.2 MB .* the smallest, \w+, needs .* MB; lower per_device"
    ):
        chosen(tmp_path, monkeypatch, 10e6)


def test_no_interval_beside_it():
    recipe = build_recipe({"name": "x", "model": {**MODEL, "recompute": "auto", "recompute_interval": 2}})
    with pytest.raises(ConfigError, match="recompute=auto chooses the interval too"):
        build_model_config(recipe)


def test_a_run(tmp_path, monkeypatch):
    """Chosen once, named in the plan, written into the checkpoint; the recipe still says auto."""
    plans = []
    content = tiny_content(tmp_path, max_steps=2, save_steps=2)
    content["model"]["recompute"] = "auto"
    needed = {}
    for policy in ("none", "invert"):
        recipe = tiny_recipe(tmp_path)
        recipe.model["recompute"] = policy
        pretrain(recipe, tmp_path / policy, dry_run=True, show_plan=lambda plan, p=policy: needed.update({p: plan}))
    limits = {policy: sum(plan.estimated_memory_bytes.values()) for policy, plan in needed.items()}
    assert limits["invert"] < limits["none"]
    monkeypatch.setattr(memory, "available_memory", lambda device: (limits["none"] - 1) / (1 - memory.DEFAULT_RESERVE))
    report = pretrain(build_recipe(content), tmp_path / "run", show_plan=plans.append)
    assert report.model.config.recompute != "none"
    assert plans[0].recompute.startswith(report.model.config.recompute)
    assert "recompute: auto" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert sum(plans[0].estimated_memory_bytes.values()) < limits["none"]
