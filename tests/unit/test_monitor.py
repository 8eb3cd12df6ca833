"""Numbers that go wrong are seen before the optimizer's step; runs that are asked to stop lose nothing."""

import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import tiny_finetune
from crosslayer.analysis.health import largest_increment, read_health
from crosslayer.cli import interrupt
from crosslayer.errors import ConfigError, RunStoppedError, TrainingError
from crosslayer.train import build_finetune_recipe, build_recipe
from crosslayer.train.finetune import finetune
from crosslayer.train.monitor import Monitor, SpikeScore, StepMonitor
from crosslayer.train.run import pretrain
from crosslayer.train.stopping import StopEarly
from crosslayer.train.trainer import PretrainTrainer, SafeTrainer
from tiny_run import tiny_content


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("monitor")


def recipe_of(root, monitor=None, **training):
    return build_recipe({**tiny_content(root, **training), "monitor": monitor or {}})


@pytest.fixture(scope="module")
def whole(root):
    """A run that nothing disturbs."""
    return pretrain(recipe_of(root, {"spike_window": 3, "spike_threshold": 1.2}), root / "whole")


def weights_of(report):
    return {name: tensor.clone() for name, tensor in report.model.state_dict().items()}


def with_callback(patch, callback):
    original = SafeTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(callback)
        callback.trainer = self

    patch.setattr(SafeTrainer, "__init__", init)


