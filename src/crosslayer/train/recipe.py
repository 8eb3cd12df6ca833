"""A recipe: everything that decides a run, in one YAML file.

    name: crnet_5m_python
    model:            {hidden_size: 256, ...}      # fields of CRNetConfig
    data:             {data: python-library, ...}  # fields of DataConfig
    parameter_groups: {full_rank_lr_factor: 0.2}   # fields of ParameterGroups
    optimizer:        {gradient_release: true}     # fields of OptimizerConfig
    parallel:         {fsdp_size: 8}               # fields of Parallel
    training:         {max_steps: 600, ...}        # fields of transformers' TrainingArguments
    monitor:          {on_nonfinite: skip, ...}    # fields of Monitor

and to fine-tune:

    model:            sentence-transformers/all-MiniLM-L6-v2     # a folder or a name on the hub
    data:             {task: sst2, ...}            # fields of TaskConfig
    adapter:          {method: lor2c, r: 8, ...}   # fields of AdapterConfig
    training:         {num_train_epochs: 3, ...}
    monitor:          {max_hours: 12, ...}         # fields of Monitor

Any field can be overridden by its own name (`--learning_rate 1e-3`) or, where two sections know it, with the section
before it (`--data.seed 3`).
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..data import DataConfig, TaskConfig
from ..errors import ConfigError, nearest_hint
from ..ranges import out_of_range
from ..recipes import recipe_path
from .gradient_release import OptimizerConfig
from .methods import AdapterConfig
from .monitor import Monitor
from .parallel import Parallel
from .parameter_groups import ParameterGroups
from .ranges import MODEL, PRETRAINING, TRAINING, warmup_problem
from .values import convert, describe, load_yaml, plain

Content = Mapping[str, Any]

# Set by crosslayer itself; a recipe that sets them would be ignored in part, so it is refused.
RESERVED_TRAINING_FIELDS = {
    "output_dir": "--output_dir of the command",
    "resume_from_checkpoint": "--resume",
    "do_train": "the verb",
    "do_eval": "the verb",
    "do_predict": "the verb",
    "logging_nan_inf_filter": "nothing: a loss that is not finite stops the run",
}


class _AnyRecipe:
    """What both kinds of recipe can do."""

    SECTIONS: ClassVar[tuple[str, ...]]
    """Order in which a bare name is looked up: `seed` is training's, `data.seed` the data's."""

    PLAIN: ClassVar[tuple[str, ...]]
    """Fields outside the sections, all of them text."""

    SPELLINGS: ClassVar[dict[str, str]] = {}
    """Other names of fields, for overrides."""

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every default of its dataclasses spelled out, ready for YAML."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


@dataclass(kw_only=True)
class Recipe(_AnyRecipe):
    """A parsed recipe to pre-train. Made by `load_recipe`, which checks every field."""

    name: str
    """What the run is called; its folder is runs/NAME. Left out: the name of the file."""

    description: str = ""
    """What it is for. Its first sentence stands in `crosslayer recipes`, the whole in the report."""

    model: dict[str, Any] = field(default_factory=dict)
    """The model: fields of CRNetConfig or of another family's configuration, and `base`."""

    data: DataConfig = field(default_factory=DataConfig)
    """What it reads."""

    parameter_groups: ParameterGroups = field(default_factory=ParameterGroups)
    """Factors on the learning rate."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """What the fields of TrainingArguments do not say of the optimizer."""

    parallel: Parallel = field(default_factory=Parallel)
    """How several processes share the model."""

    training: dict[str, Any] = field(default_factory=dict)
    """How it trains: fields of transformers' TrainingArguments."""

    monitor: Monitor = field(default_factory=Monitor)
    """What it does about numbers that go wrong, and about its time."""

    SECTIONS = ("training", "model", "data", "parameter_groups", "optimizer", "parallel", "monitor")
    PLAIN = ("name", "description")


