"""Which parameter takes which learning rate and weight decay."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch import nn

from ..crnet import LowRankExperts, LowRankLinear
from ..crnet.functions import CarriedLayerNorm, CarriedRMSNorm
from ..errors import ConfigError
from ..ranges import AT_LEAST_0, out_of_range


@dataclass(kw_only=True)
class ParameterGroups:
    """Factors on `learning_rate`, by kind of parameter. Norms and biases take the learning rate as it is.

    Weight decay applies to dense matrices and to A and B; not to beta (decay towards 0 would ruin the inversion of the
    recurrence), norms, biases, embeddings and head.
    """

    embedding_lr_factor: float = 8.0
    """Embeddings and head. Our choice, from the quality study in docs/crnet.md: every method wanted at least 16 times
    the rate of its matrices there; an eighth of the best cost dense 0.37 nats and CR-Net 0.22."""

    full_rank_lr_factor: float = 0.2
    """Dense matrices of the layers: all of them in a dense model, the first layer's in CR-Net. Our choice,
    from the same study: CR-Net's first layer wanted an eighth of the factors' rate."""

    low_rank_lr_factor: float = 1.0
    """A and B."""

    beta_lr_factor: float = 1.0
    """beta."""

    def __post_init__(self) -> None:
        problems = list(out_of_range(vars(self), {field.name: AT_LEAST_0 for field in fields(self)}))
        if problems:
            raise ConfigError("; ".join(problems))


def group_names(model: nn.Module) -> dict[str, str]:
    """Name of every parameter -> its group: embeddings, full_rank, low_rank, beta, or other (norms and biases)."""
    low_rank_matrices = {
        id(factor.weight)
        for module in model.modules()
        if isinstance(module, LowRankLinear)
        for factor in (module.A, module.B)
    }
    for module in model.modules():
        if isinstance(module, LowRankExperts):
            low_rank_matrices |= {id(parameter) for parameter in module.parameters()}
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, CarriedLayerNorm | CarriedRMSNorm)
        for parameter in module.parameters()
    }
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        embeddings.add(id(head.weight))

    def group(name: str, parameter: nn.Parameter) -> str:
        if id(parameter) in embeddings:
            return "embeddings"
        if id(parameter) in low_rank_matrices:
            return "low_rank"
        if parameter.dim() > 1 and id(parameter) not in norms:  # of linears, routers and dense experts
            return "full_rank"
        return "beta" if name.endswith(".beta") else "other"

    return {name: group(name, parameter) for name, parameter in model.named_parameters()}


def optimizer_groups(
    model: nn.Module, factors: ParameterGroups, learning_rate: float, weight_decay: float
) -> Iterable[dict]:
    """Parameter groups for any torch optimizer; frozen parameters and empty groups are left out.

    The group of norms and biases comes first: its learning rate, which is the one that gets logged, has no factor.
    """
    settings = {
        "other": (1.0, 0.0),
        "embeddings": (factors.embedding_lr_factor, 0.0),
        "full_rank": (factors.full_rank_lr_factor, weight_decay),
        "low_rank": (factors.low_rank_lr_factor, weight_decay),
        "beta": (factors.beta_lr_factor, 0.0),
    }
    names = group_names(model)
    members: dict[str, list[nn.Parameter]] = {group: [] for group in settings}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[names[name]].append(parameter)
    return [
        {"params": members[group], "lr": learning_rate * factor, "weight_decay": decay, "name": group}
        for group, (factor, decay) in settings.items()
        if members[group]
    ]


def divide_groups(theirs: Iterable[dict], ours: Iterable[dict]) -> list[dict]:
    """The groups of an optimizer that treats some matrices in its own way, each divided by learning rate and decay."""
    ours = list(ours)
    divided = []
    for outer in theirs:
        members = {id(parameter) for parameter in outer["params"]}
        for inner in ours:
            both = [parameter for parameter in inner["params"] if id(parameter) in members]
            if both:
                divided.append({**outer, **inner, "params": both})
    return divided
