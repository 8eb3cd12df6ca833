"""Recipes to fine-tune: the shipped ones against the paper's settings, overrides and refusals."""

import pytest

from crosslayer.data.tasks import GLUE, Task
from crosslayer.errors import ConfigError
from crosslayer.recipes import FOLDER
from crosslayer.train import build_finetune_recipe, load_finetune_recipe, load_recipe
from crosslayer.train.finetune import build_arguments

FINETUNE = FOLDER / "finetune"
RECIPES = sorted(FINETUNE.glob("*.yaml"))

# Epochs, batch, longest input, learning rate of LoR2C's published GLUE script (arXiv 2503.00572).
PUBLISHED = {
    "mnli": (30, 128, 256, 5e-4),
    "mrpc": (30, 64, 256, 4e-4),
    "qnli": (30, 64, 256, 4e-4),
    "qqp": (30, 32, 256, 4e-4),
    "rte": (80, 32, 512, 4e-4),
    "sst2": (60, 32, 256, 5e-4),
    "stsb": (40, 32, 256, 4e-4),
    "cola": (30, 16, 256, 4e-4),
}
CONTENT = {"name": "x", "model": "somewhere", "data": {"task": "sst2"}, "adapter": {"method": "lora"}}


def task_of(recipe):
    """As much of a task as the arguments need."""
    glue = GLUE.get(recipe.data.task)
    kind = "instruction" if glue is None else "classification" if glue.labels else "regression"
    return Task(recipe.data.task, kind, "", None, None, (), glue.metrics if glue else ("loss",))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_builds(path, tmp_path):
    recipe = load_finetune_recipe(path, {"use_cpu": True})
    assert recipe.name == path.stem
    arguments = build_arguments(recipe, task_of(recipe), tmp_path)
    assert arguments.load_best_model_at_end
    assert arguments.metric_for_best_model.removeprefix("eval_") == task_of(recipe).metrics[0]
    recipe.save(tmp_path / "again.yaml")
    assert load_finetune_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("task", PUBLISHED)
def test_glue_recipes_are_the_papers(task):
    recipe = load_finetune_recipe(FINETUNE / f"lor2c_roberta_base_{task}.yaml")
    training = recipe.training
    found = (
        training["num_train_epochs"],
        training["per_device_train_batch_size"],
        recipe.data.max_length,
        training["learning_rate"],
    )
    assert found == PUBLISHED[task]
    assert (recipe.adapter.r, recipe.adapter.alpha, recipe.adapter.dropout) == (8, 16, 0.1)
    assert recipe.adapter.head_lr_factor == 0.5
    assert (training["seed"], training["warmup_steps"]) == (17, 0.06)


def test_instruction_recipe_is_the_papers():
    recipe = load_finetune_recipe(FINETUNE / "lor2c_llama2_7b_alpaca.yaml")
    training = recipe.training
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 128
    assert (training["learning_rate"], training["num_train_epochs"], training["warmup_steps"]) == (3e-4, 3, 100)
    assert (recipe.adapter.r, recipe.adapter.alpha, recipe.data.max_length) == (64, 32, 256)


def test_overrides_find_their_section():
    recipe = build_finetune_recipe(
        CONTENT, {"model": "m", "task": "glue/rte", "method": "lor2c", "r": 4, "seed": 5, "data.seed": 6}
    )
    assert (recipe.model, recipe.data.task, recipe.adapter.method, recipe.adapter.r) == ("m", "rte", "lor2c", 4)
    assert (recipe.training["seed"], recipe.data.seed) == (5, 6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": "lorac"}, "method='lorac' is none of lor2c"),
        ({"learning_rat": 1}, "learning_rat is not a field of a recipe; the nearest is learning_rate"),
        ({"r": "many"}, "adapter.r='many' is not a whole number"),
        ({"output_dir": "x"}, "training.output_dir is set by --output_dir"),
        ({"task": "colas"}, "the nearest is cola"),
    ],
)
def test_refusals(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_finetune_recipe(CONTENT, overrides)


def test_a_model_must_be_named():
    with pytest.raises(ConfigError, match="model is missing"):
        build_finetune_recipe({"data": {"task": "sst2"}})


def test_a_recipe_of_the_other_kind_is_refused():
    with pytest.raises(ConfigError, match="adapter is not a field of a recipe"):
        load_recipe(RECIPES[0])
    with pytest.raises(ConfigError, match="parameter_groups is not a field of a recipe"):
        load_finetune_recipe(FOLDER / "crnet_python_library.yaml")


def test_best_model_needs_evaluations_and_checkpoints(tmp_path):
    def built(**training):
        recipe = build_finetune_recipe({**CONTENT, "training": {"use_cpu": True, **training}})
        return build_arguments(recipe, task_of(recipe), tmp_path)

    assert not built(eval_strategy="no").load_best_model_at_end
    by_steps = built(eval_strategy="steps", eval_steps=40)
    assert (by_steps.save_strategy, by_steps.save_steps, by_steps.load_best_model_at_end) == ("steps", 40, True)
