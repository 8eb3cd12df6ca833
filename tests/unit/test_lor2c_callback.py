"""Fuse and inject inside a Trainer: when, which, the record, and a resumed run that is the uninterrupted one."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from crosslayer import LoR2CConfig, LoR2CStructureCallback
from crosslayer.errors import ConfigError
from crosslayer.lor2c import AdaptedBlocks
from crosslayer.lor2c import callback as callback_module
from lor2c_cases import base_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

generator = torch.Generator().manual_seed(1)
DATA = [
    {"input_ids": torch.randint(3, 53, (6,), generator=generator), "labels": row % 2} for row in range(16)
]  # four steps an epoch


class StopAfter(TrainerCallback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch >= self.epoch


def adapted(**options):
    torch.manual_seed(0)
    config = LoR2CConfig(r=4, task_type="SEQ_CLS", injectable=True, **options)
    return get_peft_model(base_model("roberta"), config)


def trainer(folder, callback, epochs=4, more=(), model=None, **options):
    arguments = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    model = adapted() if model is None else model
    arguments = TrainingArguments(folder, **arguments)
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA, callbacks=[callback, *more])


def losses(a_trainer):
    return [entry["loss"] for entry in a_trainer.state.log_history if "loss" in entry]


def events(callback):
    return [(entry["step"], entry["action"], entry["blocks"]) for entry in callback.history]


def every_epoch(**options):
    return LoR2CStructureCallback(max_fuses=1, max_injections=1, interval=1, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    callback = every_epoch()
    run = trainer(str(tmp_path_factory.mktemp("run")), callback, load_best_model_at_end=True)
    run.train()
    return run, callback


def test_fuses_before_it_injects_and_records_both(uninterrupted):
    _, callback = uninterrupted
    assert [(step, action) for step, action, _ in events(callback)] == [(4, "fuse"), (4, "inject")]
    fuse, inject = callback.history
    assert fuse["owner"] == fuse["blocks"][0]
    assert fuse["names"] == [f"roberta.encoder.layer.{block}" for block in fuse["blocks"]]
    assert [score["blocks"] for score in fuse["scores"]] == [[0], [1], [2]]
    sums = [a["score"] + b["score"] for a, b in zip(fuse["scores"], fuse["scores"][1:], strict=False)]
    assert fuse["blocks"][0] == sums.index(min(sums))
    assert fuse["adapter_parameters"] == 2 * 2 * 32 * 4
    assert inject["adapter_parameters"] == fuse["adapter_parameters"]
    assert len(inject["scores"]) == 2
    json.dumps(callback.history)


def test_everything_in_use_moves_after_the_changes(tmp_path):
    class Watch(TrainerCallback):
        before = None

        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            blocks = AdaptedBlocks(model)
            if blocks.structure.fuses and self.before is None:
                self.before = [(parameter, parameter.detach().clone()) for parameter in blocks.parameters()]

    watch = Watch()
    run = trainer(str(tmp_path), every_epoch(), more=[watch], save_strategy="no")
    run.train()
    in_use = {id(parameter) for parameter in AdaptedBlocks(run.model).parameters_in_use()}
    assert len(in_use) == 2 + 4
    for parameter, before in watch.before:
        assert torch.equal(parameter, before) == (id(parameter) not in in_use)


@pytest.mark.parametrize("stopped_after", [1, 2])
def test_resumed_is_uninterrupted(uninterrupted, tmp_path, stopped_after):
    """Killed right after the changes, and an epoch later."""
    expected, callback = uninterrupted
    trainer(str(tmp_path), every_epoch(), more=[StopAfter(stopped_after)]).train()
    resumed_callback = every_epoch()
    resumed = trainer(str(tmp_path), resumed_callback, load_best_model_at_end=True)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(expected)
    assert resumed_callback.history == callback.history
    assert AdaptedBlocks(resumed.model).structure == AdaptedBlocks(expected.model).structure
    different = trainer(str(tmp_path), LoR2CStructureCallback(), save_strategy="no")
    different.train()
    assert losses(different)[:4] == losses(expected)[:4]
    assert losses(different)[5:] != losses(expected)[5:], "the changes changed nothing: the check could not fail"


def test_best_model_comes_back_with_its_structure(tmp_path):
    """The best epoch is made the first one, before any change."""
    run = trainer(
        str(tmp_path),
        LoR2CStructureCallback(max_fuses=2, interval=2),
        load_best_model_at_end=True,
        learning_rate=0.5,
        metric_for_best_model="loss",
        save_total_limit=5,
    )
    run.train()
    evaluations = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = evaluations.index(min(evaluations))
    assert run.evaluate()["eval_loss"] == min(evaluations)
    assert AdaptedBlocks(run.model).structure.fuses == (best + 1) // 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_fuses": 1}, [(4, "fuse")]),  # int(4 / 4 / 1) + 1 = 2 epochs of 2 steps
        ({"max_fuses": 1, "interval": 3}, [(6, "fuse")]),
        ({"max_fuses": 2, "interval": 3, "interval_unit": "steps"}, [(3, "fuse"), (6, "fuse")]),
        ({"max_injections": 2, "interval_unit": "steps"}, [(2, "inject"), (4, "inject")]),  # int(8 / 4 / 2) + 1
        ({"max_fuses": 2, "interval": 1, "max_span": 2}, [(2, "fuse")]),
        ({"max_fuses": 1, "max_injections": 1, "interval": 1, "criterion": "alignment"}, [(2, "fuse"), (2, "inject")]),
        ({"max_fuses": 1, "interval": 1, "criterion": "stable_rank", "survivor": "higher_score"}, [(2, "fuse")]),
        ({"max_injections": 1, "interval": 1, "criterion": "mean_singular_value"}, [(2, "inject")]),
        ({"max_injections": 1, "interval": 1, "criterion": "official"}, [(2, "inject")]),
    ],
)
def test_schedule(tmp_path, options, expected):
    callback = LoR2CStructureCallback(**options)
    quiet = {"save_strategy": "no", "eval_strategy": "no", "per_device_train_batch_size": 8}
    run = trainer(str(tmp_path), callback, **quiet)
    run.train()
    assert [(step, action) for step, action, _ in events(callback)] == expected
    assert [entry["lor2c_blocks"] for entry in run.state.log_history if "lor2c_action" in entry] == [
        entry["blocks"] for entry in callback.history
    ]


def test_says_when_fewer_changes_came_about(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(callback_module.logger, "warning", said.append)
    callback = LoR2CStructureCallback(max_fuses=2, interval=3)
    trainer(str(tmp_path), callback, save_strategy="no", eval_strategy="no", epochs=4).train()
    assert len(callback.history) == 1
    assert [text.partition(":")[0] for text in said] == ["1 of 2 fuses came about"]


def test_data_without_length_counts_in_steps(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from DATA

    def run(**options):
        callback = LoR2CStructureCallback(max_fuses=1, interval=2, **options)
        arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True)
        Trainer(adapted(), arguments, train_dataset=Endless(), callbacks=[callback]).train()
        return callback

    with pytest.raises(ConfigError, match="interval_unit='steps'"):
        run()
    assert [entry["step"] for entry in run(interval_unit="steps").history] == [2]


def test_native_adapter_without_a_peft_model(tmp_path):
    model = base_model("roberta")
    model.add_adapter(LoR2CConfig(r=4, injectable=True))
    callback, numbers = every_epoch(), []
    callback.log = numbers.append
    trainer(str(tmp_path), callback, model=model, save_strategy="no", eval_strategy="no", epochs=2).train()
    assert [action for _, action, _ in events(callback)] == ["fuse", "inject"]
    assert numbers[-1] == {"lor2c_fuses": 1.0, "lor2c_injections": 1.0, "lor2c_adapter_parameters": 512.0}


class TestAuto:
    """`max_*="auto"` with spectra made by hand: blocks 0 and 1 carry the same update, block 2 half a rank."""

    def model(self):
        model = adapted()
        layers = AdaptedBlocks(model).layers
        with torch.no_grad():
            same = [torch.randn(4, 32), torch.randn(32, 4)]
            for layer, (A, B) in zip(layers, [same, same, [torch.randn(4, 32), torch.randn(32, 4)]], strict=True):
                layer.lor2c_A["default"].weight.copy_(A)
                layer.lor2c_B["default"].weight.copy_(B)
            layers[2].lor2c_B["default"].weight[:, 2:] = 0
        return model

    def run(self, folder, learning_rate=1e-9, **options):
        callback = LoR2CStructureCallback(interval=1, **options)
        run = trainer(folder, callback, epochs=6, model=self.model(), learning_rate=learning_rate, save_strategy="no")
        run.train()
        return [(entry["action"], entry["blocks"]) for entry in callback.history]

    def test_spectra_decide(self, tmp_path):
        assert self.run(str(tmp_path), max_fuses="auto", criterion="alignment") == [("fuse", [0, 1])]
        assert self.run(str(tmp_path), max_injections="auto") == [("inject", [2])]

    def test_a_looser_threshold_changes_more_but_only_in_the_first_half(self, tmp_path):
        found = self.run(str(tmp_path), max_injections="auto", auto_threshold=1.0)
        assert len(found) == 3

    def test_parameter_budget(self, tmp_path):
        options = {"max_fuses": "auto", "criterion": "alignment", "auto_threshold": 1.0}
        assert len(self.run(str(tmp_path), **options)) == 2
        assert len(self.run(str(tmp_path), parameter_budget=512, **options)) == 1
        assert self.run(str(tmp_path), parameter_budget=768, **options) == []

    def test_validation_budget(self, tmp_path):
        """The base gives the first evaluation; a change that costs more than the budget is the last one."""
        options = {"max_injections": "auto", "auto_threshold": 1.0}
        assert len(self.run(str(tmp_path), validation_budget=-1e9, **options)) < 3
        assert len(self.run(str(tmp_path), validation_budget=1e9, **options)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_fuses": -1}, "max_fuses=-1 must be 0, a positive integer or 'auto'"),
        ({"max_injections": "many"}, "max_injections='many'"),
        ({"interval": 0}, "interval=0 must be at least 1"),
        ({"interval_unit": "batches"}, "interval_unit='batches' is none of steps, epochs"),
        ({"criterion": "sfs2"}, "criterion='sfs2' is none of sfs, official"),
        ({"survivor": "both"}, "survivor='both' is none of first, higher_score"),
        ({"max_span": 1}, "max_span=1 must be at least 2"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        LoR2CStructureCallback(**options)


def test_wrong_models(tmp_path):
    plain = get_peft_model(base_model("roberta"), LoR2CConfig(r=4))
    with pytest.raises(ConfigError, match="injectable=True"):
        trainer(str(tmp_path), LoR2CStructureCallback(max_injections=1), model=plain).train()
    with pytest.raises(ConfigError, match="max_fuses=3 is more than an adapter of 3 blocks allows"):
        trainer(str(tmp_path), LoR2CStructureCallback(max_fuses=3), model=plain).train()
    lora = get_peft_model(base_model("roberta"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ConfigError, match="no LoR2C adapter"):
        trainer(str(tmp_path), LoR2CStructureCallback(max_fuses=1), model=lora).train()
