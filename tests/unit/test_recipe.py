"""Recipes: reading, overriding, and the wording of every refusal; the recipes that are shipped."""

import pytest
import torch
import yaml

from crosslayer.accounting import count_parameters
from crosslayer.cli.common import parse_overrides
from crosslayer.crnet import CRNetForCausalLM
from crosslayer.errors import ConfigError
from crosslayer.recipes import FOLDER
from crosslayer.train import build_recipe, load_recipe
from crosslayer.train.run import build_arguments, build_model_config
from crosslayer.train.values import parse_value

RECIPES = sorted(FOLDER.glob("*.yaml"))

# Millions of parameters: the field's table (GaLore's and CoLA's configurations), CR-Net's by its own formula.
PUBLISHED = {
    "dense_60m_c4": 58.07,
    "dense_130m_c4": 134.11,
    "dense_350m_c4": 367.97,
    "dense_1b_c4": 1339.08,
    "dense_7b_c4": 6738.42,
    "dense_13b_c4": 13015.86,
    "cola_60m_c4": 42.77,
    "cola_130m_c4": 94.00,
    "cola_350m_c4": 185.22,
    "cola_1b_c4": 609.31,
    "cola_7b_c4": 2820.94,
    "cola_13b_c4": 5335.05,
    "crnet_60m_c4": 42.50,
    "crnet_130m_c4": 92.20,
    "crnet_350m_c4": 178.51,
    "crnet_1b_c4": 582.44,
    "crnet_7b_c4": 2788.45,
}
QUARTER_RANK = {"60m": 44.68, "130m": 87.07, "350m": 192.84, "1b": 639.72, "7b": 2943.36, "13b": 5527.07}
ABOUT = {"crnet_1m_text": 1.0, "crnet_5m_text": 5.0, "crnet_20m_text": 20.0}


def config_of(recipe):
    if "vocab_size" not in recipe.model:
        recipe.model["vocab_size"] = recipe.data.tokenizer_vocab_size
    return build_model_config(recipe)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_builds_and_counts(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    config = config_of(recipe)
    build_arguments(recipe, tmp_path)
    with torch.device("meta"):
        model = CRNetForCausalLM(config)
    parameters = model.num_parameters()
    assert parameters == sum(count_parameters(config).values())
    if recipe.name in PUBLISHED:
        assert round(parameters / 1e6, 2) == PUBLISHED[recipe.name]
    if recipe.name in ABOUT:
        assert parameters / 1e6 == pytest.approx(ABOUT[recipe.name], rel=0.15)


@pytest.mark.parametrize("size", QUARTER_RANK)
def test_default_rank_counts(size):
    recipe = load_recipe(RECIPES[0].parent / f"crnet_{size}_c4.yaml", {"rank": None})
    assert round(sum(count_parameters(config_of(recipe)).values()) / 1e6, 2) == QUARTER_RANK[size]


def test_every_published_count_has_its_recipe():
    assert set(PUBLISHED) <= {path.stem for path in RECIPES}


def test_c4_recipes_follow_the_protocol():
    for path in RECIPES:
        if not path.stem.endswith("_c4"):
            continue
        recipe = load_recipe(path)
        training = recipe.training
        assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 512
        assert recipe.data.block_size == 256
        assert training["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
        groups = recipe.parameter_groups
        assert groups.full_rank_lr_factor == groups.low_rank_lr_factor == groups.beta_lr_factor == 1.0
        assert "increment_activation" not in recipe.model


def test_overrides_find_their_section():
    recipe = build_recipe(
        {"name": "x", "model": {"rank": 8}, "training": {"seed": 1}},
        {"rank": 4, "seed": 7, "data.seed": 9, "block_size": 64, "full_rank_lr_factor": 1, "name": "y"},
    )
    assert recipe.model["rank"] == 4
    assert recipe.training["seed"] == 7
    assert recipe.data.seed == 9
    assert recipe.data.block_size == 64
    assert recipe.parameter_groups.full_rank_lr_factor == 1.0
    assert recipe.name == "y"


def test_round_trip(tmp_path):
    recipe = load_recipe(RECIPES[0])
    recipe.save(tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("2.5E4", 2.5e4), ("true", True), ("null", None), ("[1, 2]", [1, 2]), ("a:b: c", "a:b: c")],
)
def test_values_of_the_command_line(text, value):
    assert parse_value(text) == value


WRITTEN = """
name: 007
description: no
data: {data: 2024, text_column: yes, tokenizer: off, validation_data: null}
training: {eval_strategy: no, save_strategy: no, max_steps: 0x10, use_cpu: yes, report_to: [no, 1], run_name: 1e3}
model: {rank_pattern: {1: 4}}
"""


def test_what_a_field_calls_text_stays_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(WRITTEN)
    options = ["--name", "007", "--description", "no", "--data", "2024", "--text_column", "yes", "--tokenizer", "off"]
    options += ["--validation_data", "null", "--eval_strategy", "no", "--save_strategy=no", "--max_steps", "0x10"]
    options += ["--use_cpu", "yes", "--report_to", "[no, 1]", "--run_name", "1e3", "--rank_pattern", "{1: 4}"]
    for recipe in (load_recipe(path), build_recipe({}, parse_overrides(options))):
        assert (recipe.name, recipe.description) == ("007", "no")
        data, training = recipe.data, recipe.training
        assert (data.data, data.text_column, data.tokenizer, data.validation_data) == ("2024", "yes", "off", None)
        assert (training["eval_strategy"], training["save_strategy"], training["run_name"]) == ("no", "no", "1e3")
        assert (training["max_steps"], training["use_cpu"], training["report_to"]) == (16, True, ["no", "1"])
        assert recipe.model["rank_pattern"] == {"1": 4}
        arguments = build_arguments(build_recipe({"name": "x"}, {"eval_strategy": "no"}), tmp_path)
        assert arguments.eval_strategy.value == "no"


@pytest.mark.parametrize("text", ["#1", "# a", "- a", "a: b", "[1].txt", "*.txt", "'", "2024-99-99", " x ", "0b", ".5"])
def test_a_path_after_an_option_is_taken_as_it_is(text):
    recipe = build_recipe({}, parse_overrides(["--data", text, "--tokenizer", text, "--validation_data", text]))
    assert (recipe.data.data, recipe.data.tokenizer, recipe.data.validation_data) == (text,) * 3


@pytest.mark.parametrize("name", ["../../escape", "/tmp/x", "a/b", "..", ".", "", "a\\b", "a\nb", "a" * 300])
def test_a_name_stays_below_the_runs_folder(name):
    with pytest.raises(ConfigError, match="cannot be a folder's; give a short name"):
        build_recipe({}, {"name": name})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_documents", "#1"], "max_documents='#1' is not a whole number or null"),
        (["--max_steps", "no"], "max_steps=False is not a whole number"),
        (["--tokenizer", ""], "tokenizer='' must be a text that is not empty"),
        (["--text_column="], "text_column='' must be a text that is not empty"),
        (["--split", "foo"], "split='foo' is for hub datasets, not data='python-library'; leave it out"),
        (["--validation_split", "foo"], "validation_split='foo' is for hub datasets, not validation_data=None"),
        (["--data.seed", "-1"], "seed=-1 must be a whole number of at least 0"),
        (["--block_size", "99999999999"], "block_size=99999999999 must be a whole number from 2 to 16777216"),
    ],
)
def test_values_that_make_no_sense_after_an_option(options, message):
    with pytest.raises(ConfigError) as caught:
        build_recipe({}, parse_overrides(options))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ({"model": {"hiden_size": 8}}, {}, "model.hiden_size is not a field of a recipe; the nearest is hidden_size"),
        ({"modle": {}}, {}, "modle is not a field of a recipe; the nearest is model"),
        ({}, {"learning_rat": 1}, "learning_rat is not a field of a recipe; the nearest is learning_rate"),
        ({}, {"optimiser.rank": 1}, "optimiser.rank is not a field of a recipe; the nearest is rank"),
        ({"training": {"max_steps": "many"}}, {}, "training.max_steps='many' is not a whole number"),
        ({"data": {"block_size": 2.5}}, {}, "data.block_size=2.5 is not a whole number"),
        ({"data": {"skip_bad": "yes please"}}, {}, "data.skip_bad='yes please' is not true or false"),
        ({"training": {"output_dir": "x"}}, {}, "training.output_dir is set by --output_dir of the command"),
        ({"model": 3}, {}, "section 'model' is not a mapping"),
        ({"parameter_groups": {"beta_lr_factor": -1.0}}, {}, "beta_lr_factor=-1.0 must be a number of at least 0"),
    ],
)
def test_refusals(content, overrides, message):
    with pytest.raises(ConfigError) as caught:
        build_recipe({"name": "x", **content}, overrides)
    assert message in str(caught.value)


