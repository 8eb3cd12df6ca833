"""What may change between a run and its resumption.

A run goes on with its own model, data, batches and optimizer: where those differ it is refused, with both values.
Everything else is applied and said: rates and schedule, steps, precision, intervals, trackers.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError
from .checkpoints import checkpoint_to_resume, checkpoints, step_of
from .run_folder import RUN_FILE, is_main_process, read_json
from .sharded import has_shards

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import TrainingArguments

    from .parallel import Parallel

_log = logging.getLogger(__name__)

FIXED_TRAINING_FIELDS = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "dataloader_drop_last",
            "train_sampling_strategy",
            "length_column_name",
            "accelerator_config",
            "seed",
            "data_seed",
        ),
        "it decides which rows a step takes",
    ),
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), "the state of the optimizer is of its kind"),
    **dict.fromkeys(("fp16", "deepspeed", "fsdp", "fsdp_config", "parallelism_config"), "checkpoints are of its form"),
}
"""Training fields that stay as they were, and why."""

FIXED_BY_STREAMS = {"dataloader_num_workers": "every worker reads a part of the stream"}

OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Of them those that, with the number of processes, make up the rows of a step."""

_UNSAID = {"output_dir", "local_rank", "hub_token", "run_name", "logging_dir", "resume_from_checkpoint"}
"""Fields that change nothing about a run, or are nobody's business."""

_WITH_STATE = ("reduce_lr_on_plateau", "greedy")
"""Schedules whose rate is a state, and not a function of the step."""

_OF_SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")

SPELLINGS = {("data", "data"), ("data", "validation_data"), ("data", "tokenizer"), ("recipe", "model")}
"""Where files lie; that they hold the same is told by fingerprints."""

FREE = {("model", "attn_implementation")}
"""What changes how a model is computed, and not what it is."""

PLACES = {*SPELLINGS, ("model", "base")}
"""What may be a path: the same place by any spelling is the same value."""


def check_same_run(
    now: Mapping[str, Any],
    earlier: Mapping[str, Any],
    sections: Iterable[str],
    output_dir: Path,
    has_fingerprints: bool = False,
) -> list[str]:
    """What differs in the given sections of two recipes and may: attention, and with fingerprints a place's spelling.

    Raises ConfigError where anything else differs.
    """
    differ = [
        (section, name)
        for section in sections
        for name in sorted({*now[section], *earlier[section]} - {"cache_dir"})
        if now[section].get(name) != earlier[section].get(name)
        and not ((section, name) in PLACES and _is_same_place(now[section].get(name), earlier[section].get(name)))
    ]
    values = [(f"{s}.{n}={now[s].get(n)!r}".removeprefix("recipe."), repr(earlier[s].get(n))) for s, n in differ]
    if not set(differ) <= FREE | (SPELLINGS if has_fingerprints else set()):
        changed = "; ".join(f"{value}, was {before}" for value, before in values)
        raise ConfigError(
            f"{output_dir} cannot be resumed with another model or other data ({changed}); give the same, or another "
            "--output_dir"
        )
    return [f"{value} (was {before})" for value, before in values]


def _is_same_place(one: Any, other: Any) -> bool:
    """Whether two paths name one file or folder that is there."""
    try:
        return os.path.samefile(os.path.expanduser(one), os.path.expanduser(other))
    except (OSError, TypeError, ValueError):  # not there, or no paths
        return False


def changes_of_training(
    now: "TrainingArguments",
    earlier: "TrainingArguments",
    output_dir: Path,
    rows: tuple[int, int] | None = None,
    *,
    streaming: bool = False,
) -> list[str]:
    """The training fields that differ, as "name=value (was value)". Raises ConfigError for those that must not.

    Args:
        rows: rows that a step takes now and took before, in all processes. Where these are equal, rows are the same
            however processes, their batches and accumulation divide them.
        streaming: every process, and every worker of its loader, reads a part of its own.
    """
    fixed = FIXED_TRAINING_FIELDS | (FIXED_BY_STREAMS if streaming else {})
    if rows is not None and rows[0] != rows[1]:
        raise ConfigError(
            f"{output_dir} cannot be resumed with steps of {rows[0]} rows, they were of {rows[1]}: choose "
            "per_device_train_batch_size and gradient_accumulation_steps so that, times the processes that read, they "
            f"give {rows[1]}"
        )
    may_differ = OF_A_STEP if rows is not None else ()
    values, were = now.to_dict(), earlier.to_dict()
    differ = [name for name in values if name not in _UNSAID and values[name] != were.get(name)]
    problems = [
        f"{name}={values[name]!r}, was {were[name]!r}: {fixed[name]}"
        for name in differ
        if name in fixed and name not in may_differ
    ]
    has_state = any(kind in str(run["lr_scheduler_type"]) for kind in _WITH_STATE for run in (values, were))
    problems += [
        f"{name}={values[name]!r}, was {were[name]!r}: the rate is a state of lr_scheduler_type"
        for name in differ
        if has_state and name in _OF_SCHEDULE
    ]
    if problems:
        raise ConfigError(
            f"{output_dir} cannot be resumed with other settings ({'; '.join(problems)}); give the same, or another "
            "--output_dir"
        )
    return [f"{name}={values[name]!r} (was {were.get(name)!r})" for name in differ]


