"""Which values make sense: one table for the fields of TrainingArguments, one for those of the model.

Types are the recipe's own business (recipe.py), and the sections that are dataclasses of ours bring their own tables;
here is what a value of the right type may be, and which settings would
change a loss or a result in another way than they say. Fields outside the tables take what their owner takes.
"""

from collections.abc import Mapping
from typing import Any

from ..ranges import (
    ABOVE_0,
    AT_LEAST_0,
    COUNT,
    COUNT_OR_0,
    SEED,
    SHARE,
    SIZE,
    Range,
    one_of,
    only,
    or_text,
    where,
    whole,
)

ATTENTIONS = ("auto", "sdpa", "eager", "sdpa_documents", "flex_attention", "flash_attention_2", "flash_attention_3")
"""Told apart in attention.py."""

INTERVAL = where("a whole number of at least 1, or a share in (0, 1)", lambda x: 0 < x < 1 or x == int(x) >= 1)
STEPS = where("a whole number of at least 1, or -1 for num_train_epochs", lambda x: x == -1 or x == int(x) >= 1)
WARMUP = where("a whole number of steps, or a share in [0, 1)", lambda x: 0 <= x < 1 or x == int(x) >= 1)


def _no_split_batches(config: Any) -> bool:
    # No file's name: a number would be opened, and closed, as if it were one.
    return isinstance(config, Mapping) and not config.get("split_batches") and config.get("even_batches", True) is True


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
    "label_names": only(["labels"], "the labels of every kind of data here"),
    "average_tokens_across_devices": only(True, "a step's loss is the mean over all of its rows"),
    "bf16_full_eval": only(False, "it would round the weights that are saved"),
    "fp16_full_eval": only(False, "it would round the weights that are saved"),
    "prediction_loss_only": only(False, "metrics need predictions"),
    "batch_eval_metrics": only(False, "metrics are of the whole split"),
    "eval_do_concat_batches": only(True, "metrics are of the whole split"),
    "use_liger_kernel": only(False, "its kernels take the loss another way; it knows no CR-Net"),
    "auto_find_batch_size": only(False, "another batch than the recipe's gives another run"),
    **dict.fromkeys(
        ("fsdp", "fsdp_config"),
        Range("null (the section `parallel` shards a model: fsdp_size)", lambda value: not value),
    ),
    "parallelism_config": Range("null (a recipe cannot hold one; accelerate's own file can)", lambda value: False),
    "accelerator_config": Range(
        "a mapping without split_batches, with even_batches (batches are of a process)", _no_split_batches
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
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ),
        SIZE,
    ),
    **dict.fromkeys(("initializer_range", "rms_norm_eps", "beta_epsilon"), ABOVE_0),
    "low_rank_initializer_range": or_text("cola", ABOVE_0),
    "num_hidden_layers": whole(1, 2**14, "a whole number from 1 to 16384"),
    "attention_dropout": SHARE,
    "attn_implementation": one_of(ATTENTIONS),
    "base": Range("a name, a folder or the fields of a configuration", lambda value: isinstance(value, str | Mapping)),
    "dtype": one_of(("float32", "bfloat16", "float16", "float64")),
    **dict.fromkeys(("attribute_map", "id2label", "label2id"), Range("a mapping", lambda v: isinstance(v, Mapping))),
}
"""Field of CRNetConfig -> what it may be; ranks and policies are checked by the configuration itself."""


def warmup_problem(training: Mapping[str, Any]) -> list[str]:
    """Whether a run would end before its rate has reached `learning_rate`."""
    warmup: Any = training.get("warmup_steps")
    steps: Any = training.get("max_steps")
    if not WARMUP.holds(warmup) or not COUNT.holds(steps) or warmup <= steps:
        return []
    return [f"training.warmup_steps={warmup:g} is beyond the run's {steps:g} steps; lower it, or give a share"]
