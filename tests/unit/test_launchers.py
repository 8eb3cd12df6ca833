"""Launchers hand our options on: their own parsers leave everything after the module's name alone."""

import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from crosslayer.cli import compare, finetune, main, pretrain
from crosslayer.cli.common import parse_overrides
from crosslayer.train import build_finetune_recipe
from crosslayer.train.recipe import FinetuneRecipe, Recipe, field_types

PARSERS = {"torchrun": get_args_parser, "accelerate launch": launch_command_parser}
VERBS = {"pretrain": pretrain.pretrain, "finetune": finetune.finetune, "compare": compare.compare}
KINDS = {"pretrain": Recipe, "finetune": FinetuneRecipe, "compare": Recipe}
TAKEN = {("torchrun", "finetune", "r"): "rank"}
"""What a launcher takes for its own -> how to write it instead."""


def handed_on(launcher, verb, *options):
    """What reaches the verb, None where the launcher refuses the command."""
    try:
        return PARSERS[launcher]().parse_args(["-m", "crosslayer", verb, *options]).training_script_args
    except SystemExit:
        return None


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("launcher", PARSERS)
def test_every_option_is_handed_on(launcher, verb, capsys):
    own = [name for name in inspect.signature(VERBS[verb]).parameters if name != "context"]
    fields = [(section, name) for section in KINDS[verb].SECTIONS for name in field_types(KINDS[verb], section)]
    names = {*own, *(name for _, name in fields), *(".".join(field) for field in fields), *KINDS[verb].SPELLINGS}
    parser = PARSERS[launcher]()
    refused = set()
    for name in names:
        for option in ([f"--{name}", "1"], [f"--{name}=1"], [f"--{name.replace('_', '-')}"]):
            try:
                given = parser.parse_args(["-m", "crosslayer", verb, *option]).training_script_args
            except SystemExit:
                refused.add(name)
            else:
                assert given == [verb, *option]
    assert refused <= {name for where, of, name in TAKEN if (where, of) == (launcher, verb)}


def test_what_is_taken_has_another_name():
    for (launcher, verb, name), other in TAKEN.items():
        assert handed_on(launcher, verb, f"--{other}", "8") == [verb, f"--{other}", "8"]
        assert KINDS[verb].SPELLINGS[other] == name


def test_the_other_name_is_the_same_field():
    for option in ("--rank", "--adapter.rank", "--r"):
        recipe = build_finetune_recipe({"name": "x", "model": "m"}, parse_overrides(["--task=sst2", option, "3"]))
        assert recipe.adapter.r == 3


def test_both_names_at_once_are_refused(monkeypatch, capsys):
    given = ["--model", "some/model", "--task", "sst2", "--dry-run", "--r", "2", "--rank", "3"]
    monkeypatch.setattr(sys, "argv", ["crosslayer", "finetune", *given])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "crosslayer: error: rank and r are one field; give one of them\n"


def test_commands_of_the_docs_pass_their_launchers():
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *root.glob("docs/*.md")]
    lines = [
        line
        for page in pages
        for line in re.findall(r"^ *((?:torchrun|accelerate launch) .*)$", page.read_text(), re.M)
    ]
    assert len(lines) >= 3
    for line in lines:
        launcher = next(name for name in PARSERS if line.startswith(name))
        arguments = shlex.split(line)[len(launcher.split()) :]
        parsed = PARSERS[launcher]().parse_args(arguments)
        assert parsed.training_script == "crosslayer"
        assert parsed.training_script_args == arguments[arguments.index("crosslayer") + 1 :]
