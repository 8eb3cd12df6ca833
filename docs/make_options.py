"""Writes docs/options.md from docstrings, tables of ranges and the help of the verbs.

python docs/make_options.py
"""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import typer
import yaml
from transformers import PreTrainedConfig, TrainingArguments

from crosslayer.cli.app import app
from crosslayer.cli.ranges import OPTIONS
from crosslayer.crnet.configuration_cross_layer import CrossLayerFields
from crosslayer.crnet.families import FAMILIES, config_class
from crosslayer.data import DataConfig, TaskConfig
from crosslayer.data import config as data_config
from crosslayer.data import tasks as data_tasks
from crosslayer.lor2c import LoR2CConfig
from crosslayer.methods import FINETUNING
from crosslayer.ranges import AT_LEAST_0, MOST_TOKENS, NAME, Range
from crosslayer.train import parallel
from crosslayer.train import ranges as training_ranges
from crosslayer.train.finetune import default_training as finetuning_defaults
from crosslayer.train.gradient_release import OptimizerConfig
from crosslayer.train.methods import RANGES as ADAPTER_RANGES
from crosslayer.train.methods import AdapterConfig
from crosslayer.train.monitor import RANGES as MONITOR_RANGES
from crosslayer.train.monitor import Monitor
from crosslayer.train.parallel import Parallel
from crosslayer.train.parameter_groups import ParameterGroups
from crosslayer.train.recipe import RESERVED_TRAINING_FIELDS, FinetuneRecipe, Recipe, build_recipe
from crosslayer.train.run import default_training as pretraining_defaults

PAGE = Path(__file__).with_name("options.md")

INTRODUCTION = """\
# Options

<!-- Written by docs/make_options.py from docstrings, ranges and help texts: change those, then run it. -->

Every field of [recipes to pre-train](#recipes-to-pre-train) and [to fine-tune](#recipes-to-fine-tune), of
[`monitor`](#monitor), of [`training`](#training), of [models](#configurations-of-models) and of [LoR2C](#lor2cconfig);
every option of the [verbs](#verbs).

**How a field is written.** In a recipe as `field: value` below its section. As an option of `pretrain` and `compare`
(recipes to pre-train) or of `finetune` (recipes to fine-tune) as `--field value`, with `_` or `-`; where two sections
know a name, the bare one is training's (`--seed 1`) and `--data.seed 1` the data's. Lists and mappings are YAML:
`--rank_pattern '{"layers.1.q": 8}'`. Where the default is `null`, the text says what null means. A value that a field
does not take is refused in one line before anything is written, and so is a field that does not exist.

**Environment.** `CROSSLAYER_CACHE`: folder of tokenised data (else `~/.cache/crosslayer`). `CROSSLAYER_DEBUG=1`: an
error shows where it was raised. `HF_HOME`, `HF_TOKEN` and the like are the hub's own.

"""

TRAINING = """\
The fields of transformers' [TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer), which
says what each does; `bf16` also takes `auto`, bf16 on a CUDA device that has it, and `optim` of `pretrain` also takes
`muon` and `spectron` ([optimizers.md](optimizers.md)).
"""

TRAINING_DEFAULTS = """
`disable_tqdm` is true where standard error is no terminal: there progress is plain lines. In fine-tuning
`save_strategy` follows `eval_strategy`, the best checkpoint by the task's first metric is kept
(`load_best_model_at_end`, `metric_for_best_model`), and instructions go through TRL's SFTConfig with `bf16` and
`activation_checkpointing` off.
"""

MODELS = """\
The section `model` of a recipe to pre-train, and the arguments of `CRNetConfig` and its kin: CR-Net's own fields, and
those of the family. In a recipe `base` gives family and shape (a name on the hub, a folder, or a mapping of fields with
`model_type`; without it the family is Llama), `vocab_size` and special tokens come from the tokenizer, and `recompute`
also takes `auto`, the fastest policy that fits the device. A recipe alone has `attn_implementation`: `auto` (the
default), `sdpa`, `eager`, `sdpa_documents`, `flex_attention`, `flash_attention_2` or `flash_attention_3`
([pretraining.md](pretraining.md#attention)).
"""

