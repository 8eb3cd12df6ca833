"""The house rules of crnet/: how long its files are, how deep its imports go, and what a family costs.

Lines are lines of code: blank ones, comments and docstrings do not count.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

import crosslayer.crnet
from crosslayer.crnet.families import FAMILIES

FOLDER = Path(crosslayer.crnet.__file__).parent
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
NOT_CARRIED = {"families", "registration"}
MIXTURES = {"crnet_qwen3_moe", "crnet_deepseek_v3"}


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text()


def lines_of_code(name: str) -> int:
    text = text_of(name)
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documentation |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and at not in documentation for at, line in lines
    )


def imports_of(name: str) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(text_of(name))) if isinstance(node, ast.ImportFrom)]
    return [node.module for node in nodes if node.level == 1 and node.module in FILES]


@cache
def depth_of(name: str) -> int:
    return max((1 + depth_of(imported) for imported in imports_of(name)), default=0)


def files_of(stem: str) -> list[str]:
    return [f"configuration_{stem}", f"modeling_{stem}"]


def test_core_and_llama():
    of_families = {file for stem, _ in FAMILIES.values() if stem != "crnet" for file in files_of(stem)}
    core = set(FILES) - of_families - NOT_CARRIED - {"mixture", "tensor_parallel", "split_rules", "kernels"}
    assert sum(map(lines_of_code, core)) <= 1900


@pytest.mark.parametrize("stem", [stem for stem, _ in FAMILIES.values() if stem != "crnet"])
def test_a_family(stem):
    assert sum(map(lines_of_code, files_of(stem))) <= (180 if stem in MIXTURES else 120)


@pytest.mark.parametrize("name", FILES)
def test_a_file(name):
    assert len(text_of(name).splitlines()) <= 450
    assert depth_of(name) <= 5


def test_the_measures_can_fail():
    assert depth_of("modeling_crnet") == 5  # model, tape, block_gradient, product, cross_layer_linear
    assert lines_of_code("model") > 200
