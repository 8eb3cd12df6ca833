"""docs/accounting.md shows what its script computes, and its Python runs."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "accounting.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("accounting_tables", ROOT / "benchmarks" / "accounting.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_up_to_date(script):
    assert script.filled(PAGE) == PAGE, "run: python benchmarks/accounting.py --write"


def test_a_missing_place_is_an_error(script):
    with pytest.raises(SystemExit, match="no place for the table"):
        script.filled(PAGE.replace("<!-- table: peak -->", ""))


def test_python_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "accounting.md", "exec"), {})
    assert capsys.readouterr().out.startswith("1704")


def test_what_the_text_says_about_the_study(script):
    """The figures in words, from the same arithmetic."""
    operations = {
        name: script.count_operations(*pair[:1], 8192, pair[1]) for name, pair in script.study_methods().items()
    }
    again = sum(operations["CR-Net, invert"].recompute[part] for part in ("layers", "attention"))
    whole = sum(operations["dense, checkpointing"].forward[part] for part in ("layers", "attention"))
    assert round(again / whole, 3) == 0.327
    assert again * 16 * 8192 / 0.692e15 == pytest.approx(1.07, abs=0.01)
    assert whole * 16 * 8192 * 30 / 32 == pytest.approx(2.12e15, rel=0.001)
    stored = (32 * 4096 + 31 * 7 * 512 + 4 * (5 * 4096 + 2 * 11008)) / 32
    assert round(stored / (6 * 4096 + 2 * 11008), 3) == 0.276
    assert round(23.35e9 / (2 * 32 * 16 * stored)) == 1770
    assert round(stored / 0.456 / 4096, 1) == 6.9