def test_problems_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        build_recipe({"name": "x", "model": {"hiden_size": 8}, "training": {"max_steps": "many"}}, {"blok_size": 3})
    for part in ("hiden_size", "max_steps", "blok_size"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("a: [1", "is not YAML"),
        ("- 1", "is not a mapping"),
        (b"\xff\xfe\xfa", "cannot be read"),
        ("training: {max_steps: 1, max_steps: 2}", "the key 'max_steps' stands there twice"),
        ("data: {seed: 2024-99-99}", "is not YAML"),
        ("description: &x [*x]", "is not YAML"),
        ("[" * 5000, "is not YAML"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"save_steps": 5, "logging_steps": 2}, "save_steps=5 is not a multiple of logging_steps=2"),
        ({"per_device_train_batch_size": 0}, "must be at least 1"),
        ({"lr_scheduler_type": "cosinus"}, "cosinus"),
    ],
)
def test_training_arguments_are_checked(tmp_path, training, message):
    recipe = build_recipe({"name": "x", "training": {"save_steps": 10, "logging_steps": 10, **training}})
    with pytest.raises(ConfigError, match=message):
        build_arguments(recipe, tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({"rank": 0}, "rank=0 of layers.1.q "),
        ({"rank": 99999}, "rank=99999 of layers.1.q .* saves nothing"),
        ({"vocab_size": 100}, None),
    ],
)
def test_model_is_checked(model, message):
    recipe = build_recipe({"name": "x", "model": {"hidden_size": 32, "num_attention_heads": 4, **model}})
    if message is None:
        assert build_model_config(recipe).vocab_size == 100
        return
    with pytest.raises(ConfigError, match=message):
        build_model_config(recipe)


def test_recipe_files_are_plain_yaml():
    for path in RECIPES:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert isinstance(content["training"]["learning_rate"], float), path
