"""One spelling for every method: the tables of all packages have the names of crosslayer/methods.py."""

import subprocess
import sys

import pytest

from crosslayer.accounting import TRAININGS
from crosslayer.bench.contenders import SETUPS
from crosslayer.compare import CONTENDERS
from crosslayer.errors import ConfigError
from crosslayer.lor2c import SETTINGS
from crosslayer.methods import FINETUNING, METHODS, PRETRAINING, RENAMED, check_method, method_problem
from crosslayer.train import AdapterConfig

TABLES = {"accounting": TRAININGS, "bench": SETUPS, "compare": CONTENDERS, "lor2c": SETTINGS}


@pytest.mark.parametrize("package", TABLES)
def test_every_table_has_these_names(package):
    assert TABLES[package].keys() <= METHODS.keys()


def test_every_name_is_somewhere():
    assert METHODS.keys() == set().union(*TABLES.values()) | {"full", "head"}
    assert not PRETRAINING.keys() & FINETUNING.keys()
    for name in FINETUNING:
        assert AdapterConfig(method=name).method == name


def test_names_of_0_1():
    assert not RENAMED.keys() & METHODS.keys()
    assert set(RENAMED.values()) <= METHODS.keys()
    with pytest.warns(FutureWarning, match="method 'im_lor2c' is called 'imlor2c' now"):
        assert check_method("im_lor2c", SETTINGS) == "imlor2c"


def test_refusals():
    assert method_problem("cola", CONTENDERS) is None
    with pytest.raises(ConfigError, match=r"method='crnit' is none of dense, crnet, .*; the nearest is crnet"):
        check_method("crnit", CONTENDERS)


def test_the_names_alone_are_light():
    code = "import sys, crosslayer.methods\n"
    code += "print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
