"""Two processes on a CPU, started the usual way, train as one does."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from crosslayer.train.run import pretrain
from tiny_run import tiny_content, tiny_recipe


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one = pretrain(tiny_recipe(tmp_path, max_steps=4), tmp_path / "one")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_content(tmp_path, max_steps=4, per_device_train_batch_size=2)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "crosslayer", "pretrain", "--recipe", str(recipe), "--output_dir", str(tmp_path / "two")]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Sample:") == 1
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["tokens"] == one.tokens
    assert report["before"]["eval_loss"] == pytest.approx(one.before["eval_loss"], rel=1e-6)
    assert report["after"]["tokens"] == one.after["tokens"]  # no row counted twice, none left out
    assert report["after"]["loss"] == pytest.approx(one.after["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_trackers(tmp_path, monkeypatch, tracker):
    if find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed (extra 'track')")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    folder = Path(os.environ["TRACKIO_DIR"]) if tracker == "trackio" else tmp_path / tracker
    before = set(folder.rglob("*"))
    pretrain(tiny_recipe(tmp_path, max_steps=2, save_steps=2, report_to=tracker), tmp_path / "run")
    files = [path for path in set(folder.rglob("*")) - before if path.is_file()]
    assert files
    if tracker == "tensorboard":
        assert len(files) == 1  # one run, not a second one for the last evaluation
