"""docs/options.md is what docs/make_options.py makes of the docstrings; none is missing."""

import dataclasses
import importlib.util
import inspect
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import pytest
import typer
from test_cli import run  # noqa: F401  a fixture

from crosslayer.crnet.families import FAMILIES, config_class
from crosslayer.data import DataConfig, TaskConfig
from crosslayer.lor2c import LoR2CConfig
from crosslayer.train.methods import AdapterConfig
from crosslayer.train.monitor import Monitor
from crosslayer.train.parameter_groups import ParameterGroups

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs" / "make_options.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_page_is_up_to_date(script):
    wanted = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package in ("transformers", "peft"):
        if metadata.version(package) != wanted[package]:
            pytest.skip(f"the page has the fields of {package} {wanted[package]}")
    assert script.page() == PAGE, "run: python docs/make_options.py"


@pytest.mark.parametrize(
    "cls", [DataConfig, TaskConfig, AdapterConfig, ParameterGroups, Monitor, LoR2CConfig, *map(config_class, FAMILIES)]
)
def test_every_field_is_on_the_page(cls):
    named = set(re.findall(r"`(\w+)", PAGE))
    assert {field.name for field in dataclasses.fields(cls)} - named <= {"transformers_version"}


VERBS = "analyze compare evaluate finetune generate plan prepare pretrain recipes bench-memory bench-speed"


@pytest.mark.parametrize("verb", VERBS.split())
def test_every_option_is_on_the_page(run, verb):  # noqa: F811
    section = re.search(rf"^### `{verb.replace('-', ' ')}`\n(.*?)(?=^###|\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    listed = set(re.findall(r"^\| `(\S+)`", section, re.MULTILINE))
    shown = run(*verb.split("-"), "--help").out.split("Options:")[1]
    options = set(re.findall(r"^ {2,}(--[\w-]+)", shown, re.MULTILINE)) - {"--help"}
    assert options
    assert options == {name for name in listed if name.startswith("--")}


def test_a_field_without_a_docstring_is_an_error(script):
    @dataclasses.dataclass
    class Config:
        good: int = 1
        """Has one."""

        bad: int = 2

    docs = script.attribute_docs(Config)
    assert docs == {"good": "Has one."}
    with pytest.raises(LookupError, match=r"Config.bad has no docstring"):
        script.rows_of(Config, docs)

    def verb(option: Annotated[int, typer.Option()] = 1) -> None: ...

    with pytest.raises(LookupError, match="verb option has no help"):
        script.option_row("verb option", inspect.signature(verb).parameters["option"])
