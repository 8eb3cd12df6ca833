"""Ways to fine-tune: LoR2C and its variants (arXiv 2503.00572), LoRA, everything, the head alone.

    attached = attach(model, AdapterConfig(method="imlor2c", r=8), kind="classification")
    attached.model                      # train this
    attached.callbacks                  # what changes the structure while it trains

| method | what trains |
|---|---|
| lor2c | one low-rank residual around each block |
| sharelor2c | the same with one A for all blocks, or one for each group of neighbours |
| mergelor2c | LoR2C, whose neighbouring modules are fused while training |
| injectlor2c | LoR2C, whose simplest modules give way to LoRA of half the rank on query and value |
| imlor2c | both |
| lora | LoRA (arXiv 2106.09685) on query and value |
| full | all weights |
| head | only the new head of a classification or regression model |
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from ..errors import ConfigError
from ..methods import FINETUNING, method_problem
from ..ranges import (
    ABOVE_0,
    AT_LEAST_0,
    COUNT,
    COUNT_OR_0,
    GROUP_STARTS,
    LENGTH,
    SHARE,
    Range,
    one_of,
    or_text,
    out_of_range,
)

FUSING, INJECTING = ("mergelor2c", "imlor2c"), ("injectlor2c", "imlor2c")
CHANGING = {*FUSING, *INJECTING}
"""Methods whose adapter has other parameters at the end than at the start."""

_OF_CHANGES = ("interval", "interval_unit", "criterion", "survivor", "max_span")
AUTO_SETTINGS = ("parameter_budget", "validation_budget", "auto_threshold")
RANGES = {
    "r": COUNT,
    "alpha": ABOVE_0,
    "dropout": SHARE,
    "reads": one_of(("input", "output")),
    "target_modules": Range(
        "names of modules, or a regular expression",
        lambda value: bool(value) and (isinstance(value, str) or (isinstance(value, list) and all(map(bool, value)))),
    ),
    "share_A": GROUP_STARTS,
    "max_fuses": or_text("auto", COUNT_OR_0),
    "max_injections": or_text("auto", COUNT_OR_0),
    "interval": COUNT,
    "interval_unit": one_of(("epochs", "steps")),
    "criterion": one_of(("sfs", "official", "mean_singular_value", "stable_rank", "alignment")),
    "survivor": one_of(("first", "higher_score")),
    "max_span": LENGTH,
    "parameter_budget": COUNT_OR_0,
    "validation_budget": AT_LEAST_0,
    "auto_threshold": SHARE,
    "head_lr_factor": ABOVE_0,
}
"""Field of `AdapterConfig` -> what it may be; `method` is a name of methods.py."""

TASK_TYPES = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "instruction": "CAUSAL_LM"}


@dataclass(kw_only=True)
class AdapterConfig:
    """What is trained. Raises ConfigError, naming every field that is wrong."""

    method: str = "lor2c"
    """lor2c, sharelor2c, mergelor2c, injectlor2c, imlor2c, lora, full or head."""

    r: int = 8
    """Rank (LoR2C and LoRA)."""

    alpha: float = 16.0
    """The update is scaled by alpha / r."""

    dropout: float = 0.1
    """On the input of A. 0.1 is what the paper's GLUE script uses for LoR2C."""

    target_modules: list[str] | str | None = None
    """LoR2C: the blocks; None = the longest list. LoRA: the linears; None = PEFT's choice for the model (query and
    value mostly), all linears where PEFT has none."""

    reads: str = "input"
    """LoR2C: what a module reads, the block's input or output. output takes its path around the block away and leaves
    its parameters: the ablation of the residual."""

    share_A: list[int] | None = None
    """sharelor2c: the blocks at which a new A begins, as [0, 2, 5] for blocks 0-1, 2-4 and 5 to the last. None = one A
    for all blocks."""

    max_fuses: int | str | None = None
    """mergelor2c, imlor2c: how often two modules are fused, or auto. None = 1 (the paper's best with 3 injections)."""

    max_injections: int | str | None = None
    """injectlor2c, imlor2c: how many modules give way to LoRA, or auto. None = 3 (the paper's best with 1 fuse)."""

    interval: int | None = None
    """Epochs or steps between two changes. None = the paper's schedule: all of them in the first quarter or so."""

    interval_unit: str = "epochs"
    """epochs or steps."""

    criterion: str = "sfs"
    """sfs (the paper's), official (its code's opposite), mean_singular_value, stable_rank, alignment."""

    survivor: str = "first"
    """Whose weights live on in a fused module: first or higher_score."""

    max_span: int | None = None
    """Most blocks that one fused module may cover."""

    parameter_budget: int | None = None
    """max_fuses auto: nothing more is fused once the adapter has this many parameters or fewer."""

    validation_budget: float | None = None
    """auto: no more changes once an evaluation after a change is worse by more than this than the one before."""

    auto_threshold: float | None = None
    """auto: the share of the singular values' sum that a change may lose. None = 0.1."""

    head_lr_factor: float = 1.0
    """Factor on learning_rate for the new head. The paper's GLUE script uses 0.5."""

    def __post_init__(self) -> None:
        problems = []
        if problem := method_problem(self.method, FINETUNING):
            problems.append(problem)
        problems += out_of_range(vars(self), RANGES)
        for name, methods in (("max_fuses", FUSING), ("max_injections", INJECTING)):
            count = getattr(self, name)
            if count is None or self.method not in FINETUNING:
                continue
            if self.method not in methods:
                problems.append(f"{name} is for {' and '.join(methods)}, not for method={self.method!r}")
        if self.method in FINETUNING and not self.is_lor2c and self.reads != "input":
            problems.append(f"reads={self.reads!r}: only for LoR2C and its variants, not for method={self.method!r}")
        if self.method in FINETUNING and self.share_A is not None and self.method != "sharelor2c":
            problems.append(f"share_A is for sharelor2c, not for method={self.method!r}")
        if self.method in FINETUNING and self.method not in CHANGING:
            idle = [
                name for name in _OF_CHANGES if getattr(self, name) != type(self).__dataclass_fields__[name].default
            ]
            if idle:
                problems.append(f"{', '.join(idle)}: only for methods that change, not for method={self.method!r}")
        budgets = [name for name in AUTO_SETTINGS if getattr(self, name) is not None]
        if budgets and "auto" not in (self.max_fuses, self.max_injections):
            problems.append(f"{', '.join(budgets)}: only for max_fuses=auto or max_injections=auto")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def is_lor2c(self) -> bool:
        """Whether the method is LoR2C or one of its variants."""
        return self.method.endswith("lor2c")

    @property
    def is_peft(self) -> bool:
        """Whether an adapter is saved, instead of a whole model."""
        return self.is_lor2c or self.method == "lora"


