"""Going on after an interruption: from the newest whole checkpoint; what differs is applied and said, or refused."""

import json
import shutil

import pytest
import torch
import yaml

import tiny_finetune
from crosslayer.errors import CheckpointError, ConfigError, DataError, TrainingError
from crosslayer.train import build_recipe
from crosslayer.train.checkpoints import MANIFEST, checkpoint_to_resume, checkpoints, damage, remove_old
from crosslayer.train.run import pretrain
from tiny_run import tiny_content, write_texts

CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(root):
    return pretrain(build_recipe(tiny_content(root)), root / "whole")


def losses(report):
    return [(line["step"], line["loss"]) for line in report.history if "loss" in line]


@pytest.fixture
def interrupted(root, whole, tmp_path):
    """A copy of the run as it was after step 8: checkpoints 4 and 8."""
    folder = tmp_path / "run"
    if not (root / "at-8").exists():
        pretrain(build_recipe(tiny_content(root, save_total_limit=3)), root / "at-8")
        for name in ("report.json", "report.md"):
            (root / "at-8" / name).unlink()
        shutil.rmtree(root / "at-8" / "model")
        shutil.rmtree(root / "at-8" / "checkpoint-12")
    shutil.copytree(root / "at-8", folder)
    return folder


def resume(root, folder, **training):
    return pretrain(build_recipe(tiny_content(root, save_total_limit=3, **training)), folder, resume=True)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [cut, empty, remove, flip])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_damage_is_noticed(interrupted, name, harm, caplog):
    harm(interrupted / "checkpoint-8" / name)
    assert damage(interrupted / "checkpoint-8") is not None
    assert checkpoint_to_resume(interrupted, 1) == interrupted / "checkpoint-4"
    assert f"checkpoint-8 is not used: {name}" in caplog.text
    assert "going on from" in caplog.text


def test_a_checkpoint_without_the_random_state_of_a_process(interrupted, caplog):
    """Killed while the second process of two was writing its own: the checkpoint before it is looked at."""
    folder = interrupted / "checkpoint-8"
    (folder / MANIFEST).unlink()
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    with pytest.raises(ConfigError, match=r"checkpoint-4 was written by 1 processes"):
        checkpoint_to_resume(interrupted, 2)
    assert "checkpoint-8 was not written to its end; it is passed over" in caplog.text


@pytest.mark.parametrize("harm", [cut, empty, remove])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_damage_is_noticed_without_hashes(interrupted, name, harm):
    for step in (4, 8):
        (interrupted / f"checkpoint-{step}" / MANIFEST).unlink()
    assert damage(interrupted / "checkpoint-8") is None
    harm(interrupted / "checkpoint-8" / name)
    assert checkpoint_to_resume(interrupted, 1) == interrupted / "checkpoint-4"


def test_the_one_before_gives_the_same_run(root, whole, interrupted):
    flip(interrupted / "checkpoint-8" / "optimizer.pt")
    report = resume(root, interrupted)
    assert losses(report) == losses(whole)
    assert report.after["loss"] == whole.after["loss"]


def test_a_step_from_nowhere(interrupted):
    state = interrupted / "checkpoint-8" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 10**9}))
    for manifest in (True, False):
        if not manifest:
            (interrupted / "checkpoint-8" / MANIFEST).unlink()
        assert checkpoint_to_resume(interrupted, 1) == interrupted / "checkpoint-4"


def test_none_is_whole(root, interrupted):
    for step in (4, 8):
        cut(interrupted / f"checkpoint-{step}" / "optimizer.pt")
    before = (interrupted / "run.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole .*checkpoint-8: optimizer.pt"):
        resume(root, interrupted)
    assert (interrupted / "run.json").read_bytes() == before


def test_folders_that_only_begin_like_a_checkpoint(interrupted):
    shutil.copytree(interrupted / "checkpoint-8", interrupted / "checkpoint-99-backup")
    assert checkpoint_to_resume(interrupted, 1) == interrupted / "checkpoint-8"


