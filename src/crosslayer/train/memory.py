"""What a run costs in memory: transformers' TrainingArguments in the words of `crosslayer.accounting`."""

import os
from typing import TYPE_CHECKING

import psutil
import torch

from ..accounting import Method, Precision, Sharding, Step, count_operations, estimate_memory, method_of
from ..accounting.plan import DEFAULT_RESERVE
from ..accounting.planner import policies_of, show_bytes
from ..crnet import CRNetConfig
from ..errors import ConfigError
from .gradient_release import optim_name

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .recipe import Recipe

# The optimizers of the Trainer that keep something else than two moments of every parameter.
_OPTIMIZERS = {
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
    "galore_adamw": "galore",
    "galore_adamw_8bit": "galore_8bit",
    "apollo_adamw": "apollo",
    "muon": "muon",
    "spectron": "spectron",
}


def training_step(recipe: "Recipe", arguments: "TrainingArguments") -> Step:
    """One micro-batch on one device, as the Trainer runs our models (fused loss; weights of the model's dtype)."""
    half = arguments.bf16 or arguments.fp16
    weights = getattr(torch, recipe.model.get("dtype") or "float32").itemsize
    optimizer = optim_name(arguments)
    accumulation = arguments.accelerator_config.gradient_accumulation_kwargs or {}
    mesh = recipe.parallel.distributed_config(arguments.world_size)
    return Step(
        sequence=recipe.data.block_size,
        micro_batch=arguments.train_batch_size,
        precision=Precision(weights=weights, gradients=weights, states=weights, products=2 if half else weights),
        sharding=Sharding(tensor=mesh.tp_size, fsdp=mesh.fsdp_size, replicas=mesh.dp_replicate_size),
        fused_norms=arguments.device.type == "cuda",
        fused_optimizer="fused" in optimizer or optimizer in _OPTIMIZERS,  # the latter update one weight after another
        accumulates=arguments.gradient_accumulation_steps > 1,
        reduces_each_batch=bool(accumulation.get("sync_each_batch")),
        releases_gradients=recipe.optimizer.gradient_release,
    )


def training_method(config: CRNetConfig, arguments: "TrainingArguments") -> Method:
    """The memory policy and the optimizer of a run."""
    optimizer = _OPTIMIZERS.get(optim_name(arguments), "adamw")
    return method_of(config, checkpointing=bool(arguments.activation_checkpointing), optimizer=optimizer)


def choose_recompute(config: CRNetConfig, recipe: "Recipe", arguments: "TrainingArguments") -> str:
    """`recompute: auto`: the fastest policy whose estimated peak fits the device at hand; returns why, in words.

    Writes `recompute` and `recompute_interval` of the configuration, or, where layers do not build on one another,
    `activation_checkpointing` of the arguments. Raises ConfigError when nothing fits, with the smallest peak.
    """
    limit = available_memory(arguments.device) * (1 - DEFAULT_RESERVE)
    step, block_size = training_step(recipe, arguments), recipe.data.block_size
    optimizer = training_method(config, arguments).optimizer
    found = []
    for policy in policies_of(config.factorization, config.num_hidden_layers):
        method = Method(recompute=policy.recompute, interval=policy.interval, optimizer=optimizer)
        found.append((sum(estimate_memory(config, step, method).values()), method))
    fitting = [(size, method) for size, method in found if size <= limit]
    if not fitting:
        size, method = min(found, key=lambda pair: pair[0])
        raise ConfigError(
            f"recompute=auto: nothing fits in the {show_bytes(limit)} of {arguments.device} that may be used; the "
            f"smallest, {method.recompute}, needs {show_bytes(size)}; lower per_device_train_batch_size="
            f"{arguments.per_device_train_batch_size} or block_size={block_size}"
        )
    size, method = min(fitting, key=lambda pair: count_operations(config, block_size, pair[1]).total)
    if method.recompute != "layers" and config.factorization != "dense":
        config.recompute, config.recompute_interval = method.recompute, method.interval
    else:
        arguments.activation_checkpointing = method.recompute == "layers"
        arguments.gradient_checkpointing = arguments.activation_checkpointing
    return (
        f"{method.recompute}: the fastest of {len(found)} whose estimated peak, {show_bytes(size)}, fits the "
        f"{show_bytes(limit)} of {arguments.device} that may be used"
    )


def available_memory(device: torch.device) -> int:
    """Bytes of a CUDA device; of a CPU, what is free now, shared out among the processes on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
