"""docs/accounting.md, many-devices.md and roofline.md show what their scripts compute, and their Python runs."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "accounting.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def load():
    """load("accounting") -> the module benchmarks/accounting.py."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        before = {*sys.modules}
        yield importlib.import_module
        for name in {*sys.modules} - before & {"accounting", "scale", "roofline", "page_tables", "result_file"}:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["accounting", "scale", "roofline"])
def test_tables_are_up_to_date(load, name):
    script, filled = load(name), load("page_tables").filled
    page = script.PAGE.read_text(encoding="utf-8")
    assert filled(page, script.TABLES, script.PAGE.name) == page, f"run: python benchmarks/{name}.py --write"
    assert page.count("<!-- table: ") == len(script.TABLES), "a table that nothing makes"


def test_a_missing_place_is_an_error(load):
    with pytest.raises(SystemExit, match="no place for the table 'peak'"):
        load("page_tables").filled(PAGE.replace("<!-- table: peak -->", ""), {"peak": str}, "a page")


def test_python_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "accounting.md", "exec"), {})
    assert capsys.readouterr().out.startswith("1704")


def test_what_the_text_says_about_the_study(load):
    """The figures in words, from the same arithmetic."""
    script = load("accounting")
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


def test_what_the_text_says_about_many_devices(load):
    script = load("scale")
    shares = []
    for line in script.memory().splitlines()[2:]:
        kept = [float(cell) for cell in line.split("|")[5:8:2]]
        shares.append(kept[1] / kept[0])
    assert (round(min(shares), 2), round(max(shares), 2)) == (0.17, 0.37)
    deepest = {line.split("|")[1].strip(): line.split("|")[5].strip() for line in script.depth().splitlines()}
    assert [deepest[name] for name in ("invert", "dense", "dense, checkpointed")] == ["303", "36", "143"]
    text = " ".join(script.PAGE.read_text(encoding="utf-8").split())
    assert "holds 17 to 37 % of `none`, and 303 layers" in text
    one, two = (
        script.make_plan("llama_7b", gpus=8, sequence=4096, beside=(), tensor_parallel=n).recommended.setting
        for n in (1, 2)
    )
    assert round(2 * two.tokens_per_s / one.tokens_per_s, 1) == 1.6
    best = [script.best_of(script.planned(model, gpus)) for model in script.MODELS for gpus in script.DEVICES]
    assert {setting.tensor_parallel for setting in best if setting} == {1}