class Snapshots(TrainerCallback):
    """Weights and moments before and after one step."""

    def __init__(self, step):
        self.step, self.taken = step, []

    def take(self, model, optimizer):
        state = optimizer.state_dict()["state"]
        moments = [value.clone() for of in state.values() for value in of.values() if torch.is_tensor(value)]
        self.taken.append([p.detach().clone() for p in model.parameters()] + moments)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step - 1:
            self.take(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step:
            self.take(model, optimizer)


def spoil(patch, what, steps):
    """The loss of these steps is not a number, or it is finite and a gradient is not."""
    original = PretrainTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = original(self, model, inputs, num_items_in_batch)
        if self.state.global_step + 1 in steps and what == "gradient norm":
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = math.inf
        return loss

    loss_of = PretrainTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = loss_of(self, *args, **kwargs)
        is_spoilt = what == "loss" and self.model.training and self.state.global_step + 1 in steps
        return loss * math.nan if is_spoilt else loss

    patch.setattr(PretrainTrainer, "training_step", training_step)
    patch.setattr(PretrainTrainer, "compute_loss", compute_loss)


SETTINGS = [
    {},
    {"max_grad_norm": 0.0},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["clipped", "not clipped", "accumulated"])
@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_step_is_left_out(root, tmp_path, monkeypatch, what, settings):
    spoil(monkeypatch, what, {7})
    snapshots = Snapshots(7)
    with_callback(monkeypatch, snapshots)
    settings = {**settings, "max_steps": 9, "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "no"}
    report = pretrain(recipe_of(root, {"on_nonfinite": "skip"}, **settings), tmp_path / "run")
    before, after = snapshots.taken
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert report.steps == 9
    assert report.skipped_steps == [7]
    assert ("steps left out", "1, not finite") in report.rows()
    lines = {line["step"]: line for line in report.history if "learning_rate" in line}
    assert set(lines) | {7} == set(range(1, 10))
    assert [line.get("skipped_steps") for line in lines.values()] == [None] * 6 + [1] * 3
    assert "loss" not in lines[7]
    assert "grad_norm" not in lines[7]
    rates = [lines[step]["learning_rate"] for step in (6, 7, 8)]
    assert rates[0] > rates[1] > rates[2]  # the schedule goes on
    assert all(math.isfinite(value) for line in report.history for value in line.values() if isinstance(value, float))


def test_the_check_of_the_snapshots_can_fail(root, tmp_path, monkeypatch):
    snapshots = Snapshots(2)
    with_callback(monkeypatch, snapshots)
    pretrain(recipe_of(root, max_steps=2, eval_strategy="no", save_strategy="no"), tmp_path / "run")
    before, after = snapshots.taken
    assert not any(torch.equal(one, other) for one, other in zip(before[:3], after[:3], strict=True))


def test_the_logged_loss_is_the_mean_of_the_steps_that_count(root, tmp_path, whole, monkeypatch):
    """Steps 3 and 4 are logged together; 4 is left out."""
    single = pretrain(recipe_of(root, logging_steps=1), tmp_path / "single").history
    third = next(line["loss"] for line in single if line.get("step") == 3)
    spoil(monkeypatch, "loss", {4})
    report = pretrain(recipe_of(root, {"on_nonfinite": "skip"}), tmp_path / "run")
    assert next(line["loss"] for line in report.history if line["step"] == 4) == pytest.approx(third, rel=1e-6)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_run_stops_before_the_step(root, tmp_path, monkeypatch, what):
    spoil(monkeypatch, what, {7})
    snapshots = Snapshots(7)
    with_callback(monkeypatch, snapshots)
    message = rf"the {what} is not finite at step 7; the last good checkpoint is .*checkpoint-4"
    with pytest.raises(TrainingError, match=message):
        pretrain(recipe_of(root), tmp_path / "run")
    now = [p.detach() for p in snapshots.trainer.model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(now, snapshots.taken[0], strict=False))


def test_the_limit_of_steps_left_out(root, tmp_path, monkeypatch):
    spoil(monkeypatch, "loss", {2, 5, 6})
    limited = {"on_nonfinite": "skip", "nonfinite_limit": 3}
    with pytest.raises(TrainingError, match=r"at step 6, one of 3 within 1000 \(nonfinite_limit=3\)"):
        pretrain(recipe_of(root, limited), tmp_path / "run")


def test_the_limit_is_for_a_thousand_steps():
    monitor = StepMonitor(Monitor(on_nonfinite="skip", nonfinite_limit=2), lambda: "none")
    assert monitor.look(1, math.nan, 1.0, "loss")
    assert monitor.look(1001, math.nan, 1.0, "loss")
    with pytest.raises(TrainingError, match="step 2000"):
        monitor.look(2000, math.nan, 1.0, "loss")


def test_finetuning_leaves_steps_out_too(tmp_path, monkeypatch):
    encoder, task = tiny_finetune.write_encoder(tmp_path / "encoder"), tiny_finetune.write_task(tmp_path / "sst2")
    content = tiny_finetune.tiny_content(tmp_path, encoder, task, num_train_epochs=1, logging_steps=1)
    original = SafeTrainer._get_grad_norm
    monkeypatch.setattr(
        SafeTrainer,
        "_get_grad_norm",
        lambda self, model, grad_norm: original(
            self, model, grad_norm * (math.nan if self.state.global_step == 1 else 1.0)
        ),
    )
    report = finetune(build_finetune_recipe(content, {"on_nonfinite": "skip"}), tmp_path / "run")
    assert [line["skipped_steps"] for line in report.history if line["step"] == 2] == [1]
    assert math.isfinite(report.after["eval_loss"])


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_the_backward_pass(root, tmp_path, optim):
    with pytest.raises(ConfigError, match=rf"on_nonfinite=skip needs .*optim={optim} steps within the backward"):
        pretrain(recipe_of(root, {"on_nonfinite": "skip"}, optim=optim), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("on_nonfinite", "ignore"),
        ("nonfinite_limit", 0),
        ("spike_window", 1),
        ("spike_threshold", 0.0),
        ("spike_threshold", math.nan),
        ("max_hours", -1.0),
        ("max_hours", math.inf),
    ],
)
def test_values_that_make_no_sense(root, name, value):
    with pytest.raises(ConfigError, match=name):
        recipe_of(root, {name: value})


# Spikes


def test_spikes_against_numpy():
    rng = random.Random(0)
    values = [rng.gauss(3, 0.1) + (2 if step in (40, 41, 90) else 0) for step in range(120)]
    score = SpikeScore(Monitor(spike_window=16, spike_threshold=4.0))
    found = [step for step, value in enumerate(values) if score.add(step, value)]
    expected = [
        step
        for step in range(16, 120)
        if values[step] > np.mean(values[step - 16 : step]) + 4 * np.std(values[step - 16 : step])
    ]
    assert found == expected
    assert 40 in found
    assert score.score() == pytest.approx(len(expected) / 104)


def test_a_score_is_carried_over():
    settings = Monitor(spike_window=4, spike_threshold=1.0)
    rng = random.Random(1)
    values = [rng.random() for _ in range(40)]
    whole, first, second = SpikeScore(settings), SpikeScore(settings), SpikeScore(settings)
    for step, value in enumerate(values):
        whole.add(step, value)
        (first if step < 20 else second).add(step, value)
        if step == 19:
            second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == whole.state()
    assert whole.spikes


def test_the_log_has_scores_and_the_largest_increment(root, whole):
    lines = [line for line in whole.history if "loss" in line]
    assert all(("loss_spike_score" in line) == (line["step"] > 3) for line in lines)
    assert all(("grad_norm_spike_score" in line) == (line["step"] > 3) for line in lines)
    for line, record in zip(lines, read_health(root / "whole")[0], strict=True):
        table = record["increment_ratio"]
        layer, position = line["largest_increment_at"].split(".")[1:]
        assert line["largest_increment"] == table[position][int(layer) - 1] == max(max(row) for row in table.values())


def test_the_largest_increment():
    assert largest_increment({"q": [0.1, None], "down": [0.2, 0.3]}) == (0.3, "layers.2.down")
    value, place = largest_increment({"q": [0.1, math.nan], "down": [0.2, 0.3]})
    assert (math.isnan(value), place) == (True, "layers.2.q")
    assert largest_increment({}) is None


# Ends that are asked for


class Signal(TrainerCallback):
    """Sends itself a signal while a step is under way."""

    def __init__(self, step, which):
        self.step, self.which = step, which

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.which)


TIMES = ("tokens_per_s", "eval_runtime", "train_runtime")


def without_times(history):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in history if "train_runtime" not in line]


