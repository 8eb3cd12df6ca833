"""One fine-tuning run: from a recipe to a folder with an adapter, a log and a report.

output_dir/
  recipe.yaml, run.json     as in pre-training      checkpoint-N/   for --resume
  adapter/ or model/        the best checkpoint     log.jsonl       one line per log
  report.json, report.md    the final table         structure.png   of methods that change it
"""

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.distributed import DistributedConfig

from ..data.fit import check_ids, input_length
from ..data.tasks import Task, load_task, tokenize
from ..errors import CheckpointError, ConfigError, TrainingError
from ..evaluate.task_metrics import check_metrics_available
from ..loading import ADAPTER_FOLDER, MODEL_FOLDER, load_pretrained
from ..provenance import describe_run
from .arguments import check_metric, describe_device, nothing_left_behind, training_arguments
from .finetune_report import FinetuneReport, write_finetune_report
from .methods import CHANGING, AdapterConfig, Attached, attach, count_trained, head_parameters
from .progress import shows_bars
from .recipe import FinetuneRecipe, build_finetune_recipe, read_recipe
from .resume import (
    changes_of_section,
    changes_of_training,
    check_fingerprints,
    check_same_run,
    earlier_fingerprints,
    find_checkpoint,
    fingerprint_of_rows,
    fingerprint_of_weights,
    forget_after,
    is_finished,
    tell_changes,
)
from .run_folder import (
    RECIPE_FILE,
    check_output_dir,
    is_main_process,
    peak_memory_bytes,
    prepare_output_dir,
    read_json,
    write_json,
)
from .task_trainer import TaskTrainer
from .trainer import SafeTrainer


@dataclass(kw_only=True)
class FinetunePlan:
    """What a run would do, decided before its first step."""

    recipe: str
    model: str
    task: str
    kind: str
    metrics: tuple[str, ...]
    method: str
    device: str
    device_reason: str
    precision: str
    parameters: int
    trained: dict[str, int]
    source: str
    labels: tuple[str, ...]
    train_rows: int
    validation_rows: int
    steps: int
    rows_per_step: int


def finetune(
    recipe: FinetuneRecipe,
    output_dir: str | Path,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    show_plan: Callable[[FinetunePlan], None] = lambda plan: None,
) -> FinetuneReport | None:
    """Run a recipe; arguments as in `run.pretrain`.

    Raises ConfigError, DataError, CheckpointError before anything is written, TrainingError while running.
    """
    started, output_dir = time.monotonic(), Path(output_dir)
    resume = resume or resume_from is not None
    if is_main_process():
        check_output_dir(output_dir, resume=resume, overwrite=overwrite)
    changes: list[str] = []
    if resume:
        earlier, changes = _check_same_finetuning(recipe, output_dir)
    task = load_task(recipe.data)
    if task.kind != "instruction":
        check_metrics_available()
    arguments = build_arguments(recipe, task, output_dir)
    if resume:
        changes += changes_of_training(arguments, build_arguments(earlier, task, output_dir), output_dir)
    is_frozen = task.kind == "instruction" and recipe.adapter.is_peft  # others train a head, or everything
    mesh = recipe.parallel.check_frozen(arguments.world_size, is_frozen=is_frozen)
    set_seed(arguments.seed)
    model, tokenizer = load_base(recipe.model, task, recipe.adapter, mesh)
    if mesh is not None and recipe.adapter.method in CHANGING and model.config.model_type.startswith("crnet"):
        # Its blocks name all parameters to autograd, and the Trainer averages a gradient where an idle one has none.
        raise ConfigError(
            f"fsdp_size={recipe.parallel.fsdp_size} with method={recipe.adapter.method!r} is not known for a CR-Net; "
            "give lor2c, sharelor2c or lora, or fsdp_size=1"
        )
    max_length = input_length(recipe.data.max_length, model)
    # Of a model that processes share, all of them have a part.
    fingerprints = _fingerprints_of(task, model, tokenizer) if mesh is not None or is_main_process() else {}
    if resume and is_main_process():
        check_fingerprints(fingerprints, output_dir)
    attached = attach(model, recipe.adapter, task.kind)
    if task.kind == "instruction":
        from .instruct import check_answers_fit

        check_answers_fit(task.train, tokenizer, max_length)
    plan = make_plan(recipe, task, attached.model, arguments)
    if is_main_process():
        show_plan(plan)
    if dry_run:
        return None
    finished: Any = read_json(output_dir / "report.json") if resume and resume_from is None else None
    if is_finished(finished, plan.steps, output_dir):
        tell_changes(changes, f"{output_dir} has taken all its steps; not applied")
        return FinetuneReport(**finished)
    checkpoint = find_checkpoint(arguments, output_dir, plan.steps, resume_from) if resume else None
    tell_changes(changes, f"{output_dir} goes on with other settings than it was begun with")

    with nothing_left_behind(output_dir):
        trainer = make_trainer(recipe, task, attached, tokenizer, arguments)
        trainer.stopping.count_from(started)
        trainer.check_optimizer(plan.steps)
    if is_main_process():
        prepare_output_dir(output_dir, recipe, plan, fingerprints, overwrite=overwrite)
        if resume_from is not None:
            forget_after(output_dir, resume_from)
    return _train(recipe, task, attached, trainer, plan, output_dir, checkpoint)


