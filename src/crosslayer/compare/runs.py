"""One run of a comparison, from the recipe of its method to the file of its result."""

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from transformers import TrainerCallback, default_data_collator

from ..accounting import count_parameters, estimate_memory, training_flops_per_token
from ..data import prepare_data
from ..errors import TrainingError
from ..train.attention import attention_of
from ..train.memory import training_method, training_step
from ..train.progress import LogLines
from ..train.recipe import build_recipe
from ..train.run import build_arguments, build_model, build_model_config, training_rows
from ..train.run_folder import read_json, write_json
from ..train.trainer import PretrainTrainer
from .recipes import FACTORS

_log = logging.getLogger(__name__)

CURVE_POINTS = 10


class CurvePoint(TypedDict):
    """An evaluation during a run."""

    step: int
    tokens: int
    seconds: float
    loss: float


class RunResult(TypedDict):
    """What the file of a run holds. A loss of None: the run diverged."""

    method: str
    rates: dict[str, float]
    seed: int
    steps: int
    tokens: int
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    seconds: float
    curve: list[CurvePoint]
    parameters: dict[str, int]
    flops_per_token: int
    peak_memory_bytes: dict[str, int]


@dataclass(kw_only=True)
class Job:
    """One run: everything that decides its result, and how it is carried out."""

    method: str
    recipe: dict[str, Any]
    rates: dict[str, float]
    seed: int
    steps: int
    validation_blocks: int
    whole_validation: bool
    threads: int = field(default=1)

    @property
    def key(self) -> str:
        """Name of the file of the run."""
        content = asdict(self)
        del content["threads"]
        content["recipe"]["data"] = {k: v for k, v in content["recipe"]["data"].items() if k != "cache_dir"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def content_of(job: Job) -> dict[str, Any]:
    """The recipe of one run."""
    content = {**job.recipe, "parameter_groups": dict(job.recipe["parameter_groups"])}
    training = dict(content["training"])
    learning_rate = float(training.get("learning_rate", 5e-5))
    content["parameter_groups"] |= {FACTORS[kind]: rate / learning_rate for kind, rate in job.rates.items()}
    if "low_rank" in job.rates:  # beta follows A and B, as in the recipe
        factors = job.recipe["parameter_groups"]
        ratio = factors["beta_lr_factor"] / (factors["low_rank_lr_factor"] or 1.0)
        content["parameter_groups"]["beta_lr_factor"] = job.rates["low_rank"] / learning_rate * ratio
    warmup = training.get("warmup_steps", 0)
    if warmup >= 1:
        training["warmup_steps"] = round(warmup * job.steps / training["max_steps"])
    training |= {
        "max_steps": job.steps,
        "seed": job.seed,
        "data_seed": job.seed,
        "eval_strategy": "steps",
        "eval_steps": max(1, job.steps // CURVE_POINTS) if job.whole_validation else job.steps + 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    for name in ("save_steps", "eval_on_start", "load_best_model_at_end"):
        training.pop(name, None)
    return {**content, "training": training}


def run_once(job: Job, folder: Path, change: Callable[[PretrainTrainer], None] | None = None) -> RunResult:
    """One run; read from its file if it has been made before. A loss of None: the run diverged.

    Args:
        change: called with the trainer before its first step. The names of files do not tell of it: runs with a change
            need a folder of their own.
    """
    path = folder / f"{job.key}.json"
    before = read_json(path)
    if before is not None:
        return cast(RunResult, before)
    if not torch.cuda.is_available():
        torch.set_num_threads(job.threads)
    recipe = build_recipe(content_of(job), ran=True)
    prepared = prepare_data(recipe.data)
    config = build_model_config(recipe, prepared.tokenizer)
    clock = _Clock(job.threads)
    with tempfile.TemporaryDirectory() as unused:
        arguments = build_arguments(recipe, Path(unused))
        trainer = PretrainTrainer(
            model=build_model(config, job.seed, attention_of(recipe, config, arguments)[0]),
            args=arguments,
            train_dataset=training_rows(prepared.train, arguments),
            eval_dataset=_first(prepared.validation, job.validation_blocks),
            processing_class=prepared.tokenizer,
            data_collator=default_data_collator,
            parameter_groups=recipe.parameter_groups,
            monitor=recipe.monitor,
            block_size=recipe.data.block_size,
        )
        trainer.add_callback(clock)
        trainer.remove_callback(LogLines)  # a line a run is enough
        if change is not None:
            change(trainer)
        try:
            trainer.train()
            if job.whole_validation:
                trainer.eval_dataset = prepared.validation
                trainer.validation_bytes = prepared.statistics.validation.bytes
            metrics = trainer.evaluate()
        except TrainingError as error:
            if "not finite" not in str(error):
                raise
            metrics = {}
    result: RunResult = {
        "method": job.method,
        "rates": job.rates,
        "seed": job.seed,
        "steps": job.steps,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "loss": metrics.get("eval_loss"),
        "perplexity": metrics.get("eval_perplexity"),
        "bits_per_byte": metrics.get("eval_bits_per_byte"),
        "seconds": round(clock.seconds, 2),
        "curve": clock.curve,
        "parameters": count_parameters(config),
        "flops_per_token": training_flops_per_token(config, recipe.data.block_size),
        "peak_memory_bytes": estimate_memory(
            config, training_step(recipe, arguments), training_method(config, arguments)
        ),
    }
    write_json(path, result)
    loss = "diverged" if result["loss"] is None else f"{result['loss']:.4f}"
    _log.info("%s, %s, seed %d, %d steps: %s", job.method, shown(job.rates), job.seed, job.steps, loss)
    return result


class _Clock(TrainerCallback):
    """Seconds within training steps, and the curve. On a CPU CPU time over threads: other programs do not count."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.seconds = 0.0
        self.curve: list[CurvePoint] = []

    def _now(self, args) -> float:
        if args.device.type == "cpu":
            return time.process_time() / self.threads
        torch.get_device_module(args.device).synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.started = self._now(args)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds += self._now(args) - self.started

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if metrics and (not self.curve or self.curve[-1]["step"] < state.global_step):
            self.curve.append(
                {
                    "step": state.global_step,
                    "tokens": int(state.num_input_tokens_seen),
                    "seconds": round(self.seconds, 2),
                    "loss": metrics["eval_loss"],
                }
            )


def _first(dataset: Any, blocks: int) -> Any:
    return dataset.select(range(min(len(dataset), blocks))) if hasattr(dataset, "select") else dataset.take(blocks)


def shown(rates: dict[str, float]) -> str:
    """Learning rates for people."""
    return ", ".join(f"{kind} {rate:.2g}" for kind, rate in rates.items())
