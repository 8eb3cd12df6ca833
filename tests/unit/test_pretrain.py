"""A whole run: what it leaves behind, resuming to the last digit, and stopping without damage."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crosslayer.errors import CheckpointError, ConfigError, TrainingError
from crosslayer.train import build_recipe
from crosslayer.train.checkpoints import last_complete_checkpoint
from crosslayer.train.run import pretrain
from crosslayer.train.trainer import PretrainTrainer
from tiny_run import WORDS, tiny_content, tiny_recipe

FILES = ("recipe.yaml", "run.json", "report.json", "report.md", "log.jsonl", "loss.png", "model/config.json")


def losses(history):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in history if "loss" in line]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def finished(root):
    """One uninterrupted run: (recipe, folder, report)."""
    recipe, folder = tiny_recipe(root), root / "run"
    return recipe, folder, pretrain(recipe, folder)


def interrupt_at(step, monkeypatch, error=KeyboardInterrupt):
    original = PretrainTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", training_step)


def test_files_and_report(finished):
    _, folder, report = finished
    for name in FILES:
        assert (folder / name).is_file(), name
    content = json.loads((folder / "report.json").read_text())
    assert content["steps"] == 12
    assert content["tokens"] == 12 * 4 * 32
    assert content["after"]["eval_loss"] < content["before"]["eval_loss"]
    assert content["after"]["perplexity"] == pytest.approx(math.exp(content["after"]["loss"]))
    assert content["run"]["versions"]["torch"] == torch.__version__
    assert len((folder / "log.jsonl").read_text().splitlines()) == len(content["history"])
    table = dict(report.rows())
    assert "before" in table["validation perplexity"]
    assert "dense model of the same shape" in table["parameters"]


def test_log_holds_what_was_promised(finished):
    line = next(line for line in finished[2].history if line.get("step") == 12 and "loss" in line)
    for key in ("loss", "grad_norm", "learning_rate", "num_input_tokens_seen", "tokens_per_s", "beta_min", "beta_max"):
        assert key in line
    assert line["num_input_tokens_seen"] == 12 * 4 * 32
    assert line["beta_min"] < line["beta_max"]


def test_checkpoint_is_an_ordinary_one(finished):
    model = AutoModelForCausalLM.from_pretrained(finished[1] / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished[1] / "model")
    ids = tokenizer("the quick brown fox", return_tensors="pt")
    trained = finished[2].model.eval()
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, trained(**ids).logits)
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("folder", ["model", "checkpoint-8", "checkpoint-12"])
def test_card_with_each_checkpoint(finished, folder):
    card = (finished[1] / folder / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "CR-Net" in card
    assert ("Validation perplexity" in card) == (folder == "model")


def test_old_checkpoints_go(finished):
    assert sorted(path.name for path in finished[1].glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


def test_the_same_seed_gives_the_same_run(finished, root):
    recipe, _, report = finished
    again = pretrain(recipe, root / "again")
    assert losses(again.history) == losses(report.history)
    assert again.after["loss"] == report.after["loss"]


@pytest.mark.parametrize("step", [3, 4, 7, 11])
def test_resume_is_exact(finished, root, monkeypatch, step):
    recipe, _, report = finished
    folder = root / f"interrupted-{step}"
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        with pytest.raises(TrainingError, match=f"interrupted at step {step}"):
            pretrain(recipe, folder)
    resumed = pretrain(recipe, folder, resume=True)
    last = step - step % 4
    expected = list(losses(report.history))
    assert losses(resumed.history)[-len([e for e in expected if e[0] > last]) :] == [e for e in expected if e[0] > last]
    assert resumed.after["loss"] == report.after["loss"]
    assert resumed.before["eval_loss"] == report.before["eval_loss"]
    assert resumed.tokens == report.tokens


def test_resume_of_a_finished_run_shows_it_again(finished, monkeypatch):
    recipe, folder, report = finished
    monkeypatch.setattr(PretrainTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    again = pretrain(recipe, folder, resume=True)
    assert again.rows() == report.rows()


def test_resume_passes_over_a_half_written_checkpoint(finished, root, monkeypatch):
    recipe, _, report = finished
    folder = root / "torn"
    with monkeypatch.context() as patch:
        interrupt_at(9, patch)
        with pytest.raises(TrainingError):
            pretrain(recipe, folder)
    (folder / "checkpoint-8" / "trainer_state.json").write_text("{")  # the machine went down while it was written
    assert last_complete_checkpoint(folder) == folder / "checkpoint-4"
    assert pretrain(recipe, folder, resume=True).after["loss"] == report.after["loss"]


def test_a_full_disk_keeps_the_previous_checkpoint(root, monkeypatch):
    recipe, folder = tiny_recipe(root), root / "full"
    original = PretrainTrainer._save_optimizer_and_scheduler

    def save(self, output_dir):
        if output_dir.endswith("checkpoint-8"):
            (Path(output_dir) / "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(self, output_dir)

    monkeypatch.setattr(PretrainTrainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(TrainingError, match=r"checkpoint of step 8 .*No space left.*checkpoint-4"):
        pretrain(recipe, folder)
    assert not (folder / "checkpoint-8").exists()
    AutoModelForCausalLM.from_pretrained(folder / "checkpoint-4")


def test_a_loss_that_is_not_finite_stops_the_run(root, monkeypatch):
    recipe, folder = tiny_recipe(root), root / "nan"
    original = PretrainTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 6 and self.model.training else loss

    monkeypatch.setattr(PretrainTrainer, "compute_loss", compute_loss)
    with pytest.raises(TrainingError, match=r"not finite at step 7; the last good checkpoint is .*checkpoint-4"):
        pretrain(recipe, folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-4")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_weights_that_are_not_finite_are_never_saved(root, monkeypatch):
    recipe, folder = tiny_recipe(root), root / "inf"
    original = PretrainTrainer._save_checkpoint

    def save(self, model, trial):
        if self.state.global_step == 8:
            with torch.no_grad():
                next(model.parameters())[0, 0] = float("inf")
        original(self, model, trial)

    monkeypatch.setattr(PretrainTrainer, "_save_checkpoint", save)
    with pytest.raises(TrainingError, match="weights are not finite at step 8"):
        pretrain(recipe, folder)
    assert not (folder / "checkpoint-8").exists()


def test_dry_run_writes_nothing(root):
    plans = []
    assert pretrain(tiny_recipe(root), root / "dry", dry_run=True, show_plan=plans.append) is None
    assert not (root / "dry").exists()
    plan = plans[0]
    assert plan.steps == 12
    assert plan.tokens == 12 * 4 * 32
    assert plan.device.startswith("cpu")
    assert plan.device_reason == "use_cpu is set"


def test_epochs_without_max_steps(root):
    recipe = tiny_recipe(root, max_steps=-1, num_train_epochs=2.0)
    plans = []
    pretrain(recipe, root / "dry", dry_run=True, show_plan=plans.append)
    assert plans[0].steps == 2 * (plans[0].train_blocks // 4)


def test_a_folder_with_a_run_is_not_touched(finished, root):
    recipe, folder, _ = finished
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError, match="already holds a run; give --resume"):
        pretrain(recipe, folder)
    with pytest.raises(ConfigError, match="exclude each other"):
        pretrain(recipe, folder, resume=True, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_folder_with_other_files_is_not_touched(finished, root):
    folder = root / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("precious")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(CheckpointError, match="not of a run"):
            pretrain(finished[0], folder, **options)
    assert (folder / "chapter.tex").read_text() == "precious"


def test_nothing_to_resume(finished, root):
    with pytest.raises(CheckpointError, match="no run to resume"):
        pretrain(finished[0], root / "nowhere", resume=True)


def test_another_model_cannot_go_on(finished, root):
    recipe = tiny_recipe(root)
    recipe.model["rank"] = 4
    with pytest.raises(ConfigError, match=r"cannot be resumed with another model .*model.rank=4, was 8"):
        pretrain(recipe, finished[1], resume=True)


def test_more_steps_go_on(root):
    folder = root / "longer"
    pretrain(tiny_recipe(root, max_steps=4, lr_scheduler_type="constant"), folder)
    report = pretrain(tiny_recipe(root, max_steps=8, lr_scheduler_type="constant"), folder, resume=True)
    assert report.steps == 8
    assert [line["step"] for line in report.history if "loss" in line] == [2, 4, 6, 8]


def test_a_streaming_source_trains_and_resumes(root, monkeypatch):
    """The hub is replaced by a local file, read the way a hub dataset is streamed."""
    import datasets

    rows = root / "rows.jsonl"
    texts = [path.read_text() for path in sorted((root / "texts").glob("*.txt"))] or [" ".join(WORDS)] * 60
    rows.write_text("".join(json.dumps({"text": f"{text} {number}"}) + "\n" for number in range(20) for text in texts))
    monkeypatch.setattr(
        "crosslayer.data.sources._load_hub",
        lambda *_: datasets.load_dataset("json", data_files=str(rows), split="train", streaming=True),
    )
    monkeypatch.setattr("crosslayer.data.sources.hub_revision", lambda name: "1")
    content = tiny_content(root)
    content["data"] |= {"data": "hf:someone/web", "streaming": True, "max_validation_documents": 8}
    report = pretrain(build_recipe(content), root / "stream")
    assert report.plan["train_blocks"] is None
    assert report.tokens == 12 * 4 * 32
    assert report.after["eval_loss"] < report.before["eval_loss"]
    with monkeypatch.context() as patch:
        interrupt_at(6, patch)
        with pytest.raises(TrainingError):
            pretrain(build_recipe(content), root / "stream-again")
    resumed = pretrain(build_recipe(content), root / "stream-again", resume=True)
    assert resumed.after["loss"] == report.after["loss"]

    content["training"]["max_steps"] = -1
    with pytest.raises(ConfigError, match="a streaming source has no length"):
        pretrain(build_recipe(content), root / "endless")


def test_overwrite_starts_again(finished, root):
    recipe = tiny_recipe(root, max_steps=2, save_steps=2)
    folder = root / "overwritten"
    pretrain(recipe, folder)
    report = pretrain(recipe, folder, overwrite=True)
    assert report.steps == 2


def test_bad_model_leaves_no_trace(root):
    recipe = tiny_recipe(root)
    recipe.model["rank"] = 1000
    with pytest.raises(ConfigError, match="rank=1000"):
        pretrain(recipe, root / "bad")
    assert not (root / "bad").exists()


@pytest.mark.parametrize("factorization", ["low_rank", "cola", "dense"])
def test_other_factorizations_train(root, factorization):
    recipe = tiny_recipe(root, max_steps=4)
    recipe.model["factorization"] = factorization
    report = pretrain(recipe, root / factorization)
    assert report.after["eval_loss"] < report.before["eval_loss"]
    assert "beta_min" not in report.history[0]


def test_accumulation_sees_the_same_tokens(root, finished):
    recipe = tiny_recipe(root, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    report = pretrain(recipe, root / "accumulated")
    assert report.tokens == finished[2].tokens
    assert report.after["loss"] == pytest.approx(finished[2].after["loss"], rel=1e-4)