def _train(
    recipe: FinetuneRecipe,
    task: Task,
    attached: Attached,
    trainer: SafeTrainer,
    plan: FinetunePlan,
    output_dir: Path,
    checkpoint: Path | None,
) -> FinetuneReport:
    started = time.perf_counter()
    arguments, tokenizer = trainer.args, trainer.processing_class
    before = None if checkpoint is None else read_json(output_dir / "before.json")
    if before is None:
        before = trainer.evaluate()
        trainer.state.log_history.clear()
        if is_main_process():
            write_json(output_dir / "before.json", before)
    trainer.run(checkpoint)
    history = list(trainer.state.log_history)
    after = trainer.evaluate()  # of the best checkpoint, which is the model now
    seconds, peak = time.perf_counter() - started, peak_memory_bytes(arguments.device)
    samples: list[dict[str, str]] = []
    try:
        trainer.save_model(str(output_dir / (ADAPTER_FOLDER if recipe.adapter.is_peft else MODEL_FOLDER)))
        if task.kind == "instruction":
            from .instruct import sample_answers

            samples = sample_answers(attached.model, tokenizer, task.validation)
        report = FinetuneReport(
            recipe=recipe.to_dict(),
            run=describe_run(),
            plan=asdict(plan),
            seed=arguments.seed,
            before=before,
            after=after,
            steps=trainer.state.global_step,
            best_step=trainer.state.best_global_step if trainer.state.best_model_checkpoint else None,
            trained=count_trained(attached.model),
            structure=attached.history,
            blocks=number_of_blocks(attached.model),
            peak_memory_bytes=peak,
            seconds=seconds,
            history=history,
            samples=samples,
        )
        if arguments.should_save:
            write_finetune_report(output_dir, report)
    except OSError as error:
        raise TrainingError(
            f"results could not be written ({error.strerror}); {trainer.last_good_checkpoint()}"
        ) from error
    return report


@dataclass
class Measured:
    """What `train_once` measured."""

    attached: Attached
    metrics: dict[str, float]
    """The task's metrics (the deciding one first) and the loss, after the last step."""
    steps: int


def train_once(recipe: FinetuneRecipe, callbacks: Sequence[TrainerCallback] = ()) -> Measured:
    """Train and evaluate without a run folder, for benchmarks and sweeps: nothing is kept but what is returned.

    The recipe should have `eval_strategy: no`, so that nothing is chosen on the validation rows.
    """
    task = load_task(recipe.data)
    with tempfile.TemporaryDirectory() as folder:
        arguments = build_arguments(recipe, task, Path(folder))
        set_seed(arguments.seed)
        model, tokenizer = load_base(recipe.model, task, recipe.adapter)
        attached = attach(model, recipe.adapter, task.kind)
        attached.callbacks += callbacks
        trainer = make_trainer(recipe, task, attached, tokenizer, arguments)
        trainer.train()
        metrics = trainer.evaluate()
    named = dict.fromkeys([*task.metrics, "loss"])
    return Measured(attached, {name: metrics[f"eval_{name}"] for name in named}, trainer.state.global_step)


