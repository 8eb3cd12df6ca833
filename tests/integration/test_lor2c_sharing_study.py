"""benchmarks/lor2c_sharing.py: its contenders are equal in size, its runs resumed, its table is theirs."""

import json
import sys

import pytest

from crosslayer.accounting import lor2c_parameters
from crosslayer.lor2c import LoR2CConfig
from lor2c_cases import base_model, with_lor2c


@pytest.fixture
def study(script):
    return script("lor2c_sharing")


def test_contenders_are_equal_in_size(study):
    counts = {
        groups: lor2c_parameters(384, study.BLOCKS, rank, study.EQUAL.get(groups, False))
        for groups, rank in study.RANKS.items()
    }
    assert {counts[groups] for groups in (0, 2, 3)} == {72 * 384}
    assert counts[1] == 70 * 384
    assert study.cuts(2) == [[0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]
    for groups, starts in study.EQUAL.items():
        assert starts in study.cuts(groups)
        assert LoR2CConfig(share_A=starts).group_starts == starts


def test_contenders(study):
    found = study.contenders({"2": [0, 5], "3": [0, 1, 2]}, "sst2")
    assert found["two groups, by spectra"] == [0, 5]
    assert found["three groups, of equal length"] == [0, 2, 4]
    assert found["three groups, at random"] not in ([0, 1, 2], [0, 2, 4])
    assert sorted(starts for starts in found.values() if starts and len(starts) == 2) == study.cuts(2)
    assert len(study.contenders({"2": [0, 3], "3": [0, 2, 4]}, "mrpc")) == 7


def test_resumed_and_shown(study, tmp_path, monkeypatch, capsys):
    """Training is made up here: the better, the earlier the second group begins."""
    made = []

    def measure(key, adapter, model, glue, work):
        made.append((key, adapter))
        if len(made) == 40:
            raise KeyboardInterrupt
        starts = adapter["share_A"] or [0]
        found = {"metrics": {"accuracy": 0.9 - 0.1 * starts[-1]}, "trained": {"adapter": adapter["r"]}}
        trained = with_lor2c(base_model("llama"), r=4) if adapter["r"] == study.PROBE_RANK else None
        return {**key, **found}, trained

    monkeypatch.setattr(study, "measure", measure)
    monkeypatch.setattr(study, "BLOCKS", 3)
    monkeypatch.setattr(study, "EQUAL", {1: [0], 2: [0, 2], 3: [0, 1, 2]})
    monkeypatch.setattr(study.random.Random, "choice", lambda self, options: [0, 1, 2])
    command = ["--glue", str(tmp_path), "--model", str(tmp_path), "--out", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", ["lor2c_sharing.py", *command])
    with pytest.raises(KeyboardInterrupt):
        study.main()
    assert len(json.loads((tmp_path / "r.json").read_text())["sections"]) == 39
    study.main()
    sections = json.loads((tmp_path / "r.json").read_text())["sections"]
    assert len(made) == len(sections) + 1
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    tuned = {key["learning_rate"] for key, _ in made}
    assert tuned == set(study.ADAPTER_RATES)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {line.split(" | ")[0].strip("| "): line for line in table}
    assert "| 90.0 ± 0.0 | - |" in rows["none shared"]
    assert "| 70.0 ± 0.0 | 0, 2 |" in rows["two groups, of equal length"]
    before = len(made)
    monkeypatch.setattr(sys, "argv", ["lor2c_sharing.py", *command, "--table"])
    study.main()
    assert len(made) == before
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table