@dataclass(kw_only=True)
class FinetuneRecipe(_AnyRecipe):
    """A parsed recipe to fine-tune. Made by `load_finetune_recipe`, which checks every field."""

    name: str
    """What the run is called; its folder is runs/NAME. Left out: the name of the file; TASK_METHOD without one."""

    description: str = ""
    """What it is for. Its first sentence stands in `crosslayer recipes`, the whole in the report."""

    model: str
    """Folder of a model or of a run, or a name on the hub. It has to be given."""

    data: TaskConfig
    """The task and its rows."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The method, and what it trains."""

    parallel: Parallel = field(default_factory=Parallel)
    """How several processes share the frozen model."""

    training: dict[str, Any] = field(default_factory=dict)
    """How it trains: fields of transformers' TrainingArguments."""

    monitor: Monitor = field(default_factory=Monitor)
    """What it does about numbers that go wrong, and about its time."""

    SECTIONS = ("training", "adapter", "data", "parallel", "monitor")
    SPELLINGS = {"rank": "r"}  # torchrun takes --r for one of its own
    PLAIN = ("name", "description", "model")


def load_recipe(path: str | Path, overrides: Content | None = None) -> Recipe:
    """A recipe by its name in the package or from a YAML file, with overrides {field or section.field: value} applied.

    Raises ConfigError when it is missing or is not YAML, for unknown fields and for values of a wrong type; all
    problems of one recipe are reported together.
    """
    return build_recipe(read_recipe(path), overrides)


def load_finetune_recipe(path: str | Path, overrides: Content | None = None) -> FinetuneRecipe:
    """As `load_recipe`, for a recipe to fine-tune."""
    return build_finetune_recipe(read_recipe(path), overrides)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe of the package or a file, named after it unless it has a name. Raises ConfigError."""
    path = recipe_path(path)
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {str(path)!r} does not exist; give a YAML file.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {str(path)!r} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {str(path)!r} is not a mapping; `crosslayer recipes --show NAME` shows the form.")
    content.setdefault("name", path.stem)
    return content


def build_recipe(content: Content, overrides: Content | None = None, *, ran: bool = False) -> Recipe:
    """A recipe from the mapping that its YAML holds. Raises ConfigError like `load_recipe`.

    Args:
        ran: it is that of a run, which may be a short trial of a long recipe and end while it warms up.
    """
    return _build(Recipe, content, overrides, ran)


def build_finetune_recipe(content: Content, overrides: Content | None = None, *, ran: bool = False) -> FinetuneRecipe:
    """A recipe to fine-tune from the mapping that its YAML holds. Raises ConfigError like `load_recipe`."""
    return _build(FinetuneRecipe, content, overrides, ran)


def _build(kind: type[_AnyRecipe], content: Content, overrides: Content | None, ran: bool) -> Any:
    problems: list[str] = []
    known = {section: field_types(kind, section) for section in kind.SECTIONS}
    sections: dict[str, dict[str, Any]] = {section: {} for section in kind.SECTIONS}
    texts = {"name": "run"}
    texts.update({key: str(content[key]) for key in kind.PLAIN if plain(content.get(key)) is not None})

    for key, value in ((str(key), value) for key, value in content.items()):
        if key in kind.SECTIONS:
            if not isinstance(value, Mapping):
                problems.append(f"section {key!r} is not a mapping")
                continue
            for name, setting in value.items():
                _set(sections, known, key, str(name), setting, problems)
        elif key not in kind.PLAIN:
            problems.append(_unknown(key, (*kind.SECTIONS, *kind.PLAIN)))

    overrides, twice = _spelled(kind, overrides or {})
    problems += twice
    for key, value in overrides.items():
        if key in kind.PLAIN:
            texts[key] = str(value)
            continue
        section, _, name = key.rpartition(".")
        candidates = [section] if section else [s for s in kind.SECTIONS if name in known[s]]
        if not candidates or candidates[0] not in known:
            problems.append(_unknown(key, [name for names in known.values() for name in names]))
            continue
        _set(sections, known, candidates[0], name, value, problems)

    given = {key.rpartition(".")[2] for key in overrides}
    if "lr_scheduler_type" in given and "lr_scheduler_kwargs" not in given:
        sections["training"].pop("lr_scheduler_kwargs", None)  # they belong to the recipe's own schedule

    if "model" in kind.PLAIN and "model" not in texts:
        problems.append("model is missing; give a folder or a name on the hub")
    is_pretraining = kind is Recipe
    problems += out_of_range(sections["training"], TRAINING | (PRETRAINING if is_pretraining else {}), "training")
    problems += out_of_range(sections["model"], MODEL, "model") if is_pretraining else []
    problems += _name_problem(texts["name"])
    is_trial = ran or ("max_steps" in given and "warmup_steps" not in given)  # may end while it warms up
    if not is_trial:
        problems += warmup_problem(sections["training"])
    if problems:
        raise ConfigError("; ".join(problems))
    parts: dict[str, Any] = {
        section: _OWNERS.get((kind, section), dict)(**sections[section]) for section in kind.SECTIONS
    }
    return kind(**texts, **parts)


def _spelled(kind: type[_AnyRecipe], overrides: Content) -> tuple[dict[str, Any], list[str]]:
    """Overrides by the names of their fields, and what stands there under two names."""
    found: dict[str, Any] = {}
    problems = []
    for key, value in overrides.items():
        section, dot, name = key.rpartition(".")
        field_name = section + dot + kind.SPELLINGS.get(name, name)
        if field_name in found:
            problems.append(f"{key} and {field_name} are one field; give one of them")
        found[field_name] = value
    return found, problems


def _name_problem(name: str) -> list[str]:
    """A run's folder is called after it: one part of a path, and no more."""
    if name.strip() and name not in (".", "..") and not re.search(r"[/\\\x00-\x1f]", name) and len(name) <= 200:
        return []
    return [f"name={name!r} cannot be a folder's; give a short name without / and \\ (--output_dir says where)"]


