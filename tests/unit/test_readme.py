"""README.md and docs/*.md: the README's Python runs as it stands; commands, recipes and links are right."""

import functools
import inspect
import re
import shlex
import sys

import pytest
import yaml

from crosslayer.cli.app import app
from crosslayer.cli.common import parse_overrides
from crosslayer.cli.ranges import checked
from crosslayer.recipes import nearest_recipe, shipped_recipes
from crosslayer.train import build_finetune_recipe, build_recipe, load_finetune_recipe, load_recipe
from examples import PAGES, ROOT, blocks, command_lines

README = PAGES["README.md"]


@pytest.mark.parametrize("name", [name for name in blocks("python") if name.startswith("README.md")])
def test_python_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[name], name, "exec"), {})
    assert capsys.readouterr().out.strip()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w[\w-]*)", README, re.MULTILINE)
    assert {"pretrain", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture
def parse(monkeypatch):
    """A function that reads a command as far as its verb would: options, ranges, fields of the recipe."""

    def stub(verb):
        verb = inspect.unwrap(verb)

        @functools.wraps(verb)
        def stop(**given):
            if "recipe" not in given or "context" not in given:
                return
            overrides = parse_overrides(given["context"].args)
            of_task = verb.__name__ == "finetune"
            if given["recipe"]:
                (load_finetune_recipe if of_task else load_recipe)(given["recipe"], overrides)
            else:
                named = {name: given[name] for name in ("model", "task", "data", "method") if given[name]}
                build_finetune_recipe({"name": "finetune"}, named | overrides)

        return checked(stop)

    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    for command in (command for group in groups for command in group.registered_commands):
        monkeypatch.setattr(command, "callback", stub(command.callback))

    def call(arguments):
        monkeypatch.setattr(sys, "argv", ["crosslayer", *arguments])
        return app(arguments, standalone_mode=False)

    return call


COMMANDS = [line.partition("crosslayer ")[2] for line in command_lines() if "crosslayer " in line]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(parse, line):
    assert parse(shlex.split(line.partition(" > ")[0])) in (None, 0)


def test_a_wrong_command_is_not(parse):
    for line in ("recipes --list", "pretrain --recipe crnet_5m_text --max_stps 3", "plan --model llama_7b --gpus 0"):
        with pytest.raises(Exception, match=r"list|max_stps|gpus"):
            parse(shlex.split(line))


@pytest.mark.parametrize("name", blocks("yaml"))
def test_recipes_are_understood(name):
    build_recipe(yaml.safe_load(blocks("yaml")[name]))


def test_recipes_go_by_names():
    """None by the path that it had before, and none that is not there."""
    shipped = shipped_recipes()
    for page, text in PAGES.items():
        assert not re.findall(r"(?<!crosslayer/)recipes/[\w/.]*\w\.yaml", text), page
        for name in re.findall(r"--(?:recipe|show) ([\w/.]+)", text):
            assert name in (*shipped, "NAME") or name.endswith(".yaml"), (page, name, nearest_recipe(name))