def changes_of_section(now: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """The fields of a section that differ, as "name=value (was value)"."""
    names = sorted({*now, *earlier})
    return [f"{n}={now.get(n)!r} (was {earlier.get(n)!r})" for n in names if now.get(n) != earlier.get(n)]


def tell_changes(changes: list[str], what: str) -> None:
    """A log line with the settings that differ, if any do."""
    if changes and is_main_process():
        _log.warning("%s: %s", what, ", ".join(changes))


def is_finished(report: Any, steps: int, output_dir: Path) -> bool:
    """Whether a run's report.json says that it has taken its steps. Raises ConfigError for a run that took more."""
    if not isinstance(report, dict) or report.get("steps", 0) < steps:
        return False
    if report["steps"] > steps:
        raise ConfigError(
            f"{output_dir} has taken {report['steps']} steps, more than the {steps} asked for; raise max_steps or "
            "num_train_epochs, or give another --output_dir"
        )
    return True


def check_form(checkpoint: Path | None, parallel: "Parallel") -> None:
    """Raises ConfigError for a checkpoint of one whole model that a shared one is to go on from."""
    if checkpoint is not None and parallel.is_split and not has_shards(checkpoint):
        raise ConfigError(
            f"{checkpoint} was written by processes that each hold the whole model; go on with tensor_parallel=1 and "
            "fsdp_size=1, as it was begun, or start anew in another --output_dir"
        )


def find_checkpoint(
    arguments: "TrainingArguments",
    output_dir: Path,
    steps: int,
    resume_from: int | None = None,
    *,
    any_processes: bool = False,
) -> Path | None:
    """The checkpoint to go on from, the same in every process; None: from the first step.

    Args:
        resume_from: step of the one to take, in place of the newest.
        any_processes: another number of processes than now may have written it.

    Raises CheckpointError and ConfigError as `checkpoint_to_resume`, and where the run is beyond `steps`.
    """
    found: list[Path | None] = [None]
    if is_main_process():
        processes = None if any_processes else arguments.world_size
        found = [checkpoint_to_resume(output_dir, processes, resume_from)]
        if found[0] is None:
            _log.warning("%s has no checkpoint yet; starting at the first step", output_dir)
        elif step_of(found[0]) > steps:
            raise ConfigError(
                f"{found[0]} has more steps than the {steps} that the run is to have; raise max_steps or "
                "num_train_epochs, or give another --output_dir"
            )
    if arguments.world_size > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    return found[0]


def forget_after(output_dir: Path, step: int) -> None:
    """Throw away what a run made after a step: it goes on from there, and is not finished any more."""
    (output_dir / "report.json").unlink(missing_ok=True)
    for folder in checkpoints(output_dir):
        if step_of(folder) > step:
            _log.warning("%s is thrown away", folder)
            shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------- fingerprints


def earlier_fingerprints(output_dir: Path) -> dict[str, str] | None:
    """What a run noted about its data when it began; None for runs of earlier versions. Raises CheckpointError."""
    content = read_json(output_dir / RUN_FILE)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{output_dir / RUN_FILE} cannot be read, so that nothing is known about the run; put it back, or start "
            "again in another --output_dir"
        )
    return content.get("fingerprints")


def check_fingerprints(now: Mapping[str, str], output_dir: Path) -> None:
    """Raises ConfigError when what a run reads is not what it read when it began."""
    earlier = earlier_fingerprints(output_dir)
    if earlier is None:
        _log.warning("%s was begun by an earlier version: whether its data has changed cannot be told", output_dir)
        return
    changed = [
        f"{name} is {now.get(name, 'none')[:12]}, was {earlier.get(name, 'none')[:12]}"
        for name in sorted({*now, *earlier})
        if now.get(name) != earlier.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{output_dir} cannot be resumed: what it reads has changed since it began ({'; '.join(changed)}); restore "
            "the files, or give another --output_dir"
        )


def fingerprint_of_blocks(blocks: "Dataset") -> str:
    """SHA-256 over the tokens of prepared blocks, in order: all there is to train on."""
    digest = hashlib.sha256()
    for table in blocks.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=4096):
        for chunk in table["input_ids"].chunks:
            digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def fingerprint_of_rows(rows: "Dataset") -> str:
    """SHA-256 over the rows of a task, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8") + b"\n")
    return digest.hexdigest()


def fingerprint_of_weights(weights: Mapping[str, "torch.Tensor"]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors."""
    import torch

    from .parallel import whole

    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = whole(weights[name].detach()).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
