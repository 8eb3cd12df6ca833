"""Tasks to fine-tune on: GLUE by name, or your own classification, regression or instruction data.

    task = load_task(TaskConfig(task="mrpc", data="glue/mrpc"))
    task.train[0]              # {"text": ..., "text_pair": ..., "label": 1}

Whatever the columns are called in the source, rows come out as `text`, `text_pair`, `label` (an id, or a number), or
as `prompt` and `completion` for instructions. Local files and hub datasets take the same path.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, DataError
from .config import cache_root, is_hub
from .rows import has_split, load_rows, require_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Kind = Literal["classification", "regression", "instruction"]
KINDS: tuple[Kind, ...] = ("classification", "regression", "instruction")
GLUE_HUB = "hf:nyu-mll/glue"


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

    max_length: int = 128
    """Longest input in tokens; longer ones are cut."""

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
            near = difflib.get_close_matches(self.task, [*GLUE, *KINDS], n=1, cutoff=0.5)
            hint = f"; the nearest is {near[0]}" if near else ""
            problems.append(f"task={self.task!r} is none of {', '.join([*GLUE, *KINDS])}{hint}")
        elif self.data is None and self.task not in GLUE:
            problems.append("give a GLUE task (task=sst2), or your own data (data=FILE)")
        if not 0 < self.validation_fraction < 1:
            problems.append(f"validation_fraction={self.validation_fraction} is outside (0, 1)")
        for name, least in (("max_length", 2), ("num_labels", 2), ("max_train_rows", 1), ("max_validation_rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"{name}={value} is too small; give at least {least}")
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
        return Task(
            config.task or kind,
            kind,
            source,
            _to_prompts(train, f"{source} (train)"),
            _to_prompts(validation, f"{source} (validation)"),
            (),
            ("loss",),
        )
    columns, label = (glue.columns, "label") if glue else (_text_columns(config, train, source), config.label_column)
    for rows, part in ((train, "train"), (validation, "validation")):
        require_columns(rows, columns, f"{source} ({part})", "text_column, text_pair_column")
        require_columns(rows, (label,), f"{source} ({part})", "label_column")
        _check_texts(rows, columns, f"{source} ({part})")
    if kind == "regression":
        names: tuple[str, ...] = ()
        to_label: Callable[[Any], Any] = float
        for rows, part in ((train, "train"), (validation, "validation")):
            _check_scores(rows[label], f"{source} ({part}), column {label!r}")
    else:
        names, to_label = _classes(config, glue, train, validation, label, source)
    metrics = (
        glue.metrics if glue else {"classification": ("accuracy", "f1"), "regression": ("pearson", "spearman")}[kind]
    )
    return Task(
        config.task or kind,
        kind,
        source,
        _to_texts(train, columns, label, to_label),
        _to_texts(validation, columns, label, to_label),
        names,
        metrics,
    )


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
    inner = Path(config.data).expanduser() / (config.task or "")
    if config.task in GLUE and not is_hub(config.data) and not has_split(config.data, config.train_split):
        return str(inner) if inner.is_dir() else config.data
    return config.data


def _load_splits(config: TaskConfig, source: str, glue: GlueTask | None) -> tuple[Dataset, Dataset]:
    cache = cache_root(config.cache_dir) / "rows"
    split = config.validation_split or (glue.validation_split if glue else "validation")
    if config.validation_split is None and not is_hub(source) and not has_split(source, split):
        split = "validation"  # local copies of mnli that call it so
    train = load_rows(source, config.train_split, cache_dir=cache)
    if config.validation_data is not None:
        validation = load_rows(config.validation_data, split, cache_dir=cache)
    elif glue or config.validation_split is not None or has_split(source, split):
        validation = load_rows(source, split, cache_dir=cache)
    else:
        if len(train) < 2:
            raise DataError(f"{source}: one row cannot be split into training and validation; give validation_data")
        parts = train.train_test_split(test_size=config.validation_fraction, seed=config.seed)
        train, validation = parts["train"], parts["test"]
    if config.max_train_rows is not None and config.max_train_rows < len(train):
        train = train.shuffle(seed=config.seed).select(range(config.max_train_rows))
    if config.max_validation_rows is not None and config.max_validation_rows < len(validation):
        validation = validation.select(range(config.max_validation_rows))
    return train, validation


def _kind(config: TaskConfig, rows: Dataset, source: str) -> Kind:
    if config.task in GLUE:
        return "classification" if GLUE[config.task].labels else "regression"
    if config.task in KINDS:
        return config.task
    names = set(rows.column_names)
    if any(set(columns) <= names for columns in _INSTRUCTION_FORMS):
        return "instruction"
    if config.label_column in names:
        return (
            "regression"
            if str(getattr(rows.features[config.label_column], "dtype", "")).startswith("float")
            else ("classification")
        )
    raise DataError(
        f"{source}: columns {', '.join(map(repr, rows.column_names))} are no task: classification and regression need "
        f"a text and {config.label_column!r} (label_column), instructions need instruction and output, prompt and "
        "completion, or messages"
    )


# ------------------------------------------------------------------------------------ classes, scores, texts


def _text_columns(config: TaskConfig, rows: Dataset, source: str) -> tuple[str, ...]:
    text = config.text_column or next((name for name in ("text", "sentence") if name in rows.column_names), "text")
    return (text,) if config.text_pair_column is None else (text, config.text_pair_column)


def _check_texts(rows: Dataset, columns: tuple[str, ...], where: str) -> None:
    for column in columns:
        row = next((i for i, text in enumerate(rows[column]) if not isinstance(text, str)), None)
        if row is not None:
            raise DataError(f"{where}, row {row + 1}: column {column!r} holds {rows[row][column]!r}, not text")


def _check_scores(scores: list[Any], where: str) -> None:
    for row, score in enumerate(scores, start=1):
        is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not is_number:
            raise DataError(f"{where}, row {row}: {score!r} is not a finite number, which regression needs")


def _classes(
    config: TaskConfig, glue: GlueTask | None, train: Dataset, validation: Dataset, label: str, source: str
) -> tuple[tuple[str, ...], Callable[[Any], int]]:
    """Names of the classes, and the function from a label to its id."""
    values = train[label]
    if all(isinstance(value, str) for value in values) and not (glue and not set(values) <= set(glue.labels)):
        names = glue.labels if glue else tuple(sorted(set(values)))
        ids: dict[Any, int] = {name: index for index, name in enumerate(names)}
    else:
        where = f"{source} (train), column {label!r}"
        known_names = getattr(train.features[label], "names", None)
        numbers = [value for value in values if type(value) in (int, bool)]
        count = len(glue.labels) if glue else config.num_labels or len(known_names or ()) or max([*numbers, 0]) + 1
        names = glue.labels if glue else tuple(known_names or map(str, range(count)))
        ids = {index: index for index in range(count)}
        _check_labels(values, ids, where)
    _check_labels(validation[label], ids, f"{source} (validation), column {label!r}")
    if len(names) < 2:
        raise DataError(f"{source}: column {label!r} holds one class only ({names[0]!r}); classification needs two")
    return names, ids.__getitem__


def _check_labels(values: list[Any], ids: dict[Any, int], where: str) -> None:
    for row, value in enumerate(values, start=1):
        if value not in ids or isinstance(value, float):
            known = list(ids)
            allowed = (
                f"{known[0]!r} to {known[-1]!r}" if isinstance(known[0], int) else ", ".join(map(repr, known[:10]))
            )
            raise DataError(f"{where}, row {row}: label {value!r} is out of range; allowed are {allowed}")


def _to_texts(rows: Dataset, columns: tuple[str, ...], label: str, to_label: Callable[[Any], Any]) -> Dataset:
    from datasets import Dataset

    content = {name: list(rows[column]) for name, column in zip(("text", "text_pair"), columns, strict=False)}
    return Dataset.from_dict({**content, "label": [to_label(value) for value in rows[label]]})


# ------------------------------------------------------------------------------------------------ instructions

_INSTRUCTION_FORMS = (("messages",), ("prompt", "completion"), ("instruction", "output"))


def prompt_of(instruction: str, context: str = "") -> str:
    """The prompt of an instruction: the headings of the Alpaca format, without its preamble (our choice: a small model
    spends no context on a constant sentence)."""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _to_prompts(rows: Dataset, where: str) -> Dataset:
    """Any of the three forms as `prompt` and `completion`: texts, or lists of messages for `messages`."""
    form = next((form for form in _INSTRUCTION_FORMS if set(form) <= set(rows.column_names)), None)
    if form is None:
        raise DataError(
            f"{where}: columns {', '.join(map(repr, rows.column_names))} are no instruction data; needed are "
            "instruction and output (and input), prompt and completion, or messages"
        )
    if form == ("messages",):
        for number, messages in enumerate(rows["messages"], start=1):
            if not messages or len(messages) < 2 or messages[-1].get("role") != "assistant":
                raise DataError(f"{where}, row {number}: messages must end with an answer of the role 'assistant'")
        return rows.map(_split_messages, remove_columns=rows.column_names)
    for column in form:
        for number, text in enumerate(rows[column], start=1):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{where}, row {number}: column {column!r} holds {text!r}, not text")
    if form == ("prompt", "completion"):
        return rows.select_columns(list(form))
    return rows.map(_to_prompt, remove_columns=rows.column_names)


def _split_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def _to_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt_of(row["instruction"], row.get("input") or ""), "completion": row["output"]}