# ---------------------------------------------------------------------------------------------------- building


def load_base(
    name: str, task: Task, adapter: AdapterConfig, mesh: DistributedConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pre-trained model, with a new head where the task needs one, and its tokenizer; of a mesh, our part of it.

    Weights keep their dtype when they stay frozen and are float32 when they train. Raises CheckpointError.
    """
    settings: dict[str, Any] = {"dtype": "auto" if adapter.is_peft else torch.float32}
    if mesh is not None:
        settings["distributed_config"] = mesh
    auto_class = "AutoModelForCausalLM"
    if task.kind != "instruction":
        auto_class = "AutoModelForSequenceClassification"
        settings["num_labels"] = len(task.labels) or 1
        settings["problem_type"] = "regression" if task.kind == "regression" else "single_label_classification"
        if task.labels:
            settings["id2label"] = dict(enumerate(task.labels))
            settings["label2id"] = {label: index for index, label in enumerate(task.labels)}
    model, tokenizer = load_pretrained(name, auto_class, **settings)
    check_special(tokenizer, task, name)
    check_ids(tokenizer, model, f"model {name!r}")
    model.config.pad_token_id = tokenizer.pad_token_id  # a head on top reads the last token before it
    return model, tokenizer


def check_special(tokenizer: PreTrainedTokenizerBase, task: Task, name: str) -> None:
    """Give the tokenizer a padding token where it has none. Raises ConfigError where it has nothing to pad or end
    with."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    missing = "pad_token" if tokenizer.pad_token_id is None else None
    if task.kind == "instruction" and tokenizer.eos_token_id is None:
        missing = "eos_token"  # nothing would tell where an answer ends
    if missing:
        raise ConfigError(f"model {name!r}: its tokenizer has no {missing}; set one in its tokenizer_config.json")


def build_arguments(recipe: FinetuneRecipe, task: Task, output_dir: Path) -> TrainingArguments:
    """TrainingArguments of a recipe (SFTConfig for instructions). Raises ConfigError."""
    settings = {**default_training(task, recipe.adapter), **recipe.training}
    settings.setdefault("save_strategy", settings["eval_strategy"])
    if settings["save_strategy"] == "steps" and "eval_steps" in settings:
        settings.setdefault("save_steps", settings["eval_steps"])
    keeps_best = settings["eval_strategy"] != "no" and settings["save_strategy"] != "no"
    settings.setdefault("load_best_model_at_end", keeps_best)
    settings["metric_for_best_model"] = settings.get("metric_for_best_model") or task.metrics[0]
    settings.setdefault("greater_is_better", settings["metric_for_best_model"].removeprefix("eval_") != "loss")
    if task.kind == "instruction":
        from .instruct import instruction_arguments

        arguments = instruction_arguments(settings, recipe.data.max_length, output_dir)
    else:
        arguments = training_arguments(TrainingArguments, settings, output_dir)
    check_metric(arguments, tuple(dict.fromkeys([*task.metrics, "loss"])))
    if task.kind == "regression" and arguments.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor={arguments.label_smoothing_factor:g} smooths classes, and {task.name} has scores; "
            "leave it out"
        )
    return arguments


def default_training(task: Task, adapter: AdapterConfig) -> dict[str, Any]:
    """Settings where a recipe has none.

    Rates, warm-up and decay of the adapters: the paper's scripts (recipes finetune/...). Epochs and batch size: our
    choice, for a first run. Rates of `full` and `head`: the usual ones.
    """
    is_instruction = task.kind == "instruction"
    rates = {"full": 2e-5, "head": 1e-3}
    return {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "learning_rate": rates.get(adapter.method, 3e-4 if is_instruction else 4e-4),
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,
        "weight_decay": 0.01,
        "train_sampling_strategy": "random" if is_instruction else "group_by_length",
        "eval_strategy": "epoch",
        "logging_steps": 10,
        "save_total_limit": 2,
        "label_names": ["labels"],
        "disable_tqdm": not shows_bars(),
    }