@dataclass
class Attached:
    """A model ready to train, and what has to watch its training."""

    model: nn.Module
    callbacks: list[Any] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Decisions of the structure callback so far, oldest first."""
        return [entry for callback in self.callbacks for entry in getattr(callback, "history", [])]


def attach(
    model: nn.Module, adapter: AdapterConfig, kind: Literal["classification", "regression", "instruction"]
) -> Attached:
    """Make `model` trainable as `adapter` says. What trains is float32, whatever the dtype of the rest.

    Raises ConfigError (or LoR2C's own errors) when the method does not fit the model.
    """
    if adapter.method == "full":
        return Attached(model)
    if adapter.method == "head":
        names = head_parameters(model)
        if kind == "instruction" or not names:
            raise ConfigError(
                "method='head' trains the new head of a classification or regression model; instructions need lor2c, "
                "lora or full"
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        return Attached(model)
    from peft import get_peft_model

    config = (_lor2c_config if adapter.is_lor2c else _lora_config)(model, adapter, TASK_TYPES[kind])
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"method={adapter.method!r}: {' '.join(str(error).split())}") from error
    train_in_float32(adapted)
    if adapter.method not in CHANGING:
        return Attached(adapted)
    callback = _structure_callback(adapter)
    # Looks at the model now, not only when training has begun: counts that it does not allow are wrong input.
    callback.on_train_begin(None, TrainerState(), TrainerControl(), model=adapted)
    return Attached(adapted, [callback])


def train_in_float32(model: nn.Module) -> None:
    """Trained weights in half precision become float32, and their modules take inputs of any dtype.

    PEFT sees to its adapters, not to a new head: steps of a usual learning rate are lost in the 8 bits of bfloat16.
    """
    for module in model.modules():
        half = [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype in _HALF]
        for parameter in half:
            parameter.data = parameter.data.float()
        if half:
            module.register_forward_pre_hook(_in_float32, with_kwargs=True)


_HALF = (torch.bfloat16, torch.float16)


def _in_float32(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    def widened(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALF else value

    return tuple(map(widened, args)), {name: widened(value) for name, value in kwargs.items()}


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters outside the pre-trained base of a transformers model: its new head."""
    prefix = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(prefix)}


def count_trained(model: nn.Module) -> dict[str, int]:
    """Parameters that train, {"adapter": in use under the present structure, "head": modules_to_save, "base": rest}."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trained.items() if "modules_to_save." in name)
    is_adapter = {name: ".lora_" in name or ".lor2c" in name for name in trained}
    adapter = sum(count for name, count in trained.items() if is_adapter[name])
    base = sum(trained.values()) - head - adapter
    tuner: Any = getattr(model, "base_model", None)
    if hasattr(tuner, "num_adapter_parameters"):
        adapter = tuner.num_adapter_parameters()
    if not adapter and not hasattr(model, "peft_config"):
        names = head_parameters(model)
        head = sum(count for name, count in trained.items() if name in names)
        base -= head
    return {"adapter": adapter, "head": head, "base": base}


def _lora_config(model: Any, adapter: AdapterConfig, task_type: str) -> Any:
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    targets = adapter.target_modules
    if targets is None and model.config.model_type not in KNOWN:
        targets = "all-linear"
    return LoraConfig(
        task_type=task_type,
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=targets,
    )


def _lor2c_config(model: Any, adapter: AdapterConfig, task_type: str) -> Any:
    from ..lor2c import LoR2CConfig

    return LoR2CConfig(
        task_type=task_type,
        r=adapter.r,
        lor2c_alpha=adapter.alpha,
        lor2c_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        reads=adapter.reads,
        share_A=adapter.share_A or adapter.method == "sharelor2c",
        injectable=adapter.method in INJECTING,
    )


def _structure_callback(adapter: AdapterConfig) -> Any:
    from ..lor2c import LoR2CStructureCallback

    def count(given: int | str | None, methods: tuple[str, ...], default: int) -> Any:
        return (default if given is None else given) if adapter.method in methods else 0

    settings: dict[str, Any] = {
        name: getattr(adapter, name) for name in ("interval", "interval_unit", "criterion", "survivor", "max_span")
    }
    settings |= {name: value for name in AUTO_SETTINGS if (value := getattr(adapter, name)) is not None}
    return LoR2CStructureCallback(
        max_fuses=count(adapter.max_fuses, FUSING, 1),
        max_injections=count(adapter.max_injections, INJECTING, 3),
        **settings,
    )
