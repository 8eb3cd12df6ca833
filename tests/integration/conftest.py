"""What the tests of scripts share."""

import importlib
import sys

import pytest
import torch

from benchmark_scripts import BENCHMARKS


@pytest.fixture
def script(monkeypatch):
    """script("gpu") -> the module benchmarks/gpu.py, freshly imported."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield load
    torch.set_num_threads(threads)