VERBS = """\
`crosslayer --version`, `crosslayer --install-completion` and `--show-completion` (for your shell) stand alone. Every
verb takes `--help`. Names with `_` may be written with `-`.
"""

OWN_WORDS = {
    "num_key_value_heads": "Heads of keys and values. null: num_attention_heads.",
    "head_dim": "Width of a head. null: hidden_size // num_attention_heads.",
    "n_inner": "Width of the MLP. null: 4 n_embd.",
    "rope_parameters": "Rotary embeddings: `rope_theta`, and what a scaling needs. null: the default ones.",
    "pretraining_tp": "Tensor parallelism in another framework's pre-training; without effect here.",
    "layer_types": "Kind of each layer, `full_attention` or `sliding_attention`. null: the family's pattern.",
    "mlp_only_layers": "Numbers of layers with a dense MLP in place of a mixture.",
    "decoder_sparse_step": "Every so many layers there is a mixture.",
    "first_k_dense_replace": "The first so many layers have a dense MLP in place of a mixture.",
    "dtype": "Of the weights.",
}
"""Where the first sentence of transformers' text does not say it."""


@dataclass
class Row:
    name: str
    takes: str
    default: str
    what: str


# ---------------------------------------------------------------------------------------------------- docstrings


def attribute_docs(cls: type) -> dict[str, str]:
    """Field -> the string that stands below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[ast.unparse(field.target)] = one_line(str(text.value.value))
    return docs


def argument_docs(cls: type) -> dict[str, str]:
    """Field -> its text in the section "Args" of a class's docstring."""
    section = re.search(r"^Args?:\n((?: .*\n?|\n)*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    docs: dict[str, str] = {}
    for part in re.split(r"\n(?=\S)", textwrap.dedent(section[1])) if section else ():
        field = re.match(r"(\w+)(?: \(.*?\))?:\s+(.*)", part, re.DOTALL)
        if field:
            text = one_line(field[2].split("\n\n")[0])
            docs[field[1]] = text[:1].upper() + text[1:]
    return docs


def one_line(text: str) -> str:
    """A text as a cell of a table; nothing is null there, as in YAML."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


def first_sentence(text: str) -> str:
    """Of transformers' texts, which go on for paragraphs; without its marks for links."""
    text = re.split(r"(?<=[.)])\s+(?=[A-Z[])", text)[0]
    return re.sub(r"\[(`[^`]*`)\]", r"\1", text).replace("`~", "`").removesuffix(".") + "."


# ------------------------------------------------------------------------------------------------- types, values

WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "mapping", list: "list"}


def in_words(hint: Any) -> str:
    """A type as a reader of recipes knows it; null is said by the default."""
    if isinstance(hint, str):
        return hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [option for option in arguments if option is not types.NoneType]
        if float in kinds:
            kinds = [kind for kind in kinds if kind is not int]
        return " or ".join(dict.fromkeys(map(in_words, kinds)))
    if origin is typing.Annotated:
        return in_words(arguments[0])
    if origin is typing.Literal:
        return ", ".join(map(str, arguments))
    if origin in (list, set):
        plural = {int: "whole numbers", str: "texts"}.get(arguments[0] if arguments else None, "")
        return f"list of {plural}" if plural else "list"
    if dataclasses.is_dataclass(hint):
        return "section"
    if (isinstance(hint, type) and issubclass(hint, Enum)) or hint is torch.dtype:
        return "text"
    name = getattr(hint, "__name__", str(hint))
    return WORDS.get(origin or hint, "mapping" if name.endswith("Parameters") else name)


