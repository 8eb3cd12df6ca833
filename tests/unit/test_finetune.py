"""Whole fine-tuning runs: every method learns, what a run leaves behind, resuming to the last digit."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from crosslayer.errors import CheckpointError, ConfigError, DataError, TrainingError
from crosslayer.methods import FINETUNING
from crosslayer.train.finetune import finetune, train_once
from crosslayer.train.methods import AdapterConfig, attach
from crosslayer.train.task_trainer import TaskTrainer, split_off_head
from tiny_finetune import rows_of, tiny_recipe, write_decoder, write_encoder, write_instructions, write_rows, write_task


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    write_encoder(root / "encoder")
    write_decoder(root / "decoder")
    write_task(root / "sst2")
    write_instructions(root / "instructions.jsonl")
    return root


@pytest.fixture(scope="module")
def finished(root):
    """One uninterrupted run that fuses and injects."""
    recipe = tiny_recipe(root, root / "encoder", root / "sst2", method="imlor2c", num_train_epochs=6)
    recipe.adapter.max_injections = 2
    return recipe, root / "run", finetune(recipe, root / "run")


def losses(history):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in history if "loss" in line]


def test_files_and_report(finished):
    _, folder, report = finished
    names = ["recipe.yaml", "run.json", "report.json", "report.md", "log.jsonl", "structure.png"]
    for name in [*names, "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/tokenizer.json"]:
        assert (folder / name).is_file(), name
    content = json.loads((folder / "report.json").read_text())
    assert content["steps"] == 36
    trained = [loss for _, loss, _ in losses(report.history)]
    assert sum(trained[-5:]) < sum(trained[:5])
    assert content["after"]["eval_accuracy"] == max(
        line["eval_accuracy"] for line in content["history"] if "eval_accuracy" in line
    )
    assert sorted(entry["action"] for entry in content["structure"]) == ["fuse", "inject", "inject"]
    table = dict(report.rows())
    assert table["method"] == "imlor2c"
    assert "adapter" in table["trainable parameters"]
    assert "peak memory" in table


def test_the_adapter_reloads(finished, root):
    _, folder, report = finished
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    rows = rows_of(16, 1)
    inputs = tokenizer([row["sentence"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        predicted = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits.argmax(-1)
    accuracy = (predicted == torch.tensor([row["label"] for row in rows])).float().mean().item()
    assert accuracy == pytest.approx(report.after["eval_accuracy"])


@pytest.mark.parametrize("method", [m for m in FINETUNING if m != "imlor2c"])
def test_every_method_trains(method, root):
    folder = root / f"method-{method}"
    settings = {"num_train_epochs": 2, "learning_rate": 5e-3}
    report = finetune(tiny_recipe(root, root / "encoder", root / "sst2", method=method, **settings), folder)
    assert report.steps == 12
    trained = report.trained
    assert trained["head"] == 2 * 32 + 2
    r, d, blocks = 4, 32, 4
    lor2c = 2 * d * r * blocks
    expected = {
        "lor2c": lor2c,
        "sharelor2c": d * r + blocks * d * r,
        "lora": 2 * lor2c,
        "injectlor2c": lor2c,
        "full": 0,
        "head": 0,
    }
    if method in expected:
        assert trained["adapter"] == expected[method]
    assert (trained["base"] > 0) == (method == "full")
    kept = folder / ("model" if method in ("full", "head") else "adapter")
    assert kept.is_dir()
    if method == "head":  # nothing else moved
        before = AutoModelForSequenceClassification.from_pretrained(root / "encoder").base_model.state_dict()
        after = AutoModelForSequenceClassification.from_pretrained(kept).base_model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("step", [9, 20])
def test_resume_repeats_the_uninterrupted_run(step, finished, root, monkeypatch):
    recipe, _, whole = finished
    folder = root / f"resumed-{step}"
    original = TaskTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TaskTrainer, "training_step", training_step)
    with pytest.raises(TrainingError, match=f"interrupted at step {step}; the last good checkpoint"):
        finetune(recipe, folder)
    monkeypatch.setattr(TaskTrainer, "training_step", original)
    resumed = finetune(recipe, folder, resume=True)
    assert losses(resumed.history) == losses(whole.history)
    assert resumed.after["eval_loss"] == whole.after["eval_loss"]
    assert [(e["step"], e["action"], e["blocks"]) for e in resumed.structure] == [
        (e["step"], e["action"], e["blocks"]) for e in whole.structure
    ]


def test_a_finished_run_is_not_run_again(finished):
    recipe, folder, report = finished
    before = (folder / "report.json").stat().st_mtime_ns
    assert finetune(recipe, folder, resume=True).after == report.after
    assert (folder / "report.json").stat().st_mtime_ns == before


def test_no_other_run_is_touched(finished, root):
    recipe, folder, _ = finished
    with pytest.raises(CheckpointError, match="already holds a run"):
        finetune(recipe, folder)
    other = tiny_recipe(root, root / "encoder", root / "sst2", method="lora")
    with pytest.raises(ConfigError, match=r"adapter\.method='lora', was 'imlor2c'"):
        finetune(other, folder, resume=True)
    other = tiny_recipe(root, root / "decoder", root / "sst2", method="imlor2c")
    with pytest.raises(ConfigError, match="model="):
        finetune(other, folder, resume=True)


def test_dry_run_writes_nothing(root):
    shown = []
    recipe = tiny_recipe(root, root / "encoder", root / "sst2")
    assert finetune(recipe, root / "dry", dry_run=True, show_plan=shown.append) is None
    assert not (root / "dry").exists()
    assert shown[0].steps == 24
    assert shown[0].trained == {"adapter": 2 * 32 * 4 * 4, "head": 66, "base": 0}


def test_regression_and_a_single_file(root):
    rows = write_rows(root / "scores.jsonl", rows_of(120, 5))
    recipe = tiny_recipe(root, root / "encoder", rows, task="regression", num_train_epochs=6)
    recipe.data.label_column = "score"
    report = finetune(recipe, root / "regression")
    assert report.plan["validation_rows"] == 12
    assert report.after["eval_loss"] < report.before["eval_loss"]
    assert {"eval_pearson", "eval_spearman"} <= report.after.keys()


def test_named_classes_on_a_decoder(root):
    rows = [{"text": row["sentence"], "label": ("bad", "good")[row["label"]]} for row in rows_of(60, 6)]
    recipe = tiny_recipe(root, root / "decoder", write_rows(root / "named.jsonl", rows), task=None, num_train_epochs=2)
    report = finetune(recipe, root / "named")
    assert report.plan["labels"] == ("bad", "good")
    assert (root / "named" / "adapter" / "adapter_model.safetensors").is_file()


def test_instructions_on_a_crnet(root):
    """Loss falls, the adapter reloads to the same outputs, answers are there."""
    recipe = tiny_recipe(root, root / "decoder", root / "instructions.jsonl", task=None, num_train_epochs=6)
    recipe.data.max_length = 8
    with pytest.raises(DataError, match="max_length=8 cuts every answer away"):
        finetune(recipe, root / "instruct")
    assert not (root / "instruct").exists()
    recipe.data.max_length = 128
    report = finetune(recipe, root / "instruct")
    assert report.after["eval_loss"] < 0.95 * report.before["eval_loss"]
    assert len(report.samples) == 3
    assert report.samples[0]["prompt"].startswith("### Instruction:\nJudge the sentence.\n\n### Input:\n")
    base = AutoModelForCausalLM.from_pretrained(root / "decoder")
    model = PeftModel.from_pretrained(base, root / "instruct" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "instruct" / "adapter")
    ids = tokenizer(report.samples[0]["prompt"], return_tensors="pt").input_ids
    output = model.generate(input_ids=ids, max_new_tokens=64, do_sample=False)
    assert tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == report.samples[0]["answer"]


def test_conversations_without_a_chat_template(root):
    rows = [
        {"messages": [{"role": "user", "content": row["sentence"]}, {"role": "assistant", "content": "good"}]}
        for row in rows_of(24, 7)
    ]
    recipe = tiny_recipe(root, root / "decoder", write_rows(root / "chat.jsonl", rows), task=None, num_train_epochs=2)
    report = finetune(recipe, root / "chat")
    assert report.plan["kind"] == "instruction"
    assert report.after["eval_loss"] < report.before["eval_loss"]
    assert report.samples[0]["prompt"].endswith("### Response:\n")


@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_a_base_that_lacks_weights_is_refused(root, tmp_path, model):
    """Else they would be drawn anew, and the run would train an adapter of a model that was never trained."""
    shutil.copytree(root / model, tmp_path / model)
    weights = load_file(tmp_path / model / "model.safetensors")
    for name in [name for name in weights if "layers.1." in name or "layer.1." in name]:
        del weights[name]
    save_file(weights, tmp_path / model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{model}' .* lacks \d+ weights"):
        finetune(tiny_recipe(root, tmp_path / model, root / "sst2"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_encoder_answers_no_instructions(root, tmp_path):
    """It has no head to predict with; a new one would be random."""
    recipe = tiny_recipe(root, root / "encoder", root / "instructions.jsonl", task=None)
    with pytest.raises(CheckpointError, match=r"encoder' \(bert\) lacks \d+ weights"):
        finetune(recipe, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(root, monkeypatch):
    original = TaskTrainer.compute_loss
    monkeypatch.setattr(TaskTrainer, "compute_loss", lambda *a, **k: original(*a, **k) * float("nan"))
    monkeypatch.setattr(TaskTrainer, "evaluate", lambda *a, **k: {})
    with pytest.raises(TrainingError, match="the loss is not finite at step 1"):
        finetune(tiny_recipe(root, root / "encoder", root / "sst2"), root / "nan")


def test_the_head_takes_its_own_rate(root):
    model = AutoModelForSequenceClassification.from_pretrained(root / "encoder")
    adapted = attach(model, AdapterConfig(method="lora", r=2), "classification").model
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    split_off_head(optimizer, adapted, 5e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (5e-4 if "modules_to_save" in name else 1e-3), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lor2cc"}, "the nearest is lor2c"),
        ({"method": "lora", "max_fuses": 2}, "max_fuses is for mergelor2c and imlor2c"),
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"method": "mergelor2c", "max_fuses": "many"}, "max_fuses='many' must be auto"),
        ({"method": "mergelor2c", "parameter_budget": 99}, "parameter_budget: only for max_fuses=auto"),
        ({"method": "lora", "validation_budget": 0.1}, "validation_budget: only for"),
        ({"method": "lora", "reads": "output"}, "reads='output': only for LoR2C"),
        ({"reads": "both"}, "reads='both' must be one of input, output"),
    ],
)
def test_adapters_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**settings)


def test_what_lor2c_reads_reaches_its_configuration(root):
    model = AutoModelForSequenceClassification.from_pretrained(root / "encoder")
    adapted = attach(model, AdapterConfig(r=2, reads="output"), "classification").model
    assert adapted.peft_config["default"].reads == "output"


def test_budgets_of_auto_reach_the_callback(root):
    model = AutoModelForSequenceClassification.from_pretrained(root / "encoder")
    budgets = {"parameter_budget": 99, "validation_budget": 0.5, "auto_threshold": 0.2}
    adapter = AdapterConfig(method="imlor2c", r=2, max_fuses="auto", max_injections="auto", **budgets)
    (callback,) = attach(model, adapter, "classification").callbacks
    assert {name: getattr(callback, name) for name in budgets} == budgets


def test_counts_that_the_model_does_not_allow_are_refused_before_anything_is_written(root):
    recipe = tiny_recipe(root, root / "encoder", root / "sst2", method="mergelor2c")
    recipe.adapter.max_fuses = 4
    with pytest.raises(ConfigError, match="max_fuses=4 is more than an adapter of 4 blocks allows"):
        finetune(recipe, root / "too-many")
    recipe = tiny_recipe(root, root / "decoder", root / "instructions.jsonl", task=None, method="head")
    with pytest.raises(ConfigError, match="method='head' trains the new head"):
        finetune(recipe, root / "too-many")
    recipe = tiny_recipe(root, root / "nowhere", root / "sst2")
    with pytest.raises(CheckpointError, match="nowhere"):
        finetune(recipe, root / "too-many")
    assert not (root / "too-many").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lor2c", "imlor2c", "lora", "full", "head"])
def test_what_trains_is_float32(method, dtype, root, tmp_path):
    """A head in bfloat16 did not move at a usual rate: 5e-5 is less than half a unit in its last place."""
    model = AutoModelForSequenceClassification.from_pretrained(root / "encoder").to(dtype)
    model.base_model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(root / "encoder").save_pretrained(tmp_path / "base")
    kept = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            assert {p.dtype for p in trained.values()} == {torch.float32}
            kept.append({name: p.detach().clone() for name, p in trained.items() if "classifier" in name})

        def on_train_end(self, args, state, control, model=None, **kwargs):
            after = dict(model.named_parameters())
            kept.append({name: after[name].detach().clone() for name in kept[0]})

    settings = {"num_train_epochs": 1, "learning_rate": 5e-5, "eval_strategy": "no"}
    train_once(tiny_recipe(tmp_path, tmp_path / "base", root / "sst2", method=method, **settings), [Watch()])
    assert kept[0]
    for name, before in kept[0].items():
        assert (kept[1][name] != before).float().mean() > 0.9