def make_plan(recipe: FinetuneRecipe, task: Task, model: nn.Module, arguments: TrainingArguments) -> FinetunePlan:
    """What a run with this recipe and this task would do. Raises ConfigError where it would take no step."""
    rows_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = arguments.max_steps
    if steps <= 0:
        batches = math.ceil(len(task.train) / (arguments.train_batch_size * arguments.world_size))
        per_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
        steps = math.ceil(arguments.num_train_epochs * per_epoch)
    device, reason, precision = describe_device(arguments)
    trained = count_trained(model)
    idle = trained["adapter"] if hasattr(model, "peft_config") else 0
    return FinetunePlan(
        recipe=recipe.name,
        model=recipe.model,
        task=task.name,
        kind=task.kind,
        metrics=task.metrics,
        method=recipe.adapter.method,
        device=device,
        device_reason=reason,
        precision=precision,
        parameters=_size_of_base(model) + idle,
        trained=trained,
        source=task.source,
        labels=task.labels,
        train_rows=len(task.train),
        validation_rows=len(task.validation),
        steps=steps,
        rows_per_step=rows_per_step,
    )


def _size_of_base(model: nn.Module) -> int:
    """Parameters without adapters and without PEFT's second copy of the head."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and ".lor2c" not in name and ".original_module." not in name
    )


def make_trainer(
    recipe: FinetuneRecipe,
    task: Task,
    attached: Attached,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
) -> "SafeTrainer":
    """The Trainer of a task, with the callbacks of the method."""
    max_length = input_length(recipe.data.max_length, attached.model)
    if task.kind == "instruction":
        from .instruct import InstructionTrainer, with_chat_template

        arguments.max_length = max_length
        return InstructionTrainer(
            model=attached.model,
            args=arguments,
            train_dataset=task.train,
            eval_dataset=task.validation,
            processing_class=with_chat_template(tokenizer, task.train),
            callbacks=attached.callbacks,
            monitor=recipe.monitor,
        )
    return TaskTrainer(
        model=attached.model,
        args=arguments,
        train_dataset=tokenize(task.train, tokenizer, max_length),
        eval_dataset=tokenize(task.validation, tokenizer, max_length),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        task=task,
        callbacks=attached.callbacks,
        monitor=recipe.monitor,
        head_lr_factor=recipe.adapter.head_lr_factor,
    )


def number_of_blocks(model: nn.Module) -> int | None:
    """Blocks that a LoR2C adapter goes around, None for other methods."""
    tuner: Any = getattr(model, "base_model", None)
    return len(tuner.structure().places) if hasattr(tuner, "num_adapter_parameters") else None


def _check_same_finetuning(recipe: FinetuneRecipe, output_dir: Path) -> tuple[FinetuneRecipe, list[str]]:
    """The recipe of the run in the folder, and what differs and may. Raises ConfigError where it is another run."""
    try:
        began = build_finetune_recipe(read_recipe(output_dir / RECIPE_FILE), ran=True)
    except ConfigError as error:
        raise CheckpointError(f"{output_dir} cannot be resumed: {error}") from None
    now, earlier = recipe.to_dict(), began.to_dict()
    for content in (now, earlier):
        content["recipe"] = {"model": content["model"]}
    has_fingerprints = earlier_fingerprints(output_dir) is not None
    changes = check_same_run(now, earlier, ("recipe", "data", "adapter"), output_dir, has_fingerprints)
    return began, changes + changes_of_section(now["monitor"], earlier["monitor"])


def _fingerprints_of(task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What a run reads: its rows, the pre-trained weights (not the new head) and the tokenizer."""
    new = set() if task.kind == "instruction" else head_parameters(model)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in new}
    vocabulary = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map}
    return {
        "training rows": fingerprint_of_rows(task.train),
        "validation rows": fingerprint_of_rows(task.validation),
        "model": fingerprint_of_weights(weights),
        "tokenizer": hashlib.sha256(json.dumps(vocabulary, sort_keys=True, default=str).encode()).hexdigest(),
    }
