"""Which methods are compared, and how: each one's changes to a recipe, and the options of a comparison."""

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, nearest_hint
from ..methods import MATRIX_OPTIMIZERS, METHODS, method_problem
from ..ranges import COUNT, COUNT_OR_0, COUNT_OR_SHARE, out_of_range


@dataclass(frozen=True)
class Contender:
    """A method: its changes to the recipe, and the learning rates that are tuned, the most important first.

    `equal_parameters`: its rank is chosen so that it has as many parameters, embeddings and head aside, as CR-Net.
    `optim`: what trains it; None: what trains the recipe.
    """

    model: dict[str, Any]
    rates: tuple[str, ...]
    equal_parameters: bool = False
    optim: str | None = None
    package: tuple[str, str] | None = None  # (module, what to install)


CONTENDERS = {
    "dense": Contender({"factorization": "dense"}, ("embedding", "full_rank")),
    "crnet": Contender({"factorization": "cross_layer"}, ("embedding", "low_rank", "full_rank")),
    "crnet_silu": Contender(
        {"factorization": "cross_layer", "increment_activation": "silu"},
        ("embedding", "low_rank", "full_rank"),
    ),
    "cola": Contender({"factorization": "cola"}, ("embedding", "low_rank"), True),
    "low_rank": Contender({"factorization": "low_rank"}, ("embedding", "low_rank"), True),
    "galore": Contender(
        {"factorization": "dense"},
        ("embedding", "full_rank"),
        optim="galore_adamw",
        package=("galore_torch", "galore-torch"),
    ),
    "apollo": Contender(
        {"factorization": "dense"},
        ("embedding", "full_rank"),
        optim="apollo_adamw",
        package=("apollo_torch", "apollo-torch"),
    ),
}
OPTIMIZERS = {
    "adamw": ("adamw_torch_fused", "AdamW"),
    **{name: (name, label) for name, label in MATRIX_OPTIMIZERS.items()},
}
"""After a + in a contender's name -> (`optim`, what it is called in tables)."""


def contender_of(name: str) -> Contender:
    """The contender of a name: of `CONTENDERS`, alone or with one of `OPTIMIZERS`: crnet+muon. Raises ConfigError."""
    method, plus, optimizer = name.partition("+")
    if problem := method_problem(method, CONTENDERS):
        raise ConfigError(problem)
    contender = CONTENDERS[method]
    if not plus:
        return contender
    if optimizer not in OPTIMIZERS:
        hint = nearest_hint(optimizer, OPTIMIZERS)
        raise ConfigError(f"method={name!r}: after + give one of {', '.join(OPTIMIZERS)}{hint}")
    if contender.optim is not None:
        raise ConfigError(f"method={name!r}: {method} is an optimizer itself; give {method} or dense+{optimizer}")
    return replace(contender, optim=OPTIMIZERS[optimizer][0])


def label_of(name: str) -> str:
    """What a contender is called in tables."""
    method, _, optimizer = name.partition("+")
    return f"{METHODS[method]}, {OPTIMIZERS[optimizer][1]}" if optimizer else METHODS[method]


DEFAULT_METHODS = ("dense", "crnet", "cola", "low_rank")


RANGES = {
    **dict.fromkeys(("seeds", "validation_blocks", "workers"), COUNT),
    "tuning_runs": COUNT_OR_0,
    "tuning_steps": COUNT_OR_SHARE,
}
"""Field of `Options` -> what it may be."""


@dataclass(kw_only=True)
class Options:
    """How a comparison is made. Raises ConfigError, naming every field that is wrong."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    """Names of `CONTENDERS`, alone or with an optimizer: crnet, crnet+muon."""

    seeds: int = 3
    """Runs of each method with its best rates: the recipe's seed and the numbers after it, for weights and order."""

    tuning_runs: int = 9
    """Most runs that the search for the learning rates of one method may take; 0 keeps the recipe's rates."""

    tuning_steps: float | None = None
    """Steps of such a run, or below 1 their share of the recipe's; None = a quarter."""

    validation_blocks: int = 128
    """Blocks behind the curves and the search; the final loss is of the whole validation split."""

    workers: int | None = None
    """Runs beside one another; None = as many as torch has threads on a CPU, one on CUDA."""

    def __post_init__(self) -> None:
        problems, contenders = [], []
        for name in self.methods:
            try:
                contenders.append((name, contender_of(name)))
            except ConfigError as error:
                problems.append(str(error))
        if not self.methods:
            problems.append(f"methods is empty; choose from {', '.join(CONTENDERS)}")
        problems += out_of_range(vars(self), RANGES)
        if problems:
            raise ConfigError("; ".join(problems))
        for name, contender in contenders:
            package = contender.package
            if package is not None and importlib.util.find_spec(package[0]) is None:
                raise ConfigError(f"method {name} needs a package that is missing: pip install {package[1]}")
