"""What this package uses of torch, transformers, PEFT and datasets that they do not document.

Functions for what can be called, tables for what has to stay where it is: methods of theirs that ours override, and
what the files of crnet/ use, which travel with checkpoints and import nothing of this package. Each has a test in
tests/unit/test_private.py that says what breaks without it; other files use nothing private.
"""

import atexit
from collections.abc import Callable, Iterable
from typing import Any

OVERRIDDEN = {
    "transformers:Trainer": (
        "_save_checkpoint",
        "_save_optimizer_and_scheduler",
        "_load_optimizer_and_scheduler",
        "_load_from_checkpoint",
        "_load_best_model",
        "_run_epoch",
        "_track_num_input_tokens",
        "_get_num_items_in_batch",
        "_get_grad_norm",
        "_get_train_sampler",
        "_save_rng_state",
        "_load_rng_state",
    ),
    "transformers:PreTrainedModel": ("_init_weights", "_initialize_weights", "_set_gradient_checkpointing"),
    "peft.tuners.tuners_utils:BaseTuner": (
        "_check_new_adapter_config",
        "_create_and_replace",
        "_check_merge_allowed",
        "_check_target_module_exists",
        "_get_adapter_state_dict",
        "_prepare_adapter_config",
        "_remap_adapter_state_dict_for_load",
        "_remove_adapter_name_from_key",
        "_unload_and_optionally_merge",
    ),
    "peft:PeftModel": ("_enable_peft_forward_hooks",),  # asked of a tuner, which need not have it
    "peft.tuners.tuners_utils:BaseTunerLayer": (
        "_cast_input_dtype",
        "_get_base_layer_device_and_dtype",
        "_move_adapter_to_device_of_base_layer",
    ),
}
"""Class -> its methods that ours override, or are called from there."""

OF_CRNET = {
    "torch:Tensor": ("_version",),
    "torch.nn:Module": (
        "_parameters",
        "_modules",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    ),
    "torch._C": ("_are_functorch_transforms_active", "_current_graph_task_id"),
    "torch._C._autograd": ("_get_current_graph_task_keep_graph",),
    "torch.nn.modules.dropout": ("_DropoutNd",),
    "transformers:PreTrainedConfig": ("_attn_implementation", "_auto_class"),
    "transformers.integrations.moe": ("_grouped_linear",),
}
"""Where -> what the files of crnet/ use."""


def fused_attention_on_cpu() -> tuple[Any, Any]:
    """torch's fused attention for CPUs, forward and backward, which its counter of operations does not know."""
    from torch.ops import aten

    return (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )


def grouped_product() -> Any:
    """torch's product of rows with the matrix of their group."""
    from torch.ops import aten

    return aten._grouped_mm


def attention_operations(query: Any, key: Any, value: Any) -> int:
    """torch's count for attention over these shapes, as the full square."""
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(query, key, value)


def storage_address(storage: Any) -> int:
    """Of a storage itself, not of its bytes: storages without bytes have one too."""
    return storage._cdata


def model_from_config(model_class: Any, config: Any, **settings: Any) -> Any:
    """A model of a class by its configuration; `settings` are a dtype, an attention implementation."""
    return model_class._from_config(config, **settings)


def prepare_anew(model: Any) -> None:
    """accelerate takes a model that it has prepared for wrapped; it forgets that here."""
    model.__dict__.pop("_is_accelerate_prepared", None)


def set_last_rates(schedule: Any, rates: list[float]) -> None:
    """What a schedule says its last learning rates were."""
    schedule._last_lr = rates


def dataset_fingerprint(dataset: Any) -> str:
    """What `datasets` knows the content of a dataset by."""
    return dataset._fingerprint


def excluded_module() -> type:
    """What a tuner of PEFT says of a module that `exclude_modules` names."""
    from peft.tuners.tuners_utils import _ExcludedModule

    return _ExcludedModule


def metrics_of_sft(trainer: Any) -> Any:
    """What TRL's SFTTrainer collects for its next log: {"train" or "eval": {name: values}}."""
    return trainer._metrics


def is_replica(module: Any) -> bool:
    """Whether a module is a copy that torch.nn.DataParallel made for one forward."""
    return getattr(module, "_is_replica", False)


def let_cpus_share_models() -> None:
    """accelerate knows tensor parallelism on accelerators alone, by one check; all else works on CPU processes too."""
    from accelerate import ParallelismConfig
    from accelerate.utils import DistributedType

    check = ParallelismConfig._validate_accelerator
    if getattr(check, "lets_cpus", False):
        return

    def validate(config: Any, accelerator: Any) -> None:
        if accelerator.distributed_type != DistributedType.MULTI_CPU:
            check(config, accelerator)

    validate.lets_cpus = True  # type: ignore[attr-defined]
    ParallelismConfig._validate_accelerator = validate


def without_strided_shards(state: Any, like: Any = None) -> Any:
    """Nested tensors with every strided shard (FSDP2 over tensor parallelism) as a plain one, which
    torch.distributed.checkpoint can write; or back to where those of `like` lie."""
    from transformers.distributed.checkpoint import _redistribute_state_dict

    return _redistribute_state_dict(state, like)


def run_transformers_serve(folder: str, options: list[str], classes: Iterable[type]) -> str | None:
    """transformers' command `serve` with the model of a folder, until it is interrupted; what is wrong with `options`.

    Its server looks for the class of a model among transformers' names alone, whatever the Auto classes know: `classes`
    are put there.
    """
    import transformers
    from click import ClickException
    from transformers.cli.transformers import app

    for model in classes:
        setattr(transformers, model.__name__, model)
    try:
        app(["serve", folder, *options], prog_name="transformers", standalone_mode=False)
    except ClickException as error:
        return error.format_message()
    return None


def run_exit_functions() -> None:
    """What `atexit` would run at the end of this process, now."""
    run: Callable[[], None] = atexit._run_exitfuncs
    run()


__all__ = [
    "OF_CRNET",
    "OVERRIDDEN",
    "attention_operations",
    "dataset_fingerprint",
    "excluded_module",
    "fused_attention_on_cpu",
    "grouped_product",
    "is_replica",
    "let_cpus_share_models",
    "metrics_of_sft",
    "model_from_config",
    "prepare_anew",
    "run_exit_functions",
    "run_transformers_serve",
    "set_last_rates",
    "storage_address",
    "without_strided_shards",
]
