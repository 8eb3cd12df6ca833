"""The same rows give the same loss and gradient, however they are divided; every setting that changes a loss does what
its formula says."""

import json

import pytest
import torch
from transformers import BertConfig, Trainer, TrainingArguments

from crosslayer.data.tasks import load_task
from crosslayer.train import build_finetune_recipe
from crosslayer.train.finetune import build_arguments, load_base, make_trainer
from crosslayer.train.losses import NextTokenLoss, RowLoss, without_repeats
from crosslayer.train.methods import attach
from model_cases import model_of, tokens
from tiny_finetune import rows_of, tiny_content, write_decoder, write_encoder, write_instructions, write_rows

ROWS = 22  # steps of 8, 8 and 6 rows
DIVISIONS = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("losses")
    encoder = write_encoder(root / "encoder")
    config = BertConfig.from_pretrained(encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.save_pretrained(encoder)
    write_decoder(root / "decoder")
    for part, count, seed in (("train", ROWS, 0), ("validation", 11, 1)):
        rows = rows_of(count, seed)
        rows[3]["score"] = -100.0  # a score like any other, though transformers skips labels of that value
        write_rows(root / "task" / f"{part}.jsonl", rows)
    for part, count in (("train", ROWS), ("validation", 11)):
        write_instructions(root / "instructions" / f"{part}.jsonl", count)
    return root


def trainer_of(root, kind, method="lora", **training):
    """A Trainer that has not begun; the model and the rows are the same each time."""
    model = root / ("decoder" if kind in ("instruction", "crnet") else "encoder")
    data = root / ("instructions" if kind == "instruction" else "task")
    settings = {
        "num_train_epochs": 1,
        "logging_steps": 1,
        "max_grad_norm": 1e9,
        "eval_strategy": "no",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        **training,
    }
    content = tiny_content(root, model, data, method=method, task=None, **settings)
    content["data"] |= {"task": "classification" if kind == "crnet" else kind, "max_length": 64}
    if kind != "instruction":
        content["data"] |= {"label_column": "score" if kind == "regression" else "label"}
    content["adapter"]["dropout"] = 0.0
    recipe = build_finetune_recipe(content)
    task = load_task(recipe.data)
    arguments = build_arguments(recipe, task, root / "unused")
    torch.manual_seed(0)
    base, tokenizer = load_base(recipe.model, task, recipe.adapter)
    return make_trainer(recipe, task, attach(base, recipe.adapter, task.kind), tokenizer, arguments)


def steps_of(trainer):
    """[(loss, gradient norm)] of every step."""
    trainer.train()
    return [(line["loss"], float(line["grad_norm"])) for line in trainer.state.log_history if "grad_norm" in line]


CASES = [
    ("classification", "lora"),
    ("classification", "lor2c"),
    ("classification", "full"),
    ("classification", "head"),
    ("crnet", "lor2c"),
    ("regression", "lora"),
    ("regression", "full"),
    ("instruction", "lor2c"),
    ("instruction", "lora"),
    ("instruction", "full"),
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_accumulation_changes_neither_loss_nor_gradient(root, kind, method):
    runs = []
    for batch, accumulation in DIVISIONS:
        division = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        runs.append(steps_of(trainer_of(root, kind, method, **division)))
    assert len(runs[0]) == 3
    for run in runs[1:]:
        for (loss, norm), (expected_loss, expected_norm) in zip(run, runs[0], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-4)
            assert norm == pytest.approx(expected_norm, rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["classification", "crnet", "regression", "instruction"])
def test_the_loss_of_a_step_is_the_written_out_formula(root, kind, smoothing):
    if kind == "regression" and smoothing:
        pytest.skip("refused: there are no classes to smooth")
    trainer = trainer_of(
        root,
        kind,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        max_steps=1,
        label_smoothing_factor=smoothing,
    )
    rows = [trainer.train_dataset[index] for index in range(9)]
    expected = formula(trainer, rows, smoothing)
    assert steps_of(trainer)[0][0] == pytest.approx(expected, rel=1e-4)


def formula(trainer, rows, smoothing):
    """The mean over predictions, one row at a time, in float64."""
    total, count = 0.0, 0
    for row in rows:
        batch = trainer.data_collator([{k: v for k, v in row.items() if k not in ("prompt", "completion")}])
        batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = trainer.model(**batch).logits.double()
        if trainer.__class__.__name__ == "InstructionTrainer":
            logits, labels = logits[0, :-1], labels[0, 1:]
            logits, labels = logits[labels != -100], labels[labels != -100]
        elif logits.shape[-1] == 1:
            total, count = total + (logits[0, 0] - labels[0].double()).item() ** 2, count + 1
            continue
        log_p = logits.log_softmax(-1)
        of_label = -log_p.gather(-1, labels[:, None])[:, 0]
        total += ((1 - smoothing) * of_label - smoothing * log_p.mean(-1)).sum().item()
        count += len(labels)
    return total / count


@pytest.mark.parametrize("kind", ["classification", "regression", "instruction"])
def test_the_validation_loss_does_not_depend_on_the_batches(root, kind):
    losses = []
    for size in (1, 3, 4, 11):
        trainer = trainer_of(root, kind, per_device_eval_batch_size=size, label_smoothing_factor=0.0)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert losses[0] == pytest.approx(formula(trainer, list(trainer.eval_dataset), 0.0), rel=1e-5)


@pytest.mark.parametrize("kind", ["classification", "instruction"])
def test_the_validation_loss_is_without_smoothing(root, kind):
    plain, smooth = (trainer_of(root, kind, label_smoothing_factor=e).evaluate()["eval_loss"] for e in (0.0, 0.3))
    assert smooth == pytest.approx(plain, rel=1e-6)


def test_repeated_rows_do_not_count():
    labels = torch.tensor([1, 0, 1, 1])
    assert without_repeats(labels, 4, 6).tolist() == [1, 0, -100, -100]
    assert without_repeats(labels, 0, 6).tolist() == labels.tolist()
    assert without_repeats(labels[:, None].repeat(1, 2), 4, 5).tolist() == [[1, 1], *[[-100, -100]] * 3]
    assert without_repeats(labels.float(), 4, 5).isnan().tolist() == [False, True, True, True]


def test_rows_that_do_not_count_change_no_loss():
    logits, scores = torch.randn(4, 3), torch.randn(4, 1)
    classes, values = torch.tensor([2, 0, -100, 1]), torch.tensor([0.5, -100.0, float("nan"), 2.0])
    kept = [0, 1, 3]
    for is_regression, output, labels in ((False, logits, classes), (True, scores, values)):
        loss = RowLoss(is_regression)
        assert loss({"logits": output}, labels) == pytest.approx(loss({"logits": output[kept]}, labels[kept]).item())
        of_step = loss({"logits": output}, labels, torch.tensor(6))
        assert of_step * 2 == pytest.approx(loss({"logits": output}, labels).item())
        for_each_of_two = torch.tensor(6)[None].expand(2, -1)  # what the Trainer hands over with two devices
        assert loss({"logits": output}, labels, for_each_of_two) * 2 == pytest.approx(of_step.item())
    ids = torch.tensor([[1, 2, 3], [4, -100, -100]])
    output = {"logits": torch.randn(2, 3, 8)}
    loss = NextTokenLoss(0.1)
    assert loss(output, ids) == pytest.approx(loss({"logits": output["logits"][:1]}, ids[:1]).item())


def test_a_classifier_of_our_own_in_a_plain_trainer(root, tmp_path):
    """Its loss is a mean over a batch, and it says so to transformers, which else would not divide by the batches."""
    from transformers import Trainer, TrainingArguments

    from crosslayer import CRNetForSequenceClassification

    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = CRNetForSequenceClassification.from_pretrained(root / "decoder", num_labels=2)
        rows = [{"input_ids": [index % 50 + 3] * 6, "labels": index % 2} for index in range(8)]
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            train_sampling_strategy="sequential",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        losses.append(steps_of(trainer)[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_settings_reach_the_log(root, tmp_path):
    """json: a float32 from numpy would not."""
    trainer = trainer_of(root, "classification")
    json.dumps(trainer.evaluate())


# ------------------------------------------------------------------------------------------------- pre-training


def pretrainer_of(root, **training):
    """A Trainer on the first blocks in order, that has not begun."""
    from transformers import default_data_collator

    from crosslayer.data import prepare_data
    from crosslayer.train.run import build_arguments, build_model, build_model_config
    from crosslayer.train.trainer import PretrainTrainer
    from tiny_run import tiny_recipe

    settings = {
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "max_grad_norm": 1e9,
        "warmup_steps": 0,
    }
    recipe = tiny_recipe(root / "pretrain", train_sampling_strategy="sequential", **{**settings, **training})
    prepared = prepare_data(recipe.data)
    return PretrainTrainer(
        model=build_model(build_model_config(recipe, prepared.tokenizer), 0),
        args=build_arguments(recipe, root / "unused"),
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        processing_class=prepared.tokenizer,
        data_collator=default_data_collator,
        parameter_groups=recipe.parameter_groups,
        block_size=recipe.data.block_size,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_pretraining_smooths_the_next_token(root, smoothing):
    settings = {"max_steps": 1, "label_smoothing_factor": smoothing}
    trainer = pretrainer_of(root, per_device_train_batch_size=4, **settings)
    total, count = 0.0, 0
    for row in trainer.train_dataset.select(range(4)):
        ids, positions = (torch.tensor(row[name])[None] for name in ("input_ids", "position_ids"))
        with torch.no_grad():
            log_p = trainer.model(input_ids=ids, position_ids=positions).logits[0, :-1].double().log_softmax(-1)
        labels = torch.tensor(row["labels"])[1:]
        log_p, labels = log_p[labels != -100], labels[labels != -100]
        of_label = -log_p.gather(-1, labels[:, None])[:, 0]
        total += ((1 - smoothing) * of_label - smoothing * log_p.mean(-1)).sum().item()
        count += len(labels)
    whole = steps_of(trainer)[0]
    assert whole[0] == pytest.approx(total / count, rel=1e-5)
    divided = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert steps_of(pretrainer_of(root, **divided, **settings))[0] == pytest.approx(whole, rel=1e-4)


def test_incomplete_last_steps_of_pretraining(root):
    """A pass that does not fill its last step: the same rows, the same loss."""
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        division = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = pretrainer_of(root, max_steps=-1, num_train_epochs=1, dataloader_drop_last=False, **division)
        trainer.train_dataset = trainer.train_dataset.select(range(22))
        runs.append(steps_of(trainer))
    assert len(runs[0]) == 3
    for step, expected in zip(runs[1], runs[0], strict=True):
        assert step == pytest.approx(expected, rel=1e-3)


def test_neftune_adds_its_noise(root, monkeypatch):
    """arXiv 2310.05914: uniform noise of at most alpha / sqrt(T d) on the embeddings, while training."""
    from crosslayer.train.trainer import PretrainTrainer

    trainer = pretrainer_of(root, max_steps=1, neftune_noise_alpha=50.0, per_device_train_batch_size=2)
    original = PretrainTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        torch.manual_seed(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "compute_loss", compute_loss)
    rows = trainer.train_dataset[:2]
    ids, positions, labels = (torch.tensor(rows[name]) for name in ("input_ids", "position_ids", "labels"))
    with torch.no_grad():
        embedded = trainer.model.model.embed_tokens(ids)
        plain = trainer.model(inputs_embeds=embedded, position_ids=positions, labels=labels).loss.item()
        torch.manual_seed(1)
        bound = 50.0 / (ids.shape[1] * embedded.shape[-1]) ** 0.5
        noisy = embedded + torch.zeros_like(embedded).uniform_(-bound, bound)
        expected = trainer.model(inputs_embeds=noisy, position_ids=positions, labels=labels).loss.item()
    assert abs(expected - plain) > 1e-3
    assert steps_of(trainer)[0][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_plain_trainer_shifts_the_labels_of_a_cr_net(smoothing, tmp_path):
    """transformers' own Trainer, which asks a table of names; without the shift a model learns to copy its input."""
    model = model_of("cross_layer")
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=smoothing, use_cpu=True, report_to="none")
    trainer = Trainer(model=model, args=arguments)
    ids = tokens()
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    expected = torch.nn.functional.cross_entropy(
        model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=smoothing
    )
    torch.testing.assert_close(loss, expected)


def test_an_evaluation_forks_no_workers(root):
    """Its rows are at hand, and it comes often: training's workers are not made anew for each."""
    workers = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True}
    workers["dataloader_multiprocessing_context"] = "fork"
    trainer = pretrainer_of(root, max_steps=1, dataloader_drop_last=True, **workers)
    evaluation, training = trainer.get_eval_dataloader(), trainer.get_train_dataloader()
    assert (evaluation.num_workers, training.num_workers) == (0, 2)
    assert sum(len(batch["input_ids"]) for batch in evaluation) == len(trainer.eval_dataset)
    assert trainer.args.dataloader_drop_last
    assert {name: getattr(trainer.args, name) for name in workers} == workers