@pytest.mark.parametrize(("step", "which"), [(5, signal.SIGTERM), (6, signal.SIGUSR1), (8, signal.SIGTERM)])
def test_a_signal_stops_with_a_checkpoint(root, whole, tmp_path, monkeypatch, step, which):
    """Step 5 is between two logs, 6 has an evaluation, 8 a checkpoint of its own; the log comes out the same."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    recipe = recipe_of(root, {"spike_window": 3, "spike_threshold": 1.2})
    with monkeypatch.context() as patch:
        with_callback(patch, Signal(step, which))
        with pytest.raises(RunStoppedError, match=rf"stopped at step {step} \({which.name}\); .*checkpoint-{step} "):
            pretrain(recipe, tmp_path / "run")
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert (tmp_path / "run" / f"checkpoint-{step}" / "crosslayer_manifest.json").is_file()
    assert not (tmp_path / "run" / "report.json").exists()
    resumed = pretrain(recipe, tmp_path / "run", resume=True)
    expected = weights_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(resumed).items())
    assert without_times(resumed.history) == without_times(whole.history)


def test_a_signal_in_the_last_step_changes_nothing(root, tmp_path, monkeypatch):
    with_callback(monkeypatch, Signal(4, signal.SIGTERM))
    assert pretrain(recipe_of(root, max_steps=4), tmp_path / "run").steps == 4


def test_a_time_limit(root, tmp_path):
    with pytest.raises(RunStoppedError, match=r"stopped at step 1 \(max_hours=1e-09\)"):
        pretrain(recipe_of(root, {"max_hours": 1e-9}), tmp_path / "run")
    resumed = pretrain(recipe_of(root, {"max_hours": 10}, max_steps=4), tmp_path / "run", resume=True)
    assert resumed.steps == 4


def test_only_a_run_that_says_so_stops():
    """A plain `train` would return as if it had taken all its steps."""
    stopping = StopEarly(max_hours=1e-9)
    assert not stopping.is_asked()
    with stopping.listening():
        assert stopping.is_asked()
    assert not stopping.is_asked()


def test_finetuning_stops_within_an_epoch(tmp_path, monkeypatch):
    """Evaluations are due at the ends of epochs alone, and decide which checkpoint is best."""
    encoder, task = tiny_finetune.write_encoder(tmp_path / "encoder"), tiny_finetune.write_task(tmp_path / "sst2")
    recipe = build_finetune_recipe(tiny_finetune.tiny_content(tmp_path, encoder, task, num_train_epochs=2))
    whole = finetune(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        with_callback(patch, Signal(2, signal.SIGTERM))
        with pytest.raises(RunStoppedError, match="stopped at step 2"):
            finetune(recipe, tmp_path / "run")
    resumed = finetune(recipe, tmp_path / "run", resume=True)
    assert resumed.after["eval_loss"] == whole.after["eval_loss"]
    evaluations = [[line["step"] for line in run.history if "eval_loss" in line] for run in (whole, resumed)]
    assert evaluations[0] == evaluations[1]


# Back to before it went wrong


def test_a_run_that_diverged_is_rescued(root, whole, tmp_path):
    """A rate a thousand times too high, saved before and after it; from before, with a lower one, the run is as good
    as one that never went wrong."""
    folder, constant = tmp_path / "run", {"lr_scheduler_type": "constant", "save_total_limit": 3}
    pretrain(recipe_of(root, max_steps=4, **constant), folder)
    diverged = pretrain(recipe_of(root, max_steps=12, learning_rate=5.0, **constant), folder, resume=True)
    assert diverged.after["eval_loss"] > whole.after["eval_loss"] + 0.3
    with pytest.raises(ConfigError, match=r"has no checkpoint-6; there are: 4, 8, 12"):
        pretrain(recipe_of(root), folder, resume_from=6)
    assert (folder / "report.json").exists()
    rescued = pretrain(recipe_of(root, max_steps=12, learning_rate=3e-3, **constant), folder, resume_from=4)
    assert rescued.after["eval_loss"] < whole.after["eval_loss"] + 0.05
    assert [line["step"] for line in rescued.history if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in read_health(folder)[0]] == [2, 4, 6, 8, 10, 12]


def test_later_checkpoints_are_thrown_away_before_the_first_step(root, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    pretrain(recipe_of(root, save_total_limit=3), folder)
    monkeypatch.setattr(SafeTrainer, "run", lambda *a: pytest.fail("it trained"))
    with pytest.raises(pytest.fail.Exception):
        pretrain(recipe_of(root, save_total_limit=3), folder, resume_from=8)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert not (folder / "report.json").exists()  # else it would count as finished


@pytest.mark.parametrize("option", [["--resume_from", "8"], ["--resume-from=8"], ["--resume"]])
def test_the_command_that_goes_on_takes_the_newest(tmp_path, monkeypatch, option):
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["crosslayer", "pretrain", *option, "--recipe", "r"])
    monkeypatch.delenv("RANK", raising=False)
    interrupt.goes_on(tmp_path, resume=True)
    (tmp_path / "run.json").touch()
    assert interrupt.command_to_go_on() == "crosslayer pretrain --recipe r --resume"