def test_rotation_leaves_other_folders_alone(root, interrupted):
    """Those that the user made, and checkpoints beyond the step that was just taken."""
    shutil.copytree(interrupted / "checkpoint-4", interrupted / "checkpoint-4-backup")
    shutil.copytree(interrupted / "checkpoint-4", interrupted / "checkpoint-40")
    cut(interrupted / "checkpoint-40" / "optimizer.pt")
    pretrain(build_recipe(tiny_content(root, save_total_limit=1)), interrupted, resume=True)
    assert sorted(p.name for p in interrupted.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-4-backup",
        "checkpoint-40",
    ]


def test_the_best_checkpoint_stays(tmp_path):
    for step in (4, 8, 12, 16):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old(tmp_path, tmp_path / "checkpoint-16", 2, str(tmp_path / "checkpoint-4"))
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-16"]
    remove_old(tmp_path, tmp_path / "checkpoint-16", 1, None)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-16"]


def test_no_checkpoint_goes_before_the_next_one_is_whole(root, interrupted, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crosslayer.train.trainer.write_manifest", no_space)
    with pytest.raises(TrainingError, match="No space left"):
        pretrain(build_recipe(tiny_content(root, save_total_limit=1)), interrupted, resume=True)
    assert checkpoint_to_resume(interrupted, 1) is not None
    assert damage(interrupted / "checkpoint-8") is None


def test_a_killed_first_save_starts_again(root, whole, interrupted, caplog):
    shutil.rmtree(interrupted / "checkpoint-8")
    for name in ("trainer_state.json", MANIFEST):
        (interrupted / "checkpoint-4" / name).unlink()
    assert resume(root, interrupted).after["loss"] == whole.after["loss"]
    assert "was not written to its end" in caplog.text
    assert "starting at the first step" in caplog.text


def test_weights_alone_are_no_checkpoint_to_go_on_from(root, tmp_path):
    content = tiny_content(root, save_only_model=True, max_steps=4)
    pretrain(build_recipe(content), tmp_path / "run")
    content["training"]["max_steps"] = 8
    with pytest.raises(CheckpointError, match=r"holds the weights alone \(save_only_model\)"):
        pretrain(build_recipe(content), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"optim": "sgd"},
        {"seed": 4},
        {"data_seed": 1},
        {"dataloader_drop_last": False},
        {"train_sampling_strategy": "sequential"},
    ],
)
def test_what_must_not_change(root, interrupted, change):
    (name, value), *_ = change.items()
    with pytest.raises(ConfigError, match=rf"cannot be resumed with other settings \({name}={value!r}, was "):
        resume(root, interrupted, **change)


@pytest.mark.parametrize("change", [{"per_device_train_batch_size": 2}, {"gradient_accumulation_steps": 2}])
def test_a_step_keeps_its_rows(root, interrupted, change):
    with pytest.raises(ConfigError, match=r"cannot be resumed with steps of [28] rows, they were of 4: choose "):
        resume(root, interrupted, **change)


def test_the_rows_of_a_step_may_come_in_other_batches(root, whole, interrupted, caplog):
    again = resume(root, interrupted, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert again.after["loss"] == pytest.approx(whole.after["loss"], abs=1e-5)
    assert "gradient_accumulation_steps=2 (was 1)" in caplog.text


def test_spelling_out_a_default_changes_nothing(root, whole, interrupted, caplog):
    assert (
        resume(root, interrupted, weight_decay=0.0, gradient_accumulation_steps=1).after["loss"] == whole.after["loss"]
    )
    assert "other settings" not in caplog.text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learning_rate": 1e-3}, lambda step: 1e-3 * (12 - step) / 10),
        ({"learning_rate": 1e-3, "lr_scheduler_type": "constant_with_warmup"}, lambda step: 1e-3),
        ({"max_steps": 22}, lambda step: 5e-3 * (22 - step) / 20),
        ({"warmup_steps": 0.0}, lambda step: 5e-3 * (12 - step) / 12),
    ],
)
def test_rates_and_schedule_are_applied_and_said(root, interrupted, change, expected, caplog):
    report = resume(root, interrupted, **change)
    lines = [line for line in report.history if "loss" in line and line["step"] > 8]
    for line in lines:  # the rate of a step is set after the one before it
        assert line["learning_rate"] == pytest.approx(expected(line["step"] - 1))
    for name, value in change.items():
        assert f"{name}={value!r} (was " in caplog.text
    again = yaml.safe_load((interrupted / "recipe.yaml").read_text())["training"]
    assert all(again[name] == value for name, value in change.items())


