"""`optim: muon` and `optim: spectron`: matrices of the layers by their whole, everything else by AdamW.

| | 2-D matrices of full rank | A and B | embeddings, head, norms, biases, beta, stacks of experts |
|---|---|---|---|
| muon | torch.optim.Muon | torch.optim.Muon | AdamW |
| spectron | torch.optim.Muon | Spectron (spectron.py) | AdamW |

Stacks of experts [E, out, in] stay with AdamW (our choice): torch.optim.Muon takes matrices alone, and a stack holds
the factors of gate and up in one.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from ..crnet import LowRankLinear
from ..errors import ConfigError, nearest_hint
from ..methods import MATRIX_OPTIMIZERS
from .gradient_release import optim_name
from .parallel import groups_by_mesh
from .parameter_groups import ParameterGroups, divide_groups, group_names, optimizer_groups
from .spectron import Spectron

if TYPE_CHECKING:
    from transformers import TrainingArguments

PARTS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "muon": torch.optim.Muon,
    "spectron": Spectron,
}
SETTINGS = {"momentum": float, "ns_steps": int, "nesterov": bool, "adjust_lr_fn": str}
"""What `optim_args` may set for matrices, by its name in torch.optim.Muon."""


class MatrixOptimizer(torch.optim.Optimizer):
    """Several optimizers that a Trainer takes for one: each steps the groups whose `optimizer` names it in `PARTS`.

    State, groups and checkpoints are this one's.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {})
        self.parts = {name: part(groups) for name, part in PARTS.items() if (groups := self._groups(name))}

    def _groups(self, name: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["optimizer"] == name]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self.parts.items():
            part.state, part.param_groups = self.state, self._groups(name)  # load_state_dict puts others in place
            part.step()
        return loss


class GroupedOptimizer:
    """Of a Trainer: learning-rate factors and weight decay by kind of parameter, and the optimizers of this file."""

    parameter_groups: ParameterGroups

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: "TrainingArguments", model: Any = None) -> tuple[Any, dict[str, Any]]:
        """As transformers' own; those of this file bring their groups with them, as GaLore does."""
        name = optim_name(args)
        if name not in MATRIX_OPTIMIZERS:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        return MatrixOptimizer, {"params": matrix_groups(model, name, args)}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, over groups of `parameter_groups`."""
        trainer: Any = self
        model = trainer.model if model is None else model
        if trainer.optimizer is None:
            optimizer_class, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
            if {"model", "optimizer_dict"} & settings.keys():  # steps parameter by parameter (LOMO, layer-wise GaLore)
                return super().create_optimizer(model)  # type: ignore[misc]
            args = trainer.args
            groups = optimizer_groups(model, self.parameter_groups, args.learning_rate, args.weight_decay)
            if "params" in settings:  # GaLore, APOLLO, Muon
                groups = divide_groups(settings.pop("params"), groups)
            trainer.optimizer = optimizer_class(groups_by_mesh(groups), **settings)
        return trainer.optimizer


def is_own(optim: Any) -> bool:
    """Whether `optim` is of this file. Raises ConfigError for a name that transformers does not know either."""
    names = [*(known.value for known in OptimizerNames), *MATRIX_OPTIMIZERS]
    if optim is not None and optim not in names:
        raise ConfigError(f"training.optim={optim!r} is none of {', '.join(names)}{nearest_hint(str(optim), names)}")
    return optim in MATRIX_OPTIMIZERS


def matrix_groups(model: nn.Module, name: str, arguments: "TrainingArguments") -> list[dict[str, Any]]:
    """The parameters of each part with its settings; learning rates and decay are `optimizer_groups`'s.

    Args:
        name: muon or spectron.
        arguments: for `optim_args` and AdamW's betas and epsilon.
    """
    parts = part_names(model, name)
    matrices = {"adjust_lr_fn": "match_rms_adamw", **matrix_settings(arguments.optim_args)}
    adamw = {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon, "fused": True}
    return [
        {
            "params": [parameter for at, parameter in model.named_parameters() if parts[at] == part],
            "optimizer": part,
            **(adamw if part == "adamw" else matrices),
        }
        for part in PARTS
    ]


def part_names(model: nn.Module, name: str) -> dict[str, str]:
    """Name of every parameter -> the part of `PARTS` that steps it under `optim: name`."""
    pairs = {
        id(factor.weight)
        for module in model.modules()
        if isinstance(module, LowRankLinear) and all(f.weight.requires_grad for f in (module.A, module.B))
        for factor in (module.A, module.B)
    }
    kinds = group_names(model)

    def part(at: str, parameter: nn.Parameter) -> str:
        if parameter.ndim != 2 or kinds[at] not in ("full_rank", "low_rank"):
            return "adamw"
        return name if id(parameter) in pairs else "muon"

    return {at: part(at, parameter) for at, parameter in model.named_parameters()}


def matrix_settings(optim_args: str | None) -> dict[str, Any]:
    """`optim_args` for matrices, "momentum=0.9, nesterov=false". Raises ConfigError for other names and values."""
    found: dict[str, Any] = {}
    for setting in filter(None, (optim_args or "").replace(" ", "").split(",")):
        key, _, value = setting.partition("=")
        if key not in SETTINGS:
            raise ConfigError(f"optim_args: {key!r} is none of {', '.join(SETTINGS)}{nearest_hint(key, SETTINGS)}")
        try:
            found[key] = _BOOLEANS[value.lower()] if SETTINGS[key] is bool else SETTINGS[key](value)
        except (KeyError, ValueError):
            raise ConfigError(f"optim_args: {setting!r} is not {key}={SETTINGS[key].__name__}") from None
    try:
        Spectron([nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1, 1))], **found)
    except ValueError as error:
        raise ConfigError(f"optim_args={optim_args!r}: {error}") from None
    return found


_BOOLEANS = {"true": True, "false": False}


def check_optim(arguments: "TrainingArguments") -> None:
    """Raises ConfigError for what the optimizers of this file cannot do."""
    if (name := optim_name(arguments)) not in MATRIX_OPTIMIZERS:
        return
    matrix_settings(arguments.optim_args)
    if arguments.deepspeed:
        raise ConfigError(
            f"optim={name} steps whole matrices, of which deepspeed hands an optimizer a flat part; share the model by "
            "fsdp_size instead"
        )
    if arguments.optim_target_modules:
        raise ConfigError(
            f"optim_target_modules={arguments.optim_target_modules!r} is for galore and apollo: optim={name} steps all "
            "matrices of the layers; leave it out"
        )


__all__ = ["MatrixOptimizer", "matrix_groups"]