_OWNERS: dict[tuple[type[_AnyRecipe], str], type] = {
    (Recipe, "data"): DataConfig,
    (Recipe, "parameter_groups"): ParameterGroups,
    (Recipe, "optimizer"): OptimizerConfig,
    (Recipe, "parallel"): Parallel,
    (FinetuneRecipe, "parallel"): Parallel,
    (Recipe, "monitor"): Monitor,
    (FinetuneRecipe, "data"): TaskConfig,
    (FinetuneRecipe, "adapter"): AdapterConfig,
    (FinetuneRecipe, "monitor"): Monitor,
}
"""Sections that are dataclasses of ours; the others stay mappings."""


def field_types(kind: type[_AnyRecipe], section: str) -> dict[str, Any]:
    """Name of a field -> its type, for a dataclass of a recipe."""
    owner: Any = _OWNERS.get((kind, section))
    if owner is None and section == "model":
        from ..crnet.families import FAMILIES, config_class, field_names

        # Checked by the configuration of the family; hints of transformers' base class cannot be resolved at run time.
        return dict.fromkeys(
            {"base", "attn_implementation"}.union(*(field_names(config_class(family)) for family in FAMILIES)), Any
        )
    if owner is None:
        from transformers import TrainingArguments

        owner = TrainingArguments
    hints = typing.get_type_hints(owner)
    return {f.name: hints.get(f.name, Any) for f in fields(owner) if f.init}


def _set(sections: dict, known: dict, section: str, name: str, value: Any, problems: list[str]) -> None:
    if name not in known[section]:
        problems.append(_unknown(name, known[section], f"{section}."))
        return
    if section == "training" and name in RESERVED_TRAINING_FIELDS:
        problems.append(f"training.{name} is set by {RESERVED_TRAINING_FIELDS[name]}; remove it from the recipe")
        return
    if section == "training" and name == "bf16" and value == "auto":
        sections[section][name] = value
        return
    try:
        sections[section][name] = convert(value, known[section][name])
    except (TypeError, ValueError):
        problems.append(f"{section}.{name}={plain(value)!r} is not {describe(known[section][name])}")


def _unknown(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    return f"{prefix}{name} is not a field of a recipe{nearest_hint(name.rpartition('.')[2], known)}"
