"""Tasks to fine-tune on: GLUE by name, or your own classification, regression or instruction data.

    task = load_task(TaskConfig(task="mrpc", data="glue/mrpc"))
    task.train[0]              # {"text": ..., "text_pair": ..., "label": 1}

Whatever the columns are called in the source, rows come out as `text`, `text_pair`, `label` (an id, or a number), or
as `prompt` and `completion` for instructions. Local files and hub datasets take the same path.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, DataError, nearest_hint
from ..ranges import COUNT, COUNT_OR_0, LENGTH, NAME, PART, out_of_range, whole
from .config import cache_root, is_hub, local_path, source_problem
from .fit import DEFAULT_MAX_LENGTH
from .instructions import INSTRUCTION_COLUMNS, instruction_form, to_prompts
from .rows import Rows, has_split, load_rows, looks_like_number, require_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Kind = Literal["classification", "regression", "instruction"]
KINDS: tuple[Kind, ...] = ("classification", "regression", "instruction")
GLUE_HUB = "hf:nyu-mll/glue"
MOST_CLASSES = 2**16
_NAMES = ("train_split", "validation_split", "text_column", "text_pair_column", "label_column", "cache_dir")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GlueTask:
    """Columns, labels in id order (none: a score) and metrics, the deciding one first (arXiv 1804.07461, table 1)."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    validation_split: str = "validation"


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation", "accuracy")),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": GlueTask(_PAIR, (), ("pearson", "spearman")),
    "mnli": GlueTask(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",), "validation_matched"
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT, ("accuracy",)),
    "rte": GlueTask(_PAIR, _ENTAILMENT, ("accuracy",)),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment"), ("accuracy",)),
}


RANGES = {
    **dict.fromkeys(("max_train_rows", "max_validation_rows"), COUNT),
    **dict.fromkeys(_NAMES, NAME),
    "seed": COUNT_OR_0,
    "validation_fraction": PART,
    "max_length": LENGTH,
    "num_labels": whole(2, MOST_CLASSES, f"a whole number from 2 to {MOST_CLASSES}"),
}
"""Field of `TaskConfig` -> what it may be; a task and a source have forms of their own."""


@dataclass(kw_only=True)
class TaskConfig:
    """What to fine-tune on. Raises ConfigError, naming every field that is wrong."""

    task: str | None = None
    """A GLUE task (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli; `glue/` may stand before it), or the kind of
    your own `data`: classification, regression, instruction. None = told by the columns."""

    data: str | None = None
    """A file (.jsonl, .json, .csv, .tsv, each also .gz, .parquet), a folder with train.* and validation.*, or
    hf:owner/name[:config]. None = the GLUE task from the hub. For a GLUE task also a folder of task folders."""

    validation_data: str | None = None
    """Another file or hub dataset to validate on. None = the validation split, or a part of the training rows."""

    train_split: str = "train"
    """Name of the training split."""

    validation_split: str | None = None
    """Name of the validation split. None = validation (validation_matched for mnli)."""

    validation_fraction: float = 0.1
    """Share of the rows that goes to validation where own `data` has no validation split and no `validation_data`."""

    text_column: str | None = None
    """Own data: column of the text. None = text or sentence."""

    text_pair_column: str | None = None
    """Own data: column of the second text, for tasks on pairs."""

    label_column: str = "label"
    """Own data: column of the class (a number or a name) or of the score."""

    num_labels: int | None = None
    """Own data with numbered classes: how many there are. None = the largest in the training rows, plus 1."""

    max_length: int = DEFAULT_MAX_LENGTH
    """Longest input in tokens; longer ones are cut. At most the model's positions, which the default gives way to."""

    max_train_rows: int | None = None
    """Train on a random subset of so many rows."""

    max_validation_rows: int | None = None
    """Validate on the first so many rows."""

    cache_dir: str | None = None
    """Where copies of the rows are kept. None = $CROSSLAYER_CACHE, or ~/.cache/crosslayer."""

    seed: int = 0
    """Draws the subset, and the validation part of a single file."""

    def __post_init__(self) -> None:
        if self.task is not None:
            self.task = self.task.removeprefix("glue/").lower()
        problems = []
        if self.task is not None and self.task not in (*GLUE, *KINDS):
            hint = nearest_hint(self.task, [*GLUE, *KINDS])
            problems.append(f"task={self.task!r} is none of {', '.join([*GLUE, *KINDS])}{hint}")
        elif self.data is None and self.task not in GLUE:
            problems.append("give a GLUE task (task=sst2), or your own data (data=FILE)")
        problems += out_of_range(vars(self), RANGES)
        for name in ("data", "validation_data"):
            problems += filter(None, [source_problem(name, getattr(self, name))])
        if problems:
            raise ConfigError("; ".join(problems))


