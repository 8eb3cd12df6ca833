"""Which values make sense: one table for the fields of TrainingArguments, one for those of the model.

Types are the recipe's own business (recipe.py); here is what a value of the right type may be, and which settings would
change a loss or a result in another way than they say. Fields outside the tables take what their owner takes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """What a field may be."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _where(words: str, holds: Callable[[Any], bool]) -> Range:
    return Range(words, lambda value: _is_number(value) and holds(value))


ABOVE_0 = _where("a number above 0", lambda x: x > 0)
AT_LEAST_0 = _where("a number of at least 0", lambda x: x >= 0)
COUNT = _where("a whole number of at least 1", lambda x: x >= 1 and x == int(x))
COUNT_OR_0 = _where("a whole number of at least 0", lambda x: x >= 0 and x == int(x))
SHARE = _where("a number in [0, 1)", lambda x: 0 <= x < 1)
SEED = _where("a whole number in [0, 2^32)", lambda x: 0 <= x < 2**32 and x == int(x))
INTERVAL = _where("a whole number of at least 1, or a share in (0, 1)", lambda x: 0 < x < 1 or x == int(x) >= 1)
STEPS = _where("a whole number of at least 1, or -1 for num_train_epochs", lambda x: x == -1 or x == int(x) >= 1)
WARMUP = _where("a whole number of steps, or a share in [0, 1)", lambda x: 0 <= x < 1 or x == int(x) >= 1)


def _only(allowed: Any, why: str) -> Range:
    return Range(f"{allowed!r} ({why})", lambda value: value == allowed)


def _no_split_batches(config: Any) -> bool:
    return not isinstance(config, Mapping) or (
        not config.get("split_batches") and config.get("even_batches", True) is True
    )


TRAINING = {
    **dict.fromkeys(
        (
            "per_device_eval_batch_size",
            "save_total_limit",
            "eval_accumulation_steps",
            "torch_empty_cache_steps",
            "dataloader_prefetch_factor",
            "ddp_bucket_cap_mb",
            "ddp_timeout",
        ),
        COUNT,
    ),
    **dict.fromkeys(("dataloader_num_workers",), COUNT_OR_0),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), INTERVAL),
    **dict.fromkeys(("learning_rate", "num_train_epochs", "adam_epsilon", "neftune_noise_alpha"), ABOVE_0),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "eval_delay"), AT_LEAST_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "max_steps": STEPS,
    "warmup_steps": WARMUP,
    # Settings that other Trainers take, and that would give something else here than they promise.
    "label_names": _only(["labels"], "the labels of every kind of data here"),
    "average_tokens_across_devices": _only(True, "a step's loss is the mean over all of its rows"),
    "bf16_full_eval": _only(False, "it would round the weights that are saved"),
    "fp16_full_eval": _only(False, "it would round the weights that are saved"),
    "prediction_loss_only": _only(False, "metrics need predictions"),
    "batch_eval_metrics": _only(False, "metrics are of the whole split"),
    "eval_do_concat_batches": _only(True, "metrics are of the whole split"),
    "use_liger_kernel": _only(False, "its kernels take the loss another way; it knows no CR-Net"),
    "auto_find_batch_size": _only(False, "another batch than the recipe's gives another run"),
    "accelerator_config": Range(
        "without split_batches, with even_batches (batches are of a process)", _no_split_batches
    ),
}
"""Field of TrainingArguments -> what it may be. None is left to TrainingArguments; the size of a step and how
intervals fit together are looked at when those are made (trainer.py)."""

PRETRAINING = {
    "include_num_input_tokens_seen": Range("'all' (the report counts tokens)", lambda value: value in ("all", True)),
}
"""The same, for pre-training alone."""

MODEL = {
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ),
        COUNT,
    ),
    **dict.fromkeys(("initializer_range", "rms_norm_eps", "beta_epsilon"), ABOVE_0),
    "attention_dropout": SHARE,
}
"""Field of CRNetConfig -> what it may be; ranks and policies are checked by the configuration itself."""


def out_of_range(values: Mapping[str, Any], ranges: Mapping[str, Range], section: str) -> Iterator[str]:
    """A problem in words for each value outside its range."""
    for name, value in values.items():
        allowed = ranges.get(name)
        if value is not None and allowed is not None and not allowed.holds(value):
            yield f"{section}.{name}={value!r} must be {allowed.words}"


def warmup_problem(training: Mapping[str, Any]) -> list[str]:
    """Whether a run would end before its rate has reached `learning_rate`."""
    warmup: Any = training.get("warmup_steps")
    steps: Any = training.get("max_steps")
    if not _is_number(warmup) or not _is_number(steps) or steps < 1 or warmup <= steps:
        return []
    return [f"training.warmup_steps={warmup:g} is beyond the run's {steps:g} steps; lower it, or give a share"]
