"""One pre-training run: from a recipe to a folder with a checkpoint, a log and a report.

output_dir/
  recipe.yaml        the recipe as it ran          run.json       command, versions, device, plan
  checkpoint-N/      for --resume                  model/         the trained model and its tokenizer
  log.jsonl          one line per log              report.json, report.md, loss.png
  health.jsonl       of a CR-Net, one line per log: b, increments and gradients by layer and position
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from ..accounting import count_parameters, dense_counterpart, estimate_memory, training_flops_per_token
from ..analysis.health import HEALTH_FILE
from ..crnet import crnet_config
from ..data import DataStatistics, PreparedData, document_end_id, document_start_id, padding_id, prepare_data
from ..data.files import printable
from ..data.fit import check_special_tokens, ids_needed
from ..data.stream import TrainingStream
from ..data.tokenizer import tokenizer_fingerprint
from ..errors import CheckpointError, ConfigError, CrossLayerError, TrainingError
from ..loading import MODEL_FOLDER, has_model, load_saved
from ..provenance import describe_run
from .arguments import check_metric, describe_device, nothing_left_behind, training_arguments
from .attention import ATTENTION, attention_of
from .callbacks import EvaluateAtTheEnd
from .memory import choose_recompute, training_method, training_step
from .optimizers import check_optim, is_own
from .parallel import check_same_data, is_split
from .progress import shows_bars
from .recipe import Recipe, build_recipe, read_recipe
from .report import RunFacts, RunReport, write_card, write_report
from .resume import (
    changes_of_section,
    changes_of_training,
    check_fingerprints,
    check_form,
    check_same_run,
    earlier_fingerprints,
    find_checkpoint,
    fingerprint_of_blocks,
    forget_after,
    is_finished,
    tell_changes,
)
from .run_folder import (
    RECIPE_FILE,
    RUN_FILE,
    check_output_dir,
    is_main_process,
    peak_memory_bytes,
    prepare_output_dir,
    read_json,
    write_json,
)
from .stream import Passes, check_streaming
from .trainer import PretrainTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainingArguments

_log = logging.getLogger(__name__)
AUTO = "auto"


@dataclass(kw_only=True)
class Plan:
    """What a run would do, decided before its first step."""

    recipe: str
    device: str
    device_reason: str
    precision: str
    parameters: dict[str, int]
    dense_parameters: int
    flops_per_token: int
    estimated_memory_bytes: dict[str, int]
    recompute: str
    attention: str
    train_blocks: int | None
    block_size: int
    tokens_per_step: int
    steps: int
    tokens: int
    vocab_size: int
    data: dict[str, Any]


def build_model_config(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast | None" = None) -> Any:
    """The model configuration of a recipe; vocabulary and special tokens come from the tokenizer where given.

    Raises ConfigError for a configuration that cannot be built, and for a `vocab_size` below the tokenizer's.
    """
    settings = {name: value for name, value in recipe.model.items() if name != ATTENTION}
    if settings.get("recompute") == AUTO:  # decided by `pretrain`, once device and batch are known
        settings["recompute"] = "none"
        if settings.get("recompute_interval") is not None:
            raise ConfigError("recompute=auto chooses the interval too; remove model.recompute_interval")
    if tokenizer is not None:
        needed = ids_needed(tokenizer)
        settings.setdefault("vocab_size", max(len(tokenizer), needed))
        if settings["vocab_size"] < needed:
            raise ConfigError(
                f"model.vocab_size={settings['vocab_size']} is below the {needed} tokens that the tokenizer can yield; "
                "leave it out or raise it"
            )
        settings.setdefault("bos_token_id", document_start_id(tokenizer))
        settings.setdefault("eos_token_id", document_end_id(tokenizer))
        settings.setdefault("pad_token_id", padding_id(tokenizer))
        if "base" not in settings:
            settings.setdefault("max_position_embeddings", max(recipe.data.block_size, 1024))
    base = settings.pop("base", {"model_type": "llama"})
    try:
        config = crnet_config(base, **settings)
        if (positions := config.max_position_embeddings) < recipe.data.block_size:
            # What it trains on it has positions for; evaluation and generation go by this field.
            config = crnet_config(base, **settings | {"max_position_embeddings": recipe.data.block_size})
            if tokenizer is not None:
                _log.info("max_position_embeddings raised from %d to block_size=%d", positions, recipe.data.block_size)
    except StrictDataclassError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = " ".join(lines[1:]) or lines[0]
        raise ConfigError(reason.removeprefix("ValueError: ").removeprefix("TypeError: ")) from None
    except CrossLayerError:
        raise
    except Exception as error:  # configurations of transformers fail in as many ways as there are wrong values
        raise ConfigError(f"model: {' '.join(str(error).split()) or type(error).__name__}") from error
    if tokenizer is not None:
        check_special_tokens(tokenizer, config, "model")
    return config


def build_arguments(recipe: Recipe, output_dir: Path) -> "TrainingArguments":
    """transformers' TrainingArguments of a recipe, with `bf16: auto` decided. Raises ConfigError."""
    from transformers import TrainingArguments

    settings = {**default_training(recipe), **recipe.training}
    own = settings.pop("optim") if is_own(settings.get("optim")) else None  # no name that transformers knows
    arguments = training_arguments(TrainingArguments, settings, output_dir)
    arguments.optim = own or arguments.optim
    check_optim(arguments)
    check_metric(arguments, ("loss", "perplexity", "bits_per_byte"))
    return arguments


