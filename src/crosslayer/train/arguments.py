"""transformers' TrainingArguments of a run: made, checked, and where it will run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import ConfigError, CrossLayerError


def training_arguments(kind: type[TrainingArguments], settings: dict[str, Any], output_dir: Path) -> TrainingArguments:
    """Arguments of a run, with `bf16: auto` decided. Raises ConfigError for values that cannot work."""
    settings = dict(settings)
    use_cuda = torch.cuda.is_available() and not settings.get("use_cpu", False)
    if settings.get("bf16") == "auto":
        settings["bf16"] = use_cuda and torch.cuda.is_bf16_supported()
    if not use_cuda:
        settings.setdefault("dataloader_pin_memory", False)
    try:
        arguments = kind(output_dir=str(output_dir), logging_nan_inf_filter=False, **settings)
        arguments.to_json_string()  # as a checkpoint and a tracker keep them
    except Exception as error:  # TrainingArguments and the libraries behind it fail in as many ways as there are values
        raise ConfigError(f"training: {' '.join(str(error).split()) or type(error).__name__}") from error
    _check_intervals(arguments)
    return arguments


def _check_intervals(arguments: TrainingArguments) -> None:
    if arguments.per_device_train_batch_size < 1 or arguments.gradient_accumulation_steps < 1:
        raise ConfigError(
            f"per_device_train_batch_size={arguments.per_device_train_batch_size} and gradient_accumulation_steps="
            f"{arguments.gradient_accumulation_steps} must be at least 1"
        )
    if arguments.save_strategy == "steps" and arguments.logging_strategy == "steps":
        save, log = arguments.save_steps, arguments.logging_steps
        if save >= 1 and log >= 1 and save % log != 0:
            raise ConfigError(
                f"save_steps={save:g} is not a multiple of logging_steps={log:g}; a run resumed between two logs would "
                "report a mean over fewer steps than an uninterrupted one"
            )


def check_metric(arguments: TrainingArguments, metrics: Sequence[str]) -> None:
    """Raises ConfigError where the best checkpoint is to be chosen by a number that no evaluation gives."""
    chosen = arguments.metric_for_best_model
    if chosen is not None and chosen.removeprefix("eval_") not in metrics:
        raise ConfigError(f"training.metric_for_best_model={chosen!r} is none of {', '.join(metrics)}")


@contextmanager
def nothing_left_behind(output_dir: Path) -> Iterator[None]:
    """For what is made before a run's folder is: turns what libraries refuse into ConfigError, and removes the empty
    folder that the Trainer makes."""
    existed = output_dir.exists()
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, AssertionError) as error:
        if not existed and output_dir.is_dir():
            with suppress(OSError):
                output_dir.rmdir()
        if isinstance(error, CrossLayerError):
            raise
        raise ConfigError(f"training: {' '.join(str(error).split()) or type(error).__name__}") from error


def describe_device(arguments: TrainingArguments) -> tuple[str, str, str]:
    """(device, why this one, precision) in words."""
    precision = "bf16 autocast" if arguments.bf16 else "fp16 autocast" if arguments.fp16 else "float32"
    if arguments.device.type == "cuda":
        return torch.cuda.get_device_name(arguments.device), "CUDA is available", precision
    reason = "use_cpu is set" if arguments.use_cpu else "CUDA is not available"
    return f"cpu, {torch.get_num_threads()} threads", reason, precision
