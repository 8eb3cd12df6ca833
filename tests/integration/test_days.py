"""Runs of days as processes: all of them leave out the same step, stop at the same one, and go on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import distributed as dist

from crosslayer.errors import RunStoppedError
from crosslayer.train import build_recipe
from crosslayer.train.run import pretrain
from crosslayer.train.trainer import PretrainTrainer
from processes import spawn
from tiny_run import tiny_content

pytestmark = pytest.mark.slow

SKIP = {"monitor": {"on_nonfinite": "skip"}}


def weights_of(run):
    return load_file(run / "model" / "model.safetensors")


def equal(weights, expected):
    return weights.keys() == expected.keys() and all((weights[n] == tensor).all() for n, tensor in expected.items())


def spoil_step_7(patch, rank):
    """The loss of one process is not a number, and spoils no gradient."""
    of_parent = PretrainTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = of_parent(self, *args, **kwargs)
        is_spoilt = self.model.training and self.state.global_step == 6 and self.args.process_index == rank
        return loss * 0 + math.nan if is_spoilt else loss

    patch.setattr(PretrainTrainer, "compute_loss", compute_loss)


def signal_in_step_5(patch, rank):
    of_parent = PretrainTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 4 and self.args.process_index == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return of_parent(self, *args, **kwargs)

    patch.setattr(PretrainTrainer, "training_step", training_step)


def as_one_of_two(rank, root):
    """A run that leaves a step out; the same, stopped on the way and gone on with."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    recipe = build_recipe({**tiny_content(root, per_device_train_batch_size=2, logging_steps=1), **SKIP})
    result = {}
    try:
        with pytest.MonkeyPatch.context() as patch:
            spoil_step_7(patch, rank=1)
            result["history"] = pretrain(recipe, root / "whole").history
            with pytest.MonkeyPatch.context() as inner:
                signal_in_step_5(inner, rank=1)
                try:
                    pretrain(recipe, root / "stopped")
                except RunStoppedError as error:
                    result["said"] = str(error)
            result["skipped"] = pretrain(recipe, root / "stopped", resume=True).skipped_steps
    except Exception:
        result["failed"] = traceback.format_exc()
    torch.save(result, root / f"result-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, what both processes say)."""
    root = tmp_path_factory.mktemp("two")
    spawn(as_one_of_two, (root,), nprocs=2)
    results = [torch.load(root / f"result-{rank}.pt") for rank in (0, 1)]
    assert not any("failed" in result for result in results), results
    return root, results


def test_a_step_that_one_process_alone_finds_wrong(two, tmp_path, monkeypatch):
    """Both leave it out, as one process does that reads all rows."""
    root, results = two
    assert [result["skipped"] for result in results] == [[7], [7]]
    spoil_step_7(monkeypatch, rank=0)
    one = pretrain(build_recipe({**tiny_content(root, logging_steps=1), **SKIP}), tmp_path / "one")
    assert one.skipped_steps == [7]
    for name in ("loss", "grad_norm"):
        of_one, of_two = ([line[name] for line in run if name in line] for run in (one.history, results[0]["history"]))
        assert len(of_one) == 11
        assert of_two == pytest.approx(of_one, rel=1e-3)


def test_processes_stop_at_one_step_and_go_on(two):
    """The second of them alone is asked to stop."""
    root, results = two
    reasons = ("asked in another process", "SIGTERM")
    for result, reason in zip(results, reasons, strict=True):
        assert result["said"].startswith(f"stopped at step 5 ({reason}); the last good checkpoint is {root}/stopped")
    assert equal(weights_of(root / "stopped"), weights_of(root / "whole"))


def test_a_signal_to_the_whole_job(tmp_path):
    """As Slurm sends it, to the processes that read the data too."""
    content = tiny_content(
        tmp_path, max_steps=60, save_steps=30, eval_steps=30, logging_steps=1, dataloader_num_workers=2
    )
    whole = pretrain(build_recipe(content), tmp_path / "whole")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "crosslayer", "pretrain", "--recipe", "recipe.yaml", "--output_dir", "run"]
    log = tmp_path / "output"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
    started = time.monotonic()
    while "step 3/" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() - started < 200, log.read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(120)
    *_, last = (said := log.read_text()).splitlines()
    assert process.returncode == 75, said
    assert "Traceback" not in said
    step = int(last.partition("stopped at step ")[2].split()[0])
    assert 3 <= step < 60
    assert f"stopped at step {step} (SIGTERM); the last good checkpoint is run/checkpoint-{step}" in last
    assert last.endswith("to go on: crosslayer pretrain --recipe recipe.yaml --output_dir run --resume")
    resumed = pretrain(build_recipe(content), tmp_path / "run", resume=True)
    for name in ("loss", "eval_loss"):
        of_run, of_whole = ([line[name] for line in run.history if name in line] for run in (resumed, whole))
        assert json.dumps(of_run) == json.dumps(of_whole)
    assert equal(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))
