"""Two processes on a CPU, started the usual way, train as one does."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import tiny_finetune
from crosslayer.train import build_finetune_recipe
from crosslayer.train.finetune import finetune
from crosslayer.train.run import pretrain
from tiny_finetune import rows_of, write_decoder, write_instructions, write_rows
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

    longer = [*command, "--resume", "--max_steps", "8"]
    done = subprocess.run([*launcher, *longer], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "report.json").read_text())["steps"] == 8
    assert done.stderr.count("going on from") == 1
    done = subprocess.run([sys.executable, *longer, "--max_steps", "12"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "cannot be resumed with steps of 2 rows, they were of 4" in " ".join(done.stderr.split())


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        pytest.param("classification", "lor2c", [], marks=pytest.mark.long),
        pytest.param("regression", "lor2c", [], marks=pytest.mark.long),
        ("instruction", "lor2c", []),
        pytest.param("instruction", "lor2c", ["--fsdp_size", "-1"], marks=pytest.mark.long),
        pytest.param("instruction", "sharelor2c", ["--fsdp_size", "2"], marks=pytest.mark.long),
        ("instruction", "imlor2c", ["--fsdp_size", "2"]),
    ],
    ids=["classification", "regression", "instruction", "sharded", "sharded_share", "sharded_im"],
)
def test_two_processes_fine_tune_as_one_does(tmp_path, kind, method, options):
    """22 rows: in the last step accelerate gives the second process rows that it repeats, which must not count."""
    data = tmp_path / "data"
    for part, count in (("train", 22), ("validation", 11)):
        if kind == "instruction":
            write_instructions(data / f"{part}.jsonl", count)
        else:
            write_rows(data / f"{part}.jsonl", rows_of(count, len(part)))
    model = write_decoder(tmp_path / "decoder", "llama" if method == "imlor2c" else "crnet")  # without dropout
    training = {"train_sampling_strategy": "sequential", "num_train_epochs": 1, "logging_steps": 1}
    content = tiny_finetune.tiny_content(tmp_path, model, data, task=kind, **training)
    content["adapter"] |= {"method": method, "dropout": 0.0}
    if method == "sharelor2c":  # one A of a block, one of several
        content["adapter"]["share_A"] = [0, 1]
    if method == "imlor2c":  # changes after the first step and the second
        content["adapter"] |= {"interval": 1, "interval_unit": "steps", "max_fuses": 1, "max_injections": 1}
    content["data"] |= {"max_length": 96, "cache_dir": str(tmp_path / "cache")}
    if kind == "regression":
        content["data"]["label_column"] = "score"
    one = finetune(build_finetune_recipe(content), tmp_path / "one")
    content["training"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    content["training"]["per_device_eval_batch_size"] = 4
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "crosslayer", "finetune", "--recipe", str(recipe), "--output_dir", str(tmp_path / "two")]
    done = subprocess.run([*launcher, *command, *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert [change["action"] for change in two["structure"]] == [change["action"] for change in one.structure]
    assert len(two["structure"]) == (2 if method == "imlor2c" else 0)
    assert two["before"]["eval_loss"] == pytest.approx(one.before["eval_loss"], rel=1e-5)
    assert two["after"]["eval_loss"] == pytest.approx(one.after["eval_loss"], rel=1e-3)
    for name in ("loss", "grad_norm"):
        of_one, of_two = ([line[name] for line in run if name in line] for run in (one.history, two["history"]))
        assert len(of_one) == 3
        assert of_two == pytest.approx(of_one, rel=2e-3)
