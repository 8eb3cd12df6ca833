"""A plan's recommendation as lines of a recipe."""

from typing import Any

from ..crnet.policies import POLICIES
from .methods import Method, can_release, optimized
from .parameters import optimizer_rank
from .plan import Request, Setting
from .shapes import Shape
from .steps import PRECISIONS

_TRAINER_OPTIMIZERS = {
    "adamw_8bit": "adamw_bnb_8bit",
    "galore": "galore_adamw",
    "galore_8bit": "galore_adamw_8bit",
    "apollo": "apollo_adamw",
    "apollo_mini": "apollo_adamw",
    "muon": "muon",
    "spectron": "spectron",
}


def recipe_lines(shape: Shape, trained: Method, best: Setting, request: Request) -> dict[str, dict[str, Any]]:
    """Lines of a recipe, by section; none for what `crosslayer pretrain` does not train (adapters, SLTrain, ReLoRA)."""
    if shape.factorization == "sltrain" or trained.adapter is not None or trained.optimizer == "relora":
        return {}
    trained = optimized(trained, request.optimizer)
    model: dict[str, Any] = {"factorization": shape.factorization}
    if shape.has_one_rank:  # otherwise the defaults, or a pattern of the given model
        model["rank"] = shape.rank
    training: dict[str, Any] = {
        "per_device_train_batch_size": best.micro_batch,
        "gradient_accumulation_steps": best.accumulation,
    }
    if best.policy == "layers":
        training["activation_checkpointing"] = True
    elif best.policy in POLICIES and shape.factorization != "dense":
        model["recompute"] = best.policy
        if best.interval is not None and best.policy != "none":
            model["recompute_interval"] = best.interval
    if PRECISIONS[request.precision] == PRECISIONS["bf16_autocast"]:
        training["bf16"] = True
    elif PRECISIONS[request.precision].tf32:
        training["tf32"] = True
    elif PRECISIONS[request.precision].weights == 2:
        model["dtype"] = "bfloat16"
    if best.fsdp > 1 and best.replicas == 1 and best.accumulation > 1:
        # otherwise whole gradients stay on every device until the last micro-batch; between replicas they never do
        training["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    if trained.optimizer in _TRAINER_OPTIMIZERS:
        training["optim"] = _TRAINER_OPTIMIZERS[trained.optimizer]
        if trained.optimizer == "adamw_8bit" and best.fsdp * best.tensor_parallel > 1:
            # torchao's (pytorch/ao#484): bitsandbytes' reads out of bounds of shards (bitsandbytes#1633)
            training["optim"] = "adamw_torch_8bit"
        if trained.optimizer.startswith(("galore", "apollo")):
            modules = (linear.position.module.partition(".")[0] for _, _, linear in shape.linears())
            training["optim_target_modules"] = list(dict.fromkeys(modules))
            training["optim_args"] = f"rank={optimizer_rank(shape, trained)}"
    sections: dict[str, dict[str, Any]] = {
        "model": model,
        "data": {"block_size": request.sequence},
        "training": training,
    }
    if request.gradient_release and can_release(trained, shape.factorization):
        training["max_grad_norm"] = 0.0
        sections["optimizer"] = {"gradient_release": True}
    parallel = {"fsdp_size": best.fsdp, "tensor_parallel": best.tensor_parallel}
    if shared := {name: size for name, size in parallel.items() if size > 1}:
        sections["parallel"] = shared
    return sections


__all__ = ["recipe_lines"]
