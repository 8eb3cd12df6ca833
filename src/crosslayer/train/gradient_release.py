"""The optimizer's step inside the backward: a gradient is used and let go of as soon as it is there.

So no more than the gradients of one block exist at a time, and no other memory stands beside them. CR-Net's blocks hand
theirs on one by one under every memory policy (crnet/tape.py). The idea is LOMO's (arXiv 2306.09782) and GaLore's
per-layer updates (arXiv 2403.03507); here any optimizer of the Trainer does it that treats every parameter alone, with
its usual state, schedule and checkpoints.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit", "adamw_8bit"),
    *("lion_8bit", "lion_32bit", "sgd", "rmsprop", "adagrad", "adafactor", "muon"),
)
"""Names of `optim` whose step of one parameter needs nothing of the others, and changes nothing where there is no
gradient."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """What the fields of TrainingArguments do not say of the optimizer."""

    gradient_release: bool = False
    """Step inside the backward, so that gradients of all layers never exist together. Wants `max_grad_norm: 0`,
    `gradient_accumulation_steps: 1`, one process, and an `optim` that treats each parameter alone."""

    def check(self, arguments: "TrainingArguments", on_nonfinite: str) -> None:
        """Raises ConfigError where gradients are needed together."""
        if not self.gradient_release:
            return
        optimizer = optim_name(arguments)
        for is_wrong, what, instead in (
            (
                arguments.max_grad_norm > 0,
                f"max_grad_norm={arguments.max_grad_norm:g}",
                "set it to 0: the norm is of all",
            ),
            (
                arguments.gradient_accumulation_steps > 1,
                f"gradient_accumulation_steps={arguments.gradient_accumulation_steps}",
                "set it to 1, with a larger per_device_train_batch_size",
            ),
            (arguments.world_size > 1, f"{arguments.world_size} processes", "share the model instead (fsdp_size)"),
            (on_nonfinite == "skip", "on_nonfinite=skip", "choose stop: nothing is left to skip by then"),
            (arguments.fp16, "fp16", "use bf16: its scale is known after the backward only"),
            (optimizer == "spectron", "optim=spectron", "choose muon: a step of A or B needs the gradients of both"),
            (optimizer not in OPTIMIZERS, f"optim={optimizer}", f"choose from {', '.join(OPTIMIZERS)}"),
        ):
            if is_wrong:
                raise ConfigError(f"gradient_release does not go with {what}; {instead}")


def optim_name(arguments: "TrainingArguments") -> str:
    """`optim` as text; transformers makes an enumeration of its own names."""
    return str(getattr(arguments.optim, "value", arguments.optim))


def release_gradients(optimizer: torch.optim.Optimizer) -> None:
    """From now on `optimizer` steps within the backward; its own `step` afterwards finds nothing left to do.

    A step with the gradient of one parameter leaves all others as they are; learning rates are those that stand in the
    groups at that moment.
    """

    def step(parameter: torch.Tensor) -> None:
        optimizer.step()
        parameter.grad = None

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(step)