def test_a_second_resumption_keeps_the_new_rate(root, interrupted):
    """The checkpoints are of the first run, the recipe of the second one."""
    recipe = yaml.safe_load((interrupted / "recipe.yaml").read_text())
    recipe["training"]["learning_rate"] = 1e-3
    (interrupted / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = resume(root, interrupted, learning_rate=1e-3)
    rates = [line["learning_rate"] for line in report.history if "loss" in line and line["step"] > 8]
    assert max(rates) <= 1e-3 * 0.4


def test_decay_and_factors_are_applied(root, interrupted, monkeypatch):
    from crosslayer.train.trainer import PretrainTrainer

    seen = []
    original = PretrainTrainer.training_step

    def training_step(self, *args, **kwargs):
        seen.append({group["name"]: dict(group) for group in self.optimizer.param_groups})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", training_step)
    content = tiny_content(root, save_total_limit=3, weight_decay=0.3, adam_beta2=0.9)
    content["parameter_groups"]["low_rank_lr_factor"] = 0.5
    pretrain(build_recipe(content), interrupted, resume=True)
    low_rank, other = seen[0]["low_rank"], seen[0]["other"]
    assert low_rank["weight_decay"] == 0.3
    assert low_rank["betas"][1] == 0.9
    assert low_rank["lr"] == pytest.approx(0.5 * other["lr"])


def test_intervals_are_applied(root, interrupted):
    report = resume(root, interrupted, logging_steps=1, save_steps=2, eval_steps=1)
    assert [line["step"] for line in report.history if "loss" in line] == [2, 4, 6, 8, 9, 10, 11, 12]
    assert [line["step"] for line in report.history if "eval_loss" in line] == [6, 9, 10, 11, 12]


def test_a_schedule_with_a_state_keeps_its_rate(root, tmp_path):
    content = tiny_content(root, lr_scheduler_type="reduce_lr_on_plateau", warmup_steps=0, max_steps=4)
    pretrain(build_recipe(content), tmp_path / "run")
    content["training"] |= {"max_steps": 8, "learning_rate": 1e-3}
    with pytest.raises(ConfigError, match="the rate is a state of lr_scheduler_type"):
        pretrain(build_recipe(content), tmp_path / "run", resume=True)


def test_fewer_steps_than_taken(root, interrupted, whole):
    with pytest.raises(ConfigError, match=r"more steps than the 6 .*raise max_steps"):
        resume(root, interrupted, max_steps=6)
    with pytest.raises(ConfigError, match=r"taken 12 steps, more than the 6"):
        pretrain(build_recipe(tiny_content(root, max_steps=6)), root / "whole", resume=True)


def test_a_trial_that_ended_while_it_warmed_up(tmp_path):
    """--max_steps of a long recipe may: what such a run wrote down is no reason to refuse it."""
    content = tiny_content(tmp_path, warmup_steps=100)
    pretrain(build_recipe(content, {"max_steps": 4}), tmp_path / "run")
    report = pretrain(build_recipe(content, {"max_steps": 6}), tmp_path / "run", resume=True)
    assert report.steps == 6


def test_another_number_of_processes(interrupted):
    with pytest.raises(ConfigError, match="written by 1 processes and cannot be gone on from with 2"):
        checkpoint_to_resume(interrupted, 2)


@pytest.mark.parametrize("part", ["training data", "tokenizer"])
def test_changed_data_is_refused(root, interrupted, tmp_path, part):
    content = tiny_content(tmp_path, save_total_limit=3)
    text = tmp_path / "texts" / "001.txt"
    if part == "training data":  # as long as it was, and made of the same words
        words = text.read_text().split()
        text.write_text(" ".join([*words[:-2], words[-1], words[-2]]))
    else:
        text.write_text(text.read_text() + " quux zebra" * 200)
    with pytest.raises(ConfigError, match=rf"what it reads has changed .*{part} is [0-9a-f]+, was [0-9a-f]+"):
        pretrain(build_recipe(content), interrupted, resume=True)


def test_the_same_data_in_another_place(whole, interrupted, tmp_path, caplog):
    """What counts is what it holds."""
    report = pretrain(build_recipe(tiny_content(tmp_path, save_total_limit=3)), interrupted, resume=True)
    assert report.after["loss"] == whole.after["loss"]
    assert "data.data=" in caplog.text


def test_a_lost_first_evaluation_is_made_again(root, whole, interrupted):
    (interrupted / "before.json").write_text("{")
    assert resume(root, interrupted).before["eval_loss"] == whole.before["eval_loss"]


def test_a_run_of_an_earlier_version(root, whole, interrupted, caplog):
    run = json.loads((interrupted / "run.json").read_text())
    del run["fingerprints"]
    (interrupted / "run.json").write_text(json.dumps(run))
    assert resume(root, interrupted).after["loss"] == whole.after["loss"]
    assert "whether its data has changed cannot be told" in caplog.text


def test_a_damaged_final_model_is_made_again(root, whole, interrupted):
    resume(root, interrupted)
    cut(interrupted / "model" / "model.safetensors")
    report = resume(root, interrupted)
    assert report.after["loss"] == whole.after["loss"]
    assert all(torch.equal(a, b) for a, b in zip(report.model.parameters(), whole.model.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------- streams


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """A recipe on a stream of about four steps a pass; the hub is a local file, read as a hub dataset is streamed."""
    import datasets

    rows = tmp_path / "rows.jsonl"
    texts = [path.read_text() for path in sorted(write_texts(tmp_path / "few", 16, seed=4).glob("*.txt"))]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(
        "crosslayer.data.sources._load_hub",
        lambda *_: datasets.load_dataset("json", data_files=str(rows), split="train", streaming=True),
    )
    monkeypatch.setattr("crosslayer.data.sources.hub_revision", lambda name: "1")
    content = tiny_content(tmp_path, save_total_limit=9, per_device_train_batch_size=32)
    content["data"] |= {"data": "hf:someone/web", "streaming": True, "shuffle_buffer": 5}
    return content


@pytest.mark.parametrize("step", [4, 8])
def test_a_streamed_run_goes_on_in_any_pass(streamed, tmp_path, step, monkeypatch):
    from crosslayer.train.trainer import PretrainTrainer

    passes, steps = [], []
    original = PretrainTrainer.training_step

    def training_step(self, *args, **kwargs):
        steps.append(self.state.global_step)
        passes.append(json.loads(self.train_dataset.positions[0])[1])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", training_step)
    report = pretrain(build_recipe(streamed), tmp_path / "run")
    assert passes[step] >= (1 if step == 4 else 2), "no other pass to go on in"
    steps.clear()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("report.json", *(f"checkpoint-{later}" for later in (8, 12) if later > step)):
        path = tmp_path / "again" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = pretrain(build_recipe(streamed), tmp_path / "again", resume=True)
    assert losses(resumed) == losses(report)
    assert resumed.after["loss"] == report.after["loss"]
    assert steps == list(range(step, 12))


def test_a_stream_stays_with_its_workers(streamed, tmp_path):
    streamed["training"] |= {"max_steps": 4}
    pretrain(build_recipe(streamed), tmp_path / "run")
    streamed["training"] |= {"max_steps": 8, "dataloader_num_workers": 2}
    with pytest.raises(ConfigError, match="dataloader_num_workers=2, was 0: every worker reads a part of the stream"):
        pretrain(build_recipe(streamed), tmp_path / "run", resume=True)


def test_what_a_worker_cannot_read_is_one_line(streamed, tmp_path):
    write_texts(tmp_path / "local", 60)
    (tmp_path / "local" / "more.jsonl").write_text('{"text": 1}\n')
    streamed["data"] |= {"data": str(tmp_path / "local"), "max_validation_documents": 1, "max_tokenizer_documents": 9}
    streamed["training"] |= {"dataloader_num_workers": 1}
    with pytest.raises(DataError, match=r"^\S*more\.jsonl, line 1: .*not a string; repair it") as caught:
        pretrain(build_recipe(streamed), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_passes_of_an_empty_stream_end():
    from datasets import IterableDataset

    from crosslayer.train.stream import Passes

    class Stream:
        def __init__(self, rows):
            self.rows = rows

        def one_pass(self, number, **part):
            return IterableDataset.from_generator(lambda: ({"row": row} for row in self.rows))

    with pytest.raises(DataError, match="no block for one of its 1 readers"):
        next(iter(Passes(Stream([]), 4)))
    rows = iter(Passes(Stream([1, 2]), 4))
    assert [next(rows)["row"] for _ in range(5)] == [1, 2, 1, 2, 1]


# --------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture
def task(tmp_path):
    """(content of a recipe, folder of its run after 12 of 24 steps)."""
    from crosslayer.train import build_finetune_recipe
    from crosslayer.train.finetune import finetune

    data = tiny_finetune.write_task(tmp_path / "data")
    model = tiny_finetune.write_encoder(tmp_path / "encoder")
    content = tiny_finetune.tiny_content(tmp_path, model, data, save_total_limit=9)
    finetune(build_finetune_recipe(content), tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    for step in (18, 24):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    return content, tmp_path / "run"


def go_on(content, folder):
    from crosslayer.train import build_finetune_recipe
    from crosslayer.train.finetune import finetune

    return finetune(build_finetune_recipe(content), folder, resume=True)


def test_fine_tuning_refuses_other_rows_and_weights(task, tmp_path):
    content, folder = task
    rows = (tmp_path / "data" / "train.jsonl").read_text()
    (tmp_path / "data" / "train.jsonl").write_text(rows.replace('"label": 1', '"label": 0', 1))
    with pytest.raises(ConfigError, match=r"what it reads has changed .*\(training rows is"):
        go_on(content, folder)
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    flip(tmp_path / "encoder" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"what it reads has changed .*\(model is"):
        go_on(content, folder)
    flip(tmp_path / "encoder" / "model.safetensors")
    content["adapter"]["r"] = 2
    with pytest.raises(ConfigError, match=r"adapter.r=2, was 4"):
        go_on(content, folder)


def test_fine_tuning_applies_another_rate(task, caplog):
    content, folder = task
    content["training"]["learning_rate"] = 1e-4
    report = go_on(content, folder)
    rates = [line["learning_rate"] for line in report.history if "loss" in line and line["step"] > 12]
    assert rates
    assert max(rates) <= 1e-4
    assert "learning_rate=0.0001 (was 0.01)" in caplog.text


def test_fine_tuning_passes_over_damage(task, caplog):
    content, folder = task
    flip(folder / "checkpoint-12" / "adapter_model.safetensors")
    report = go_on(content, folder)
    assert report.steps == 24
    assert "checkpoint-12 is not used: adapter_model.safetensors is not what was written" in caplog.text
    assert "going on from" in caplog.text
