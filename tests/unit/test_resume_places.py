"""Resumptions that name the same places otherwise or have nothing left to do; folders that are not the run's."""

import os
import shutil

import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig

import tiny_finetune
from crosslayer.errors import ConfigError
from crosslayer.train import build_finetune_recipe, build_recipe
from crosslayer.train.finetune import finetune
from crosslayer.train.run import pretrain
from tiny_run import tiny_content, write_texts

SPELLINGS = {
    "absolute": lambda path, root: str(path),
    "relative": lambda path, root: os.path.relpath(path, root),
    "dot": lambda path, root: "./" + os.path.relpath(path, root),
    "up": lambda path, root: str(path.parent / "elsewhere" / ".." / path.name),
    "slash": lambda path, root: f"{path}/",
    "link": lambda path, root: str(root / "links" / path.name),
    "home": lambda path, root: "~/" + os.path.relpath(path, root),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    for name in ("elsewhere", "links"):
        (root / name).mkdir()
    for name in ("texts", "held", "base", "encoder", "rows"):
        (root / "links" / name).symlink_to(root / name)
    write_texts(root / "held", 8, seed=1)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    LlamaConfig(**sizes, num_attention_heads=2).save_pretrained(root / "base")
    tiny_finetune.write_encoder(root / "encoder")
    tiny_finetune.write_task(root / "rows", 16, 8)
    return root


def recipe_of(root, spell):
    content = tiny_content(root, max_steps=4, eval_strategy="no")
    content["model"] = {"base": spell(root / "base", root), "rank": 8}
    content["data"] |= {"data": spell(root / "texts", root), "validation_data": spell(root / "held", root)}
    return build_recipe(content)


def task_of(root, spell):
    content = tiny_finetune.tiny_content(root, root / "encoder", root / "rows", num_train_epochs=1)
    content["model"] = spell(root / "encoder", root)
    content["data"]["data"] = content["data"]["validation_data"] = spell(root / "rows", root)
    return build_finetune_recipe(content)


@pytest.fixture(scope="module")
def runs(root):
    pretrain(recipe_of(root, SPELLINGS["absolute"]), root / "run")
    finetune(task_of(root, SPELLINGS["absolute"]), root / "tuned")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_places_by_other_names(root, runs, spelling, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    assert pretrain(recipe_of(root, SPELLINGS[spelling]), "run", resume=True).steps == 4
    assert finetune(task_of(root, SPELLINGS[spelling]), "./tuned/", resume=True).steps == 2


def test_another_base_is_refused(root, runs):
    shutil.copytree(root / "base", root / "other-base")
    recipe = recipe_of(root, SPELLINGS["absolute"])
    recipe.model["base"] = str(root / "other-base")
    with pytest.raises(ConfigError, match=r"model\.base="):
        pretrain(recipe, root / "run", resume=True)


def test_the_end_of_a_run_removes_its_own_checkpoints_alone(root, tmp_path):
    """With save_total_limit=1 the best one stays; transformers would take every folder that begins like one."""
    content = tiny_finetune.tiny_content(root, root / "encoder", root / "rows", save_total_limit=1, num_train_epochs=2)
    content["training"]["learning_rate"] = 0.3  # the second epoch is no better than the first
    folder = tmp_path / "run"
    report = finetune(build_finetune_recipe(content | {"name": "first"}), folder)
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{report.best_step}"]
    for name in ("checkpoint-4-backup", "checkpoint-2-mine"):
        shutil.copytree(folder / f"checkpoint-{report.best_step}", folder / name)
    (folder / "checkpoint-4-backup" / "note.txt").write_text("mine")
    content["training"]["num_train_epochs"] = 3
    report = finetune(build_finetune_recipe(content | {"name": "first"}), folder, resume=True)
    assert report.steps == 6
    assert {path.name for path in folder.glob("checkpoint-*")} == {
        "checkpoint-4-backup",
        "checkpoint-2-mine",
        f"checkpoint-{report.best_step}",
    }
    assert (folder / "checkpoint-4-backup" / "note.txt").is_file()


@pytest.mark.parametrize("best", [False, True])
def test_a_run_killed_after_its_last_step_takes_no_other(root, tmp_path, best):
    """Its report was not written yet; the Trainer by itself would take step 5 of 4."""
    settings = {"save_total_limit": 9, "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": best}
    recipe, folder = build_recipe(tiny_content(root, max_steps=4, **settings)), tmp_path / "run"
    report = pretrain(recipe, folder)
    weights = load_file(folder / "model" / "model.safetensors")
    for name in ("report.json", "report.md"):
        (folder / name).unlink()
    shutil.rmtree(folder / "model")
    again = pretrain(recipe, folder, resume=True)
    assert again.steps == report.steps == 4
    assert again.after["loss"] == report.after["loss"]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    found = load_file(folder / "model" / "model.safetensors")
    assert all((found[name] == tensor).all() for name, tensor in weights.items())