@dataclass
class Task:
    """A task as it is trained on."""

    name: str
    kind: Kind
    source: str
    train: Dataset
    validation: Dataset
    labels: tuple[str, ...]
    """Names of the classes in the order of their ids; empty for the other kinds."""
    metrics: tuple[str, ...]
    """Metrics to report, the deciding one first; `loss` for instructions."""


def load_task(config: TaskConfig) -> Task:
    """Read, check and name the columns of a task.

    Raises DataError for a source that is missing, unreadable or empty, for a column that is not there, and for labels
    that are null, no number where one is due, or out of range.
    """
    glue = GLUE.get(config.task or "")
    source = _source(config)
    train, validation = _load_splits(config, source, glue)
    kind = _kind(config, train, source)
    if kind == "instruction":
        return Task(config.task or kind, kind, source, to_prompts(train), to_prompts(validation), (), ("loss",))
    columns, label = (glue.columns, "label") if glue else (_text_columns(config, train), config.label_column)
    for rows in (train, validation):
        require_columns(rows, columns, rows.label, "text_column, text_pair_column")
        require_columns(rows, (label,), rows.label, "label_column")
        _check_texts(rows, columns)
    if kind == "regression":
        names: tuple[str, ...] = ()
        to_label: Callable[[Any], Any] = float
        for rows in (train, validation):
            _check_scores(rows, label)
    else:
        names, to_label = _classes(config, glue, train, validation, label)
    metrics = (
        glue.metrics if glue else {"classification": ("accuracy", "f1"), "regression": ("pearson", "spearman")}[kind]
    )
    prepared = [_to_texts(rows, columns, label, to_label) for rows in (train, validation)]
    return Task(config.task or kind, kind, source, prepared[0], prepared[1], names, metrics)


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int) -> Dataset:
    """Rows of a classification or regression task as input_ids, attention_mask (...) and `label`."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        pairs = (batch["text_pair"],) if "text_pair" in batch else ()
        return dict(tokenizer(batch["text"], *pairs, truncation=True, max_length=max_length))

    return rows.map(encode, batched=True, remove_columns=[name for name in rows.column_names if name != "label"])


# ----------------------------------------------------------------------------------------------- finding rows


def _source(config: TaskConfig) -> str:
    if config.data is None:
        return f"{GLUE_HUB}:{config.task}"
    inner = local_path(config.data) / (config.task or "")
    if config.task in GLUE and not is_hub(config.data) and not has_split(config.data, config.train_split):
        return str(inner) if os.path.isdir(inner) else config.data
    return config.data


def _load_splits(config: TaskConfig, source: str, glue: GlueTask | None) -> tuple[Rows, Rows]:
    split = config.validation_split or (glue.validation_split if glue else "validation")
    if config.validation_split is None and not is_hub(source) and not has_split(source, split):
        split = "validation"  # local copies of mnli that call it so
    train = _load(config, source, config.train_split, glue)
    if config.validation_data is not None:
        validation = _load(config, config.validation_data, split, glue)
    elif glue or config.validation_split is not None or has_split(source, split):
        validation = _load(config, source, split, glue)
    else:
        if len(train) < 2:
            raise DataError(f"{source}: one row cannot be split into training and validation; give validation_data")
        held_out = min(math.ceil(config.validation_fraction * len(train)), len(train) - 1)
        parts = _numbered(train).train_test_split(test_size=held_out, seed=config.seed)
        train, validation = train.select(parts["train"]["row"]), train.select(parts["test"]["row"])
    train, validation = replace(train, label=f"{source} (train)"), replace(validation, label=f"{source} (validation)")
    if config.max_train_rows is not None and config.max_train_rows < len(train):
        train = train.select(_numbered(train).shuffle(seed=config.seed)["row"][: config.max_train_rows])
    if config.max_validation_rows is not None and config.max_validation_rows < len(validation):
        validation = validation.select(range(config.max_validation_rows))
    return train, validation


def _load(config: TaskConfig, source: str, split: str, glue: GlueTask | None) -> Rows:
    label = "label" if glue else config.label_column
    texts = glue.columns if glue else ("text", "sentence", config.text_column, config.text_pair_column)
    wanted = {*texts, label, *INSTRUCTION_COLUMNS} - {None}
    cache = cache_root(config.cache_dir) / "rows"
    return load_rows(source, split, wanted, numbers=(label,), cache_dir=cache)


def _numbered(rows: Rows) -> Dataset:
    """Row numbers, to be drawn from as `datasets` draws rows."""
    from datasets import Dataset

    return Dataset.from_dict({"row": range(len(rows))})


def _kind(config: TaskConfig, rows: Rows, source: str) -> Kind:
    if config.task in GLUE:
        return "classification" if GLUE[config.task].labels else "regression"
    if config.task in KINDS:
        return config.task
    if instruction_form(rows) is not None:
        return "instruction"
    if config.label_column in rows.columns:
        is_score = any(isinstance(value, float) for value in rows.column(config.label_column))
        return "regression" if is_score else "classification"
    raise DataError(
        f"{source}: columns {', '.join(map(repr, rows.columns))} are no task: classification and regression need "
        f"a text and {config.label_column!r} (label_column), instructions need instruction and output, prompt and "
        "completion, or messages"
    )


# ------------------------------------------------------------------------------------ classes, scores, texts


def _text_columns(config: TaskConfig, rows: Rows) -> tuple[str, ...]:
    text = config.text_column or next((name for name in ("text", "sentence") if name in rows.columns), "text")
    return (text,) if config.text_pair_column is None else (text, config.text_pair_column)


def _check_texts(rows: Rows, columns: tuple[str, ...]) -> None:
    for column in columns:
        blank = 0
        for text, place in rows.in_file_order(column):
            if not isinstance(text, str):
                raise DataError(f"{rows.label}, {place}: column {column!r} holds {text!r}, not text")
            blank += not text.strip()
        if blank:
            _log.warning("%s: column %r is empty in %d of %d rows", rows.label, column, blank, len(rows))


def _check_scores(rows: Rows, label: str) -> None:
    wrong = [(score, place) for score, place in rows.in_file_order(label) if not _is_finite_number(score)]
    if wrong:
        # In a CSV one word makes texts of all: that word is what is wrong.
        score, place = next((pair for pair in wrong if not looks_like_number(pair[0])), wrong[0])
        raise DataError(
            f"{rows.label}, column {label!r}, {place}: {score!r} is not a finite number, which regression needs"
        )


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _classes(
    config: TaskConfig, glue: GlueTask | None, train: Rows, validation: Rows, label: str
) -> tuple[tuple[str, ...], Callable[[Any], int]]:
    """Names of the classes, and the function from a label to its id."""
    values = train.column(label)
    if all(isinstance(value, str) for value in values) and not (glue and not set(values) <= set(glue.labels)):
        names = glue.labels if glue else tuple(sorted(set(values)))
        ids: dict[Any, int] = {name: index for index, name in enumerate(names)}
        blank = next((place for value, place in train.in_file_order(label) if not value.strip()), None)
        if blank is not None:
            raise DataError(f"{train.label}, column {label!r}, {blank}: the label is empty")
    else:
        known_names = train.class_names.get(label)
        numbers = [value for value in values if type(value) in (int, bool)]
        count = len(glue.labels) if glue else config.num_labels or len(known_names or ()) or max([*numbers, 0]) + 1
        if count > MOST_CLASSES:
            raise DataError(
                f"{train.label}, column {label!r}: label {count - 1} would make {count} classes; number them from 0, "
                "give names, or name another label_column"
            )
        names = glue.labels if glue else tuple(known_names or map(str, range(count)))
        ids = {index: index for index in range(count)}
        _check_labels(train, label, ids)
    _check_labels(validation, label, ids)
    if len(names) < 2:
        raise DataError(
            f"{train.label}: column {label!r} holds one class only ({names[0]!r}); classification needs two"
        )
    return names, ids.__getitem__


def _check_labels(rows: Rows, label: str, ids: dict[Any, int]) -> None:
    for value, place in rows.in_file_order(label):
        if not isinstance(value, str | int) or value not in ids:
            known = list(ids)
            allowed = (
                f"{known[0]!r} to {known[-1]!r}" if isinstance(known[0], int) else ", ".join(map(repr, known[:10]))
            )
            raise DataError(
                f"{rows.label}, column {label!r}, {place}: label {value!r} is out of range; allowed are {allowed}"
            )


def _to_texts(rows: Rows, columns: tuple[str, ...], label: str, to_label: Callable[[Any], Any]) -> Dataset:
    from datasets import Dataset

    content = {name: rows.column(column) for name, column in zip(("text", "text_pair"), columns, strict=False)}
    return Dataset.from_dict({**content, "label": [to_label(value) for value in rows.column(label)]})
