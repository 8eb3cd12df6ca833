"""docs/reliability.md: its commands select tests that there are, as many as it says or more."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (?!kind|what|-)(.+?) \| (.+?) \| .+? \| `(.+)` \|$", PAGE, re.M)


def decorators_of(file: Path) -> dict[str, list[str]]:
    """Name of a test -> its decorators, as they are written."""
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {f.name: [ast.unparse(d) for d in f.decorator_list] for f in functions if f.name.startswith("test_")}


@pytest.fixture(scope="module")
def collected():
    """{"unit/test_x.py::test_y": cases} of all that the page names."""
    files = sorted({part.partition("::")[0] for _, _, command in ROWS for part in command.split() if ".py" in part})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run([*command, *(f"tests/{file}" for file in files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    names = re.findall(r"^tests/([^\s\[]+?::\w+)", done.stdout, re.M)
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize(("kind", "cases", "command"), ROWS, ids=[row[0][:30] for row in ROWS])
def test_a_row(collected, kind, cases, command):
    if command.startswith("make "):
        assert re.search(rf"^{command.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.M)
        return
    selected = {
        name: count
        for part in command.split()
        for name, count in collected.items()
        if name == part or name.startswith(f"{part}::")
    }
    assert all(any(name == part or name.startswith(f"{part}::") for name in selected) for part in command.split())
    number = int(re.match(r"[\d,]+", cases)[0].replace(",", ""))
    if "drawn" in cases:
        decorators = {
            name: decorators_of(ROOT / "tests" / name.partition("::")[0])[name.partition("::")[2]] for name in selected
        }
        drawn = {name: next(d for d in found if "cases(" in d or d == "FAST") for name, found in decorators.items()}
        of_each = {name: 150 if d == "FAST" else int(d.partition("(")[2][:-1]) for name, d in drawn.items()}
        assert 0 < number <= sum(of_each[name] * selected[name] for name in selected)
    elif "kill" not in cases:
        assert 0 < number <= sum(selected.values())


def test_every_row_is_read():
    assert len(ROWS) == sum(line.startswith("| ") for line in PAGE.splitlines()) - PAGE.count("\n|---|")
