"""Values that make no sense are refused with the recipe's other problems, before anything exists."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments

from crosslayer import CRNetConfig
from crosslayer.errors import ConfigError
from crosslayer.recipes import FOLDER
from crosslayer.train import build_recipe
from crosslayer.train.finetune import finetune
from crosslayer.train.ranges import MODEL, PRETRAINING, TRAINING
from crosslayer.train.recipe import build_finetune_recipe, load_recipe
from crosslayer.train.run import pretrain
from tiny_finetune import tiny_recipe as finetune_recipe
from tiny_finetune import write_encoder, write_task
from tiny_run import tiny_content

WRONG = [
    *[("training", name, value) for name in ("learning_rate", "adam_epsilon") for value in (-1, 0, float("nan"))],
    *[("training", name, value) for name in ("logging_steps", "save_steps", "eval_steps") for value in (-1, 0, 1.5)],
    *[("training", name, value) for name in ("weight_decay", "max_grad_norm") for value in (-1, float("inf"))],
    *[("training", name, value) for name in ("adam_beta1", "label_smoothing_factor") for value in (-0.1, 1, 2)],
    ("training", "parallelism_config", {"tp_size": 2}),
    *[("training", name, value) for name in ("per_device_eval_batch_size", "save_total_limit") for value in (-1, 0)],
    *[("training", "max_steps", value) for value in (-5, 0)],
    *[("training", "warmup_steps", value) for value in (-1, 1e9, 1.5)],
    ("training", "num_train_epochs", 0),
    ("training", "seed", -1),
    ("training", "dataloader_num_workers", -1),
    ("training", "bf16_full_eval", True),
    ("training", "prediction_loss_only", True),
    ("training", "batch_eval_metrics", True),
    ("training", "auto_find_batch_size", True),
    ("training", "use_liger_kernel", True),
    ("training", "include_num_input_tokens_seen", "no"),
    ("training", "label_names", ["targets"]),
    ("training", "accelerator_config", {"split_batches": True}),
    ("model", "attention_dropout", 2),
    ("model", "num_hidden_layers", 0),
    ("model", "hidden_size", -8),
    ("model", "rms_norm_eps", 0),
]


@pytest.mark.parametrize(("section", "name", "value"), WRONG)
def test_refused_with_the_recipe(tmp_path, section, name, value):
    content = tiny_content(tmp_path)
    content[section][name] = value
    with pytest.raises(ConfigError, match=rf"{section}\.{name}=.*"):
        build_recipe(content)


def test_all_problems_together(tmp_path):
    content = tiny_content(tmp_path, learning_rate=0, save_steps=-1)
    with pytest.raises(ConfigError, match=r"learning_rate=0.*save_steps=-1"):
        build_recipe(content)


@pytest.mark.parametrize("name", ["../../escape", "..", ".", "", " ", "a/b", "a\\b", "a\nb", "x" * 300])
def test_a_name_stays_within_the_runs_folder(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be a folder's"):
        build_recipe({**tiny_content(tmp_path), "name": name})
    with pytest.raises(ConfigError, match="cannot be a folder's"):
        build_recipe(tiny_content(tmp_path), {"name": name})


@pytest.mark.parametrize("path", sorted(FOLDER.glob("crnet_*.yaml")), ids=lambda path: path.name)
def test_our_recipes_are_within_the_ranges(path):
    load_recipe(path)
    load_recipe(path, {"max_steps": 3})  # a short trial, though it ends while it warms up


def test_another_schedule_drops_the_settings_of_the_recipes_own():
    recipe = load_recipe("crnet_1m_text", {"lr_scheduler_type": "linear"})
    assert "lr_scheduler_kwargs" not in recipe.training
    kwargs = {"min_lr_rate": 0.2}
    both = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    assert load_recipe("crnet_1m_text", both).training["lr_scheduler_kwargs"] == kwargs


def test_the_tables_name_fields_that_there_are():
    assert {*TRAINING, *PRETRAINING} <= {field.name for field in fields(TrainingArguments)}
    of_transformers = {"attribute_map"}
    of_recipes = {"base", "attn_implementation"}
    assert set(MODEL) - of_transformers - of_recipes <= {field.name for field in fields(CRNetConfig)}


def test_every_number_is_in_a_table_or_known_not_to_be():
    """A new release of transformers may bring fields: each is given a range here, or a reason."""
    numbers = {field.name for field in fields(TrainingArguments) if type(field.default) in (int, float)}
    elsewhere = {"per_device_train_batch_size", "gradient_accumulation_steps", "local_rank"}
    assert numbers - {*TRAINING, *PRETRAINING} == elsewhere


LATE = [
    ({"optim": "galore_adamw"}, "training"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "training"),
    ({"report_to": "nobody"}, "nobody"),
    ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "min_lr_rate"),
    ({"metric_for_best_model": "accuracy"}, "metric_for_best_model='accuracy' is none"),
]


@pytest.mark.parametrize(("training", "message"), LATE)
def test_what_only_libraries_know_is_refused_before_anything_is_written(tmp_path, training, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(build_recipe(tiny_content(tmp_path, **training)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranges")
    return root, write_encoder(root / "encoder"), write_task(root / "sst2")


@pytest.mark.parametrize(("training", "message"), LATE)
def test_the_same_in_fine_tuning(task, tmp_path, training, message):
    if "metric_for_best_model" in training:
        training, message = {"metric_for_best_model": "perplexity"}, "metric_for_best_model='perplexity' is none"
    with pytest.raises(ConfigError, match=message):
        finetune(finetune_recipe(*task, **training), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scores_cannot_be_smoothed(task, tmp_path):
    recipe = finetune_recipe(*task, task="regression", label_smoothing_factor=0.1)
    recipe.data.label_column = "score"
    with pytest.raises(ConfigError, match=r"label_smoothing_factor=0.1 smooths classes"):
        finetune(recipe, tmp_path / "run")


def test_the_report_is_of_the_weights_that_are_kept(tmp_path):
    """The best checkpoint by bits per byte, which a small number is good for; a high rate ruins the later ones."""
    training = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "bits_per_byte",
        "learning_rate": 3.0,
        "lr_scheduler_type": "linear",
        "warmup_steps": 11,
        "eval_steps": 4,
    }
    report = pretrain(build_recipe(tiny_content(tmp_path, **training)), tmp_path / "run")
    losses = [line["eval_loss"] for line in report.history if "eval_loss" in line][:-1]
    assert losses[-1] > min(losses)
    assert report.after["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("modules", [True, 3, {"a": 1}, [], [""], ""])
def test_modules_are_named_by_texts(modules):
    with pytest.raises(ConfigError, match=r"target_modules=.* must be names of"):
        build_finetune_recipe({"model": "m", "adapter": {"target_modules": modules}}, {"task": "sst2"})