def default_training(recipe: Recipe) -> dict[str, Any]:
    """Settings where a recipe has none."""
    defaults = {
        "include_num_input_tokens_seen": "all",
        "dataloader_drop_last": True,
        "save_total_limit": 2,
        "label_names": ["labels"],
        "disable_tqdm": not shows_bars(),
    }
    if "metric_for_best_model" in recipe.training:
        defaults["greater_is_better"] = False
    return defaults


def build_model(config: Any, seed: int, attention: str = "sdpa") -> Any:
    """A freshly initialised model, the same for the same seed, that takes its loss without materialising logits."""
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.fused_loss = True
    return model


def make_plan(
    recipe: Recipe,
    config: Any,
    prepared: PreparedData,
    arguments: "TrainingArguments",
    recompute: str | None = None,
) -> Plan:
    """What a run with this recipe and these data would do. Raises ConfigError where it would take no step."""
    tokens_per_step = rows_per_step(recipe, arguments) * recipe.data.block_size
    blocks = None if isinstance(prepared.train, TrainingStream) else len(prepared.train)
    steps = arguments.max_steps
    if steps <= 0:
        if blocks is None:
            raise ConfigError("a streaming source has no length; give training.max_steps")
        steps = math.ceil(arguments.num_train_epochs * (blocks * recipe.data.block_size // tokens_per_step))
        if steps == 0:
            raise ConfigError(
                f"{blocks} blocks of {recipe.data.block_size} tokens do not fill one step of {tokens_per_step} tokens; "
                "lower per_device_train_batch_size or gradient_accumulation_steps"
            )
    device, reason, precision = describe_device(arguments)
    return Plan(
        recipe=recipe.name,
        device=device,
        device_reason=reason,
        precision=precision,
        parameters=count_parameters(config),
        dense_parameters=sum(count_parameters(dense_counterpart(config)).values()),
        flops_per_token=training_flops_per_token(config, recipe.data.block_size),
        estimated_memory_bytes=estimate_memory(
            config, training_step(recipe, arguments), training_method(config, arguments)
        ),
        recompute=recompute or config.recompute,
        attention="{}: {}".format(*attention_of(recipe, config, arguments)),
        train_blocks=blocks,
        block_size=recipe.data.block_size,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=steps * tokens_per_step,
        vocab_size=config.vocab_size,
        data=_describe_data(recipe, prepared.statistics),
    )


def rows_per_step(recipe: Recipe, arguments: "TrainingArguments") -> int:
    """How many blocks one optimizer step reads, in all processes together."""
    readers = recipe.parallel.readers(arguments.world_size)
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * readers


def pretrain(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    show_plan: Callable[[Plan], None] = lambda plan: None,
) -> RunReport | None:
    """Run a recipe.

    Args:
        output_dir: a new or empty folder; one that holds a run needs `resume` or `overwrite`.
        resume: go on from the last complete checkpoint in it.
        resume_from: go on from checkpoint-N, of this step, and throw away what came after it.
        overwrite: throw the run in it away first (only a folder that holds one of our runs).
        dry_run: decide and show everything, write nothing into `output_dir`, return None.
        show_plan: called with the plan before the first step.

    Raises ConfigError, DataError, CheckpointError before anything is written, TrainingError while running; of these
    RunStoppedError where it was asked to end early (stopping.py).
    """
    started, output_dir = time.monotonic(), Path(output_dir)
    resume = resume or resume_from is not None
    if is_main_process():
        check_output_dir(output_dir, resume=resume, overwrite=overwrite)
    shape = build_model_config(recipe)  # a wrong one costs a second, not a tokenised corpus
    arguments = build_arguments(recipe, output_dir)
    recipe.parallel.check(shape, arguments.world_size)
    recipe.optimizer.check(arguments, recipe.monitor.on_nonfinite)
    attention_of(recipe, shape, arguments)
    if recipe.data.streaming:
        check_streaming(arguments)
    changes = _check_resumption(recipe, arguments, output_dir) if resume else []

    with arguments.main_process_first(desc="data"):  # the others find it in the cache
        prepared = prepare_data(recipe.data)
    has_read = {"tokenizer": tokenizer_fingerprint(prepared.tokenizer), **prepared.statistics.describe()}
    check_same_data(has_read, arguments.world_size)
    config = build_model_config(recipe, prepared.tokenizer)
    is_auto = recipe.model.get("recompute") == AUTO
    recompute = choose_recompute(config, recipe, arguments) if is_auto else None
    plan = make_plan(recipe, config, prepared, arguments, recompute)
    fingerprints = fingerprints_of(prepared) if is_main_process() else {}
    if resume and is_main_process():
        check_fingerprints(fingerprints, output_dir)
    if is_main_process():
        show_plan(plan)
    if dry_run:
        return None
    finished = _finished_report(output_dir, plan) if resume and resume_from is None else None
    if finished is not None:
        tell_changes(changes, f"{output_dir} has taken all its steps; not applied")
        return finished
    checkpoint = None
    if resume:  # of a stream each process has read a part of its own
        any_processes = not recipe.data.streaming
        checkpoint = find_checkpoint(arguments, output_dir, plan.steps, resume_from, any_processes=any_processes)
    check_form(checkpoint, recipe.parallel)
    tell_changes(changes, f"{output_dir} goes on with other settings than it was begun with")

    with nothing_left_behind(output_dir):
        trainer, facts = _make_trainer(recipe, config, prepared, arguments, plan, output_dir)
        trainer.stopping.count_from(started)
        trainer.check_optimizer(plan.steps)
    if is_main_process():
        prepare_output_dir(output_dir, recipe, plan, fingerprints, overwrite=overwrite)
        if resume_from is not None:
            forget_after(output_dir, resume_from)
    return _train(trainer, facts, output_dir, checkpoint)


def _check_resumption(recipe: Recipe, arguments: "TrainingArguments", output_dir: Path) -> list[str]:
    """What differs from the run in the folder and will be applied. Raises ConfigError, CheckpointError."""
    began = earlier_recipe(output_dir)
    now, earlier = recipe.to_dict(), began.to_dict()
    has_fingerprints = earlier_fingerprints(output_dir) is not None and not recipe.data.streaming
    changes = check_same_run(now, earlier, ("model", "data"), output_dir, has_fingerprints)
    before = build_arguments(began, output_dir)
    begun_with = read_json(output_dir / RUN_FILE)["plan"]["tokens_per_step"] // began.data.block_size
    streaming = recipe.data.streaming
    rows = None if streaming else (rows_per_step(recipe, arguments), begun_with)
    changes += changes_of_training(arguments, before, output_dir, rows, streaming=streaming)
    return changes + [
        change
        for section in ("parameter_groups", "optimizer", "parallel", "monitor")
        for change in changes_of_section(now[section], earlier[section])
    ]


def fingerprints_of(prepared: PreparedData) -> dict[str, str]:
    """What the blocks of a run hold; of a stream, whose blocks are made while it trains, the validation part."""
    found = {
        "tokenizer": tokenizer_fingerprint(prepared.tokenizer),
        "validation data": fingerprint_of_blocks(prepared.validation),
    }
    if not isinstance(prepared.train, TrainingStream):
        found["training data"] = fingerprint_of_blocks(prepared.train)
    return found


def _make_trainer(
    recipe: Recipe,
    config: Any,
    prepared: PreparedData,
    arguments: "TrainingArguments",
    plan: Plan,
    output_dir: Path,
) -> tuple[PretrainTrainer, RunFacts]:
    """The Trainer of a run, and what is known of it."""
    from transformers import default_data_collator

    model = build_model(config, arguments.seed, attention_of(recipe, config, arguments)[0])
    model = recipe.parallel.split(model, arguments.world_size, arguments.device)
    facts = RunFacts(
        recipe=recipe.to_dict(),
        run=describe_run(),
        plan=asdict(plan),
        data=_describe_data(recipe, prepared.statistics),
        seed=arguments.seed,
    )
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=training_rows(prepared.train, arguments),
        eval_dataset=prepared.validation,
        processing_class=prepared.tokenizer,
        data_collator=default_data_collator,
        parameter_groups=recipe.parameter_groups,
        gradient_release=recipe.optimizer.gradient_release,
        monitor=recipe.monitor,
        block_size=recipe.data.block_size,
        validation_bytes=prepared.statistics.validation.bytes,
        write_card=lambda folder: write_card(folder, config, facts),
        health_file=output_dir / HEALTH_FILE,
    )
    return trainer, facts


def training_rows(train: "Dataset | TrainingStream", arguments: "TrainingArguments") -> "Dataset | Passes":
    """What the Trainer takes: blocks, or passes over a stream of them."""
    return Passes(train, arguments.train_batch_size) if isinstance(train, TrainingStream) else train


def _train(trainer: PretrainTrainer, facts: RunFacts, output_dir: Path, checkpoint: Path | None) -> RunReport:
    started = time.perf_counter()
    before = None if checkpoint is None else read_json(output_dir / "before.json")
    if before is None:
        before = trainer.evaluate()
        trainer.state.log_history.clear()
        if is_main_process():
            write_json(output_dir / "before.json", before)

    trainer.last_evaluation = None
    trainer.add_callback(EvaluateAtTheEnd())
    trainer.run(checkpoint)
    step, history = trainer.state.global_step, trainer.state.log_history
    if trainer.last_evaluation is None:  # resumed after its last step, whose evaluation is in the history already
        history[:] = [line for line in history if line["step"] < step or "eval_loss" not in line]
        trainer.evaluate()
    elif trainer.args.load_best_model_at_end:  # other weights now than at the last evaluation
        trainer.evaluate()
    assert trainer.last_evaluation is not None
    throughput, config = trainer.throughput, trainer.accelerator.unwrap_model(trainer.model).config
    report = RunReport(
        **vars(facts),
        before=before,
        after=trainer.last_evaluation,
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        tokens_per_s=throughput.total_tokens / throughput.total_seconds if throughput.total_seconds else None,
        peak_memory_bytes=peak_memory_bytes(trainer.args.device),
        seconds=time.perf_counter() - started,
        history=trainer.state.log_history,
        skipped_steps=trainer.monitor.skipped,
        model=trainer.model,
        tokenizer=trainer.processing_class,
    )
    trainer.write_card = lambda folder: write_card(folder, config, report)
    try:
        trainer.save_model(str(output_dir / MODEL_FOLDER))
        if trainer.args.should_save:
            write_report(output_dir, report)
            if is_split(trainer.model):
                whole, _ = load_saved(output_dir / MODEL_FOLDER)  # for what one process does with it
                return replace(report, model=whole)
    except OSError as error:
        raise TrainingError(
            f"results could not be written ({error.strerror}); {trainer.last_good_checkpoint()}"
        ) from error
    return report


def _finished_report(output_dir: Path, plan: Plan) -> RunReport | None:
    """The report of a run that has taken all its steps, with its model; None when there is work left."""
    content = read_json(output_dir / "report.json")
    if not is_finished(content, plan.steps, output_dir) or not has_model(output_dir):
        return None
    try:
        model, tokenizer = load_saved(output_dir / MODEL_FOLDER)
    except CheckpointError as error:
        _log.warning("%s; it is made anew", error)
        return None
    return RunReport(**content, model=model, tokenizer=tokenizer)


def earlier_recipe(output_dir: Path) -> Recipe:
    """The recipe that a run in this folder ran. Raises CheckpointError."""
    try:
        return build_recipe(read_recipe(output_dir / RECIPE_FILE), ran=True)
    except ConfigError as error:
        raise CheckpointError(f"{output_dir} cannot be resumed: {error}") from None


def _describe_data(recipe: Recipe, statistics: DataStatistics) -> dict[str, Any]:
    return {"source": printable(recipe.data.data), **statistics.describe()}
