"""A recipe: everything that decides a run, in one YAML file.

    name: crnet_5m_python
    model:            {hidden_size: 256, ...}      # fields of CRNetConfig
    data:             {data: python-library, ...}  # fields of DataConfig
    parameter_groups: {full_rank_lr_factor: 0.2}   # fields of ParameterGroups
    training:         {max_steps: 600, ...}        # fields of transformers' TrainingArguments

Any field can be overridden by its own name (`--learning_rate 1e-3`) or, where two sections know it, with the section
before it (`--data.seed 3`).
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..data import DataConfig
from ..errors import ConfigError
from .parameter_groups import ParameterGroups

SECTIONS = ("training", "model", "data", "parameter_groups")
"""Order in which a bare name is looked up: `seed` is training's, `data.seed` the data's."""

# Set by crosslayer itself; a recipe that sets them would be ignored in part, so it is refused.
RESERVED_TRAINING_FIELDS = {
    "output_dir": "--output_dir of the command",
    "resume_from_checkpoint": "--resume",
    "do_train": "the verb",
    "do_eval": "the verb",
    "do_predict": "the verb",
    "logging_nan_inf_filter": "nothing: a loss that is not finite stops the run",
}


@dataclass(kw_only=True)
class Recipe:
    """A parsed recipe. Raises ConfigError for unknown fields (with the nearest known one) and wrong types."""

    name: str
    description: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    parameter_groups: ParameterGroups = field(default_factory=ParameterGroups)
    training: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every default of the data and the parameter groups spelled out, ready for YAML."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from a YAML file and apply overrides {field or section.field: value}.

    Raises ConfigError when the file is missing or is not YAML, for unknown fields and for values of a wrong type; all
    problems of one recipe are reported together.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"recipe {str(path)!r} does not exist; give a YAML file such as recipes/*.yaml.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {str(path)!r} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {str(path)!r} is not a mapping; see recipes/ for the form.")
    content.setdefault("name", path.stem)
    return build_recipe(content, overrides)


def build_recipe(content: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from the mapping that its YAML holds. Raises ConfigError like `load_recipe`."""
    problems: list[str] = []
    known = {section: _field_types(section) for section in SECTIONS}
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    plain = {"name": str(content.get("name", "run")), "description": str(content.get("description", ""))}

    for key, value in content.items():
        if key in SECTIONS:
            if not isinstance(value, Mapping):
                problems.append(f"section {key!r} is not a mapping")
                continue
            for name, setting in value.items():
                _set(sections, known, key, name, setting, problems)
        elif key not in plain:
            problems.append(_unknown(key, (*SECTIONS, *plain)))

    for key, value in (overrides or {}).items():
        if key in plain:
            plain[key] = str(value)
            continue
        section, _, name = key.rpartition(".")
        candidates = [section] if section else [s for s in SECTIONS if name in known[s]]
        if not candidates or candidates[0] not in known:
            problems.append(_unknown(key, [name for names in known.values() for name in names]))
            continue
        _set(sections, known, candidates[0], name, value, problems)

    if problems:
        raise ConfigError("; ".join(problems))
    return Recipe(
        **plain,
        model=sections["model"],
        data=DataConfig(**sections["data"]),
        parameter_groups=ParameterGroups(**sections["parameter_groups"]),
        training=sections["training"],
    )


def parse_value(text: str) -> Any:
    """The value of a command-line override, read as YAML: numbers, true/false, null, [lists], {mappings}, text."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    is_bare_mapping = isinstance(value, dict) and not text.startswith("{")  # a path or prompt with a colon
    return text if is_bare_mapping else value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; this one reads it as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _field_types(section: str) -> dict[str, Any]:
    if section == "data":
        owner: Any = DataConfig
    elif section == "parameter_groups":
        owner = ParameterGroups
    elif section == "model":
        from ..crnet import CRNetConfig

        # Checked by the configuration itself; hints of transformers' base class cannot be resolved at run time.
        return {f.name: Any for f in fields(CRNetConfig) if f.init}
    else:
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
        sections[section][name] = _convert(value, known[section][name])
    except (TypeError, ValueError):
        problems.append(f"{section}.{name}={value!r} is not {_describe(known[section][name])}")


def _convert(value: Any, hint: Any) -> Any:
    """Check the plain types (bool, int, float, str, None and unions of them); leave the others to their owner."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_union(hint) else (hint,)
    plain = [option for option in options if option in (bool, int, float, str, types.NoneType)]
    if len(plain) < len(options):
        return value
    for option in plain:
        if type(value) is option:
            return value
    if float in plain and type(value) is int:
        return float(value)
    if int in plain and type(value) is float and value.is_integer():
        return int(value)
    raise TypeError


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Union


def _describe(hint: Any) -> str:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_union(hint) else (hint,)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    return " or ".join(names.get(option, str(option)) for option in options)


def _unknown(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name.rpartition(".")[2], list(known), n=1)
    return f"{prefix}{name} is not a field of a recipe" + (f"; the nearest is {near[0]}" if near else "")