def value_of(value: Any) -> str:
    """A value as YAML has it; nothing for a section."""
    if dataclasses.is_dataclass(value):
        return ""
    value = value.value if isinstance(value, Enum) else value
    text = f"{value:g}" if isinstance(value, float) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def default_of(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def takes(hint: Any, allowed: Range | None) -> str:
    """What a field may be: the words of its range, or its type."""
    if allowed is None:
        return in_words(hint)
    if allowed is NAME:
        return "text"
    words = re.sub(rf" from (\d+) to {MOST_TOKENS}$", r" of at least \1", allowed.words)
    words = re.sub(r"^(True|False)\b", lambda found: found[0].lower(), words)
    return re.sub(r"^an? (?=\w)", "", words)


def rows_of(
    cls: type, docs: Mapping[str, str], ranges: Mapping[str, Range] = {}, names: Iterable[str] = ()
) -> list[Row]:
    """A row for each field (or those of these names). Raises LookupError for one that nobody has described."""
    hints = typing.get_type_hints(cls, localns={"torch": torch})  # which transformers imports for type checkers
    rows, wanted = [], set(names)
    for field in dataclasses.fields(cls):
        if not field.init or (wanted and field.name not in wanted):
            continue
        if not docs.get(field.name):
            raise LookupError(f"{cls.__name__}.{field.name} has no docstring")
        default = default_of(field)
        text = "" if default is MISSING else value_of(default)
        kind = takes(hints.get(field.name, field.type), ranges.get(field.name))
        rows.append(Row(field.name, kind, text, docs[field.name]))
    return rows


def table(rows: Iterable[Row], heading: str = "field") -> str:
    lines = [f"| {heading} | takes | default | what |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.name}`", row.takes, row.default, row.what)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------- recipes


def recipes() -> str:
    """Both kinds of recipe, section by section."""
    parts = ["## Recipes to pre-train\n"]
    for kind, sections in (
        (
            Recipe,
            {
                "data": (DataConfig, data_config.RANGES),
                "parameter_groups": (ParameterGroups, None),
                "optimizer": (OptimizerConfig, None),
                "parallel": (Parallel, parallel.RANGES),
            },
        ),
        (
            FinetuneRecipe,
            {
                "data": (TaskConfig, data_tasks.RANGES),
                "adapter": (AdapterConfig, ADAPTER_RANGES),
                "parallel": (Parallel, parallel.RANGES),
            },
        ),
    ):
        if kind is FinetuneRecipe:
            parts.append("## Recipes to fine-tune\n")
        parts.append(table(rows_of(kind, attribute_docs(kind))))
        for section, (cls, ranges) in sections.items():
            known = ranges if ranges is not None else dict.fromkeys(attribute_docs(cls), AT_LEAST_0)
            parts.append(f"### `{section}` to {'fine-tune' if kind is FinetuneRecipe else 'pre-train'}\n")
            parts.append(f"{first_sentence(one_line(cls.__doc__ or ''))}\n")
            parts.append(table(rows_of(cls, attribute_docs(cls), known)))
    return "\n".join(parts)


def monitor() -> str:
    """The section that both kinds of recipe have."""
    rows = rows_of(Monitor, attribute_docs(Monitor), MONITOR_RANGES)
    return "\n".join(["## `monitor`\n", f"{first_sentence(one_line(Monitor.__doc__ or ''))}\n", table(rows)])


def training() -> str:
    """transformers' TrainingArguments: what is different here."""
    theirs = {field.name: default_of(field) for field in dataclasses.fields(TrainingArguments)}
    recipe = build_recipe({"name": "options"})
    columns: list[dict[str, str]] = [{name: value_of(value) for name, value in pretraining_defaults(recipe).items()}]
    for kind in ("classification", "instruction"):
        of_methods: dict[str, dict[str, list[str]]] = {}
        for method in FINETUNING:
            if kind == "instruction" and method == "head":
                continue
            task: Any = SimpleNamespace(kind=kind)
            for name, value in finetuning_defaults(task, AdapterConfig(method=method)).items():
                of_methods.setdefault(name, {}).setdefault(value_of(value), []).append(method)
        columns.append({name: _by_method(values) for name, values in of_methods.items()})
    names = dict.fromkeys(name for column in columns for name in column if name != "disable_tqdm")
    lines = [
        "| field | transformers | pre-training | classification, regression | instructions |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        cells = [value_of(theirs[name]), *(column.get(name, "") for column in columns)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    allowed = {**training_ranges.TRAINING, **training_ranges.PRETRAINING}
    limits = [f"| `{name}` | {takes(None, kind)} |" for name, kind in sorted(allowed.items())]
    reserved = [f"| `{name}` | {owner} |" for name, owner in RESERVED_TRAINING_FIELDS.items()]
    return "\n".join(
        [
            "## `training`\n",
            TRAINING,
            "**Defaults that differ** where a recipe has none of its own (an empty cell is transformers' default):\n",
            *lines,
            TRAINING_DEFAULTS,
            "**Narrower here than in transformers:**\n",
            "| field | takes |",
            "|---|---|",
            *limits,
            "\n**Set by the command**, and refused in a recipe:\n",
            "| field | set by |",
            "|---|---|",
            *reserved,
            "",
        ]
    )


def _by_method(values: Mapping[str, list[str]]) -> str:
    first, *others = values.items()
    return "; ".join([first[0], *(f"{value} for {', '.join(methods)}" for value, methods in others)])


# -------------------------------------------------------------------------------------------------- configurations


def configurations() -> str:
    """CR-Net's own fields, those of Llama's block, and what is different in the other families."""
    base_rows = _base_rows()
    common = {row.name for row in base_rows}
    parts = [
        "## Configurations of models\n",
        MODELS,
        "### CR-Net's own, in every family\n",
        table(rows_of(CrossLayerFields, argument_docs(CrossLayerFields))),
    ]
    llama: dict[str, Row] = {}
    for family in FAMILIES:
        cls = config_class(family)
        rows = {row.name: row for row in _family_rows(cls) if row.name not in common}
        parts.append(f"### `{cls.__name__}`\n")
        if not llama:
            llama = rows
            parts.append("The fields of transformers' `LlamaConfig`.\n")
            parts.append(table(rows.values()))
            continue
        parts.append(_difference(cls, rows, llama))
    parts += ["### In every configuration of transformers\n", table(base_rows)]
    return "\n".join(parts)


def _difference(cls: Any, rows: dict[str, Row], llama: dict[str, Row]) -> str:
    parent = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
    new = [row for name, row in rows.items() if name not in llama]
    changed = [
        f"`{name}={row.default.strip('`')}`"
        for name, row in rows.items()
        if name in llama and row.default != llama[name].default
    ]
    text = [f"The fields of transformers' `{parent.__name__}`: those of Llama"]
    if missing := [f"`{name}`" for name in llama if name not in rows]:
        text.append(f" without {', '.join(missing)}")
    text.append(f"; other defaults: {', '.join(changed)}" if changed else "; the same defaults")
    if aliases := [f"`{one}` for `{other}`" for one, other in cls.attribute_map.items() if other in rows]:
        text.append(f"; also by other names: {', '.join(aliases)}")
    if cls.unsupported:
        text.append(f"; refused where they are on: {', '.join(f'`{name}`' for name in cls.unsupported)}")
    return "".join(text) + ("; and\n\n" + table(new) if new else ".\n")


def _family_rows(cls: Any) -> list[Row]:
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("transformers.models."):
            docs |= {name: first_sentence(text) for name, text in argument_docs(base).items()}
    docs |= {name: text for name, text in OWN_WORDS.items() if name in docs} | attribute_docs(cls)
    own = {field.name for field in dataclasses.fields(CrossLayerFields)}
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = [field.name for field in dataclasses.fields(cls) if field.name not in own | general]
    return rows_of(cls, docs, training_ranges.MODEL, names)


def _base_rows() -> list[Row]:
    docs = {name: first_sentence(text) for name, text in argument_docs(PreTrainedConfig).items()} | OWN_WORDS
    names = [field.name for field in dataclasses.fields(PreTrainedConfig) if field.name in docs]
    return rows_of(PreTrainedConfig, docs, {}, names)


def adapters() -> str:
    """LoR2CConfig, for those who use PEFT themselves."""
    docs = argument_docs(LoR2CConfig) | {
        field.name: f"{str(field.metadata.get('help', '')).removesuffix('.')}."
        for base in LoR2CConfig.__mro__
        if base is not LoR2CConfig and dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
    }
    return "\n".join(
        [
            "## `LoR2CConfig`\n",
            "For PEFT's `get_peft_model` ([lor2c.md](lor2c.md)); `finetune` makes it from the section `adapter`.\n",
            table(rows_of(LoR2CConfig, docs)),
        ]
    )


# ----------------------------------------------------------------------------------------------------------- verbs


def verbs() -> str:
    """Arguments and options of every verb."""
    parts = [
        "## Verbs\n",
        VERBS,
    ]
    for name, function, epilog in commands():
        call = inspect.unwrap(function)
        rows = []
        for parameter in inspect.signature(call, eval_str=True).parameters.values():
            if typing.get_origin(parameter.annotation) is typing.Annotated:
                rows.append(option_row(f"{name} {parameter.name}", parameter))
        summary = one_line((call.__doc__ or "").split("\n\n")[0])
        parts.append(f"### `{name}`\n")
        takes_fields = "context" in inspect.signature(call).parameters
        parts.append(f"{summary}{' Fields of the recipe are options too.' if takes_fields else ''}\n")
        parts.append(table(rows, "argument or option"))
        if epilog:
            parts.append(f"{one_line(epilog)}\n")
    return "\n".join(parts)


def commands() -> list[tuple[str, Any, str | None]]:
    """(name, function, what its help ends with) of every verb."""
    groups = [("", app), *((f"{group.name} ", group.typer_instance) for group in app.registered_groups)]
    return sorted(
        (f"{prefix}{command.callback.__name__}", command.callback, command.epilog)
        for prefix, group in groups
        for command in typing.cast(typer.Typer, group).registered_commands
        if command.callback is not None
    )


def option_row(where: str, parameter: inspect.Parameter) -> Row:
    """A row from a parameter that typer reads."""
    hint, info = typing.get_args(parameter.annotation)[:2]
    is_argument = type(info).__name__ == "ArgumentInfo"
    if not info.help:
        raise LookupError(f"{where} has no help")
    names = [each for each in (info.default, *(info.param_decls or ())) if str(each).startswith("--")]
    name = parameter.name.upper() if is_argument else (names or [f"--{parameter.name}"])[0]
    found = re.search(r"\s*\[default: (.*?)\](?=\.|$)", info.help)
    what = info.help.replace(found[0], "").replace("....", "...") if found else info.help
    if hint is bool:
        return Row(name, "", "off", what)
    default = "" if parameter.default in (inspect.Parameter.empty, None, "") else value_of(parameter.default)
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType] or [hint]
    kind = takes(hint, OPTIONS.get(parameter.name, NAME if kinds == [str] else None))
    if parameter.default is inspect.Parameter.empty:
        default = "required"
    return Row(name, kind, found[1] if found else default, what if what.endswith(".") else f"{what}.")


def page() -> str:
    """The whole page. Raises LookupError for a field without a docstring or an option without a help text."""
    parts = (recipes(), monitor(), training(), configurations(), adapters(), verbs())
    return INTRODUCTION + "\n".join(parts)


if __name__ == "__main__":
    try:
        PAGE.write_text(page(), encoding="utf-8")
    except LookupError as error:
        sys.exit(f"make_options.py: {error.args[0]}; write one")
