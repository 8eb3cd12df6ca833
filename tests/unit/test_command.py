"""The command itself: version, help, completion; recipes by name; progress in files and pipes."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from test_cli import refused, run, write_recipe  # noqa: F401  run is a fixture

from crosslayer import __version__
from crosslayer.errors import ConfigError
from crosslayer.recipes import FOLDER, nearest_recipe, recipe_path, shipped_recipes
from crosslayer.train import load_recipe


def test_version(run):  # noqa: F811
    result = run("--version")
    assert (result.code, result.out) == (0, f"crosslayer {__version__}\n")


@pytest.mark.parametrize("group", [(), ("bench",)])
def test_without_arguments_it_helps(run, group):  # noqa: F811
    result = run(*group)
    assert result.code == 0
    assert result.err == ""
    assert result.out == run(*group, "--help").out
    assert "Commands:" in result.out


def complete(words, last):
    environment = {
        **os.environ,
        "_CROSSLAYER_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(last),
    }
    command = [sys.executable, "-m", "crosslayer"]
    return subprocess.run(command, capture_output=True, text=True, env=environment).stdout.split()


def test_shell_completion(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))  # whatever shell runs the tests
    shown = run("--show-completion", "bash")
    assert shown.code == 0
    assert "complete -o default -F _crosslayer_completion crosslayer" in shown.out
    assert complete("crosslayer ev", 1) == ["evaluate"]
    assert complete("crosslayer bench ", 2) == ["memory", "speed", "device"]
    assert complete("crosslayer pretrain --over", 2) == ["--overwrite"]
    assert complete("crosslayer bench speed --tu", 3) == ["--turns"]
    assert complete("crosslayer pretrain --recipe crnet_1m", 3) == ["crnet_1m_text"]
    assert complete("crosslayer recipes --show finetune/lor2c_l", 3) == ["finetune/lor2c_llama2_7b_alpaca"]


# Recipes by name


def test_every_recipe_is_listed_with_one_line(run):  # noqa: F811
    listed = run("recipes")
    assert listed.code == 0
    lines = dict(line.split(maxsplit=1) for line in listed.out.splitlines())
    paths = sorted(FOLDER.rglob("*.yaml"))
    assert lines.keys() == {str(path.relative_to(FOLDER).with_suffix("")) for path in paths}
    assert len(listed.out.splitlines()) == len(paths) >= 40
    assert all(10 < len(summary) < 200 for summary in lines.values())
    rows = json.loads(run("recipes", "--json").out)
    assert [row["name"] for row in rows] == list(lines)
    assert {row["verb"] for row in rows} == {"pretrain", "finetune"}


def test_one_is_printed_as_it_is(run):  # noqa: F811
    shown = run("recipes", "--show", "families/crnet_gpt2_1m_text")
    assert shown.code == 0
    assert shown.out == (FOLDER / "families" / "crnet_gpt2_1m_text.yaml").read_text()
    content = json.loads(run("recipes", "--show", "crnet_5m_text", "--json").out)
    assert content["name"] == "crnet_5m_text"
    refused(run("recipes", "--show", "crnet_5m_txt"), "'crnet_5m_txt' is no recipe", "the nearest is crnet_5m_text")


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_name_is_its_file(name):
    assert recipe_path(name) == FOLDER / f"{name}.yaml"


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("crnet_5m_txt", "crnet_5m_text"),
        ("recipes/crnet_5m_text.yaml", "crnet_5m_text"),  # where it lay until now
        ("recipes/finetune/lor2c_roberta_base_sst2.yaml", "finetune/lor2c_roberta_base_sst2"),
        ("crnet_gpt2_1m_text", "families/crnet_gpt2_1m_text"),
        ("CRNET_5M_TEXT", None),
        ("", None),
    ],
)
def test_what_is_not_there(given, near):
    assert nearest_recipe(given) == near
    with pytest.raises(ConfigError, match="does not exist") as refusal:
        recipe_path(given)
    assert near is None or f"the nearest that comes with crosslayer is {near};" in str(refusal.value)


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "compare"])
def test_verbs_name_the_nearest(run, verb):  # noqa: F811
    refused(run(verb, "--recipe", "crnet_1m_texts"), "recipe 'crnet_1m_texts' does not exist", "crnet_1m_text;")


def test_names_and_paths(tmp_path, monkeypatch):
    """A name means the same wherever one is; a file of that name needs a path."""
    monkeypatch.chdir(tmp_path)
    own = {**yaml.safe_load((FOLDER / "crnet_1m_text.yaml").read_text()), "name": "mine"}
    for path in ("crnet_1m_text", "mine.yaml"):
        (tmp_path / path).write_text(yaml.safe_dump(own))
    (tmp_path / "crnet_5m_text").mkdir()
    assert load_recipe("crnet_1m_text").name == "crnet_1m_text"
    assert load_recipe("crnet_5m_text").name == "crnet_5m_text"
    for path in ("./crnet_1m_text", "mine.yaml", tmp_path / "crnet_1m_text"):
        assert load_recipe(path).name == "mine"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe("./crnet_5m_text")


def test_a_run_by_name(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    small = ("--hidden_size", 32, "--intermediate_size", 48, "--num_hidden_layers", 2, "--rank", 8, "--use_cpu")
    data = ("--data", "texts", "--cache_dir", "cache", "--tokenizer_vocab_size", 300, "--validation_fraction", 0.2)
    result = run("pretrain", "--recipe", "crnet_1m_text", *small, *data, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["recipe"] == "crnet_1m_text"


# Progress


@pytest.mark.slow
@pytest.mark.long
def test_progress_in_a_pipe_is_plain_lines(tmp_path):
    """Of every verb that shows some; a bar is for a terminal."""
    recipe = write_recipe(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    del content["training"]["disable_tqdm"]
    recipe.write_text(yaml.safe_dump(content))

    def both(*arguments):
        command = [sys.executable, "-m", "crosslayer", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, cwd=tmp_path)  # bytes: text mode would hide \r
        assert done.returncode == 0, done.stderr.decode()
        assert b"\r" not in done.stdout + done.stderr
        assert b"\x1b" not in done.stdout + done.stderr
        return done.stderr.decode()

    lines = both("pretrain", "--recipe", recipe, "--output_dir", "run")
    assert "crosslayer: step 12/12: loss" in lines
    lines = both("evaluate", "run", "--data", "texts", "--batch_size", 4)
    assert "crosslayer: evaluating: " in lines
    assert len(lines.splitlines()) == 10
    lines = both("analyze", "run", "--data", "texts", "--max_tokens", 1024, "--output_dir", "out")
    assert "crosslayer: analyzing run: " in lines
