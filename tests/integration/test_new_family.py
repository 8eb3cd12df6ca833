"""docs/new-family.md: its code alone makes a family, which the shared checks then hold to everything."""

import re
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

import crosslayer.crnet
import family_cases
import family_checks as checks
from crosslayer import crnet_config
from crosslayer.crnet.families import FAMILIES, model_classes
from crosslayer.crnet.registration import register
from crosslayer.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "new-family.md").read_text()
SOURCES = Path(crosslayer.crnet.__file__).parent
ROTATES_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def code_of_page() -> dict[str, str]:
    """File -> content, of every Python block on the page."""
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
    return dict(blocks)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The family, for the time of this module: its two files lie in a copy of crnet/, beside what they import."""
    folder = tmp_path_factory.mktemp("family") / "crnet"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = code_of_page()
    line = code.pop("tests/family_cases.py")
    for file, content in code.items():
        path = folder / Path(file).name
        assert not path.exists()
        path.write_text(content)
    base_type, stem, prefix = re.search(r'`"(\w+)": \("(\w+)", "(\w+)"\)` goes into `FAMILIES`', PAGE).groups()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crosslayer.crnet, "__path__", [*crosslayer.crnet.__path__, str(folder)])
        patch.setitem(FAMILIES, base_type, (stem, prefix))
        register(base_type)
        classes = vars(import_module(f"crosslayer.crnet.configuration_{stem}"))
        classes = classes | vars(import_module(f"crosslayer.crnet.modeling_{stem}"))
        row = eval(line, vars(family_cases) | {"PART_OF_A_HEAD": ROTATES_HALF})
        yield replace(row, module=SimpleNamespace(**{n: c for n, c in classes.items() if n.startswith(prefix)}))
    for name in (f"configuration_{stem}", f"modeling_{stem}"):
        del sys.modules[f"crosslayer.crnet.{name}"]


def test_the_page_is_short():
    assert len(PAGE.splitlines()) < 120
    assert list(code_of_page()) == [
        "src/crosslayer/crnet/configuration_crnet_stablelm.py",
        "src/crosslayer/crnet/modeling_crnet_stablelm.py",
        "tests/family_cases.py",
    ]


def test_dense_is_transformers(case):
    checks.check_dense_is_theirs(case)


@pytest.mark.parametrize("factorization", ["cross_layer", "cola", "low_rank", "dense"])
def test_recurrence(case, factorization):
    checks.check_recurrence(case, factorization=factorization)


@pytest.mark.parametrize("factorization", ["cross_layer", "cola"])
def test_policies(case, factorization):
    checks.check_policies(case, factorization=factorization)


def test_memory(case):
    checks.check_replay_is_none(case)
    checks.check_saved_bytes(case)


def test_generation(case):
    checks.check_caches(case)
    checks.check_left_padding(case)
    checks.check_packing(case)


def test_classifier(case):
    checks.check_classifier(case)


def test_save_and_load(case, tmp_path):
    """Through the Auto class; the folder carries the family's code and what it imports."""
    checks.check_save_and_load(case, tmp_path, AutoModelForCausalLM)
    carried = {path.name for path in tmp_path.glob("*.py")}
    assert carried >= {"modeling_crnet_stablelm.py", "configuration_crnet_stablelm.py", "model.py", "tape.py"}


def test_the_table(case):
    config = crnet_config({"model_type": "stablelm", **case.all_fields()}, rank=5)
    assert type(config) is case.cls("Config")
    assert set(model_classes("stablelm").values()) == {
        case.cls(suffix) for suffix in ("Model", "ForCausalLM", "ForSequenceClassification")
    }
    with pytest.raises(ConfigError, match=r"supported are .*, stablelm"):
        crnet_config({"model_type": "bert"})
