"""Rows of a data set, whole: files, folders with one file a split, hub datasets.

`files.py` reads documents to pre-train on, of which only the text matters; a task needs several columns, as they are:
texts stay texts, whatever they look like, and a message about a row names its place in the file.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from .config import is_hub, local_path, parse_hub
from .files import quiet
from .json_lines import BYTE_ORDER_MARK, GZIP_ERRORS, json_lines, json_type, lone_surrogate, not_utf8, open_bytes

READERS = ("jsonl", "json", "csv", "tsv", "parquet")
ENDINGS = tuple(f".{kind}{gz}" for kind in READERS for gz in ("", ".gz") if not (gz and kind == "parquet"))
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_FIELD_LIMIT = 2**31 - 1  # characters; Python's own limit is 128 KiB


@dataclass(frozen=True)
class Rows:
    """Rows of one split, in order."""

    label: str
    """How messages call them."""
    columns: tuple[str, ...]
    """Names of all columns of the source."""
    content: list[dict[str, Any]]
    """The wanted columns of each row; one that a row lacks is None."""
    places: list[str]
    """Where each row stands: `row 3`, of a CSV also `row 3 (line 7)`."""
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of the columns of a hub dataset that hold numbered classes."""
    positions: Sequence[int] = ()
    """Order of the rows in the file, where it is another one here."""

    def __len__(self) -> int:
        return len(self.content)

    def column(self, name: str) -> list[Any]:
        """All values of one column, in order."""
        return [row.get(name) for row in self.content]

    def in_file_order(self, column: str) -> list[tuple[Any, str]]:
        """(value, place) of a column, the first in the file first: what a check should complain about."""
        pairs = list(zip(self.column(column), self.places, strict=True))
        return [pairs[i] for i in sorted(range(len(self)), key=self.positions.__getitem__)] if self.positions else pairs

    def select(self, indices: Sequence[int]) -> Rows:
        """Some of the rows, in this order, each still known by its place in the file."""
        chosen = list(indices)
        positions = self.positions or range(len(self))
        return replace(
            self,
            content=[self.content[i] for i in chosen],
            places=[self.places[i] for i in chosen],
            positions=[positions[i] for i in chosen],
        )


def load_rows(
    source: str, split: str, wanted: Collection[str], *, numbers: Collection[str] = (), cache_dir: Path | None = None
) -> Rows:
    """The rows of one split of `source`: a file (any split), a folder of SPLIT.ENDING, or hf:owner/name[:config].

    wanted: the columns to keep. numbers: columns that hold numbers where every value of theirs looks like one; only
    for CSV and TSV, which hold nothing but text. cache_dir: of hub datasets; files are read anew each time.
    Raises DataError when it does not exist, cannot be read, or is empty.
    """
    if is_hub(source):
        rows = _hub_rows(source, split, wanted, cache_dir)
    else:
        rows = _file_rows(find_split(local_path(source), split), wanted, numbers)
    if not rows.content:
        raise DataError(f"{rows.label}: the split is empty; give one with rows")
    return rows


def find_split(path: Path, split: str) -> Path:
    """The file of a split: `path` itself, or SPLIT.ENDING in a folder. Raises DataError."""
    if os.path.isfile(path):  # False, not an error, for a name that no file can have
        if not path.name.lower().endswith(ENDINGS):
            raise DataError(f"{path}: unknown kind of file; allowed are {', '.join(ENDINGS)}")
        return path
    if not os.path.isdir(path):
        raise DataError(f"{path}: no such file or folder")
    found = [path / f"{split}{ending}" for ending in ENDINGS if os.path.isfile(path / f"{split}{ending}")]
    if not found:
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise DataError(f"{path}: no {split}.jsonl, .jsonl.gz, .csv, .tsv or .parquet in the folder; it holds {held}")
    return found[0]


def has_split(source: str, split: str) -> bool:
    """Whether a local folder holds a file of that split, or a hub dataset has one. False for a file."""
    if is_hub(source):
        import datasets

        try:
            return split in datasets.get_dataset_split_names(*parse_hub(source))
        except Exception:  # offline, say: loading it says why
            return True
    path = local_path(source)
    return os.path.isdir(path) and any(os.path.isfile(path / f"{split}{ending}") for ending in ENDINGS)


def require_columns(rows: Rows, columns: tuple[str, ...], label: str, option: str) -> None:
    """Raises DataError, naming the columns there are, when one of `columns` is missing."""
    missing = [column for column in columns if column not in rows.columns]
    if missing:
        raise DataError(
            f"{label}: no column {missing[0]!r}; the columns are {', '.join(map(repr, rows.columns))}; choose "
            f"with {option}"
        )


# ---------------------------------------------------------------------------------------------------- files


def _file_rows(path: Path, wanted: Collection[str], numbers: Collection[str]) -> Rows:
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        if kind == "parquet":
            return _parquet_rows(path, wanted)
        if kind in ("csv", "tsv"):
            return _as_numbers(_table(path, _csv(path) if kind == "csv" else _tsv(path), wanted), numbers)
        return _json_rows(path, wanted)
    except DataError:
        raise
    except GZIP_ERRORS as error:
        raise DataError(f"{path}: cannot be read (damaged gzip file: {error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _json_rows(path: Path, wanted: Collection[str]) -> Rows:
    rows = _Collector(path, wanted)
    for number, row, problem in _json_array(path) if _is_array(path) else json_lines(path):
        if problem is not None:
            raise DataError(f"{path}, row {number}: cannot be read: {problem}")
        rows.add(row, f"row {number}")
    return rows.finish()


def _is_array(path: Path) -> bool:
    with open_bytes(path) as file:
        first = file.readline().removeprefix(BYTE_ORDER_MARK)
        while first.isspace():
            first = file.readline()
    return first.lstrip().startswith(b"[")


def _json_array(path: Path) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    with open_bytes(path) as file:
        content = file.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = not_utf8(error) if isinstance(error, UnicodeDecodeError) else f"not valid JSON ({error})"
        raise DataError(
            f"{path}: cannot be read: {reason}; it must be a list of objects, or one object a line"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield number, row, None if isinstance(row, dict) else f"holds {json_type(row)}; each must be an object"


class _Collector:
    """Rows as they come: the wanted columns of each, the names of all, texts that a file can hold."""

    def __init__(self, path: Path, wanted: Collection[str]) -> None:
        self.path, self.wanted = path, wanted
        self.columns: dict[str, None] = {}
        self.content: list[dict[str, Any]] = []
        self.places: list[str] = []

    def add(self, row: dict[str, Any], place: str) -> None:
        self.columns.update(dict.fromkeys(row))
        kept = {name: value for name, value in row.items() if name in self.wanted}
        for name, value in kept.items():
            try:
                problem = lone_surrogate(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            except RecursionError:
                problem = "holds lists in lists, too many to be read"
            if problem:
                raise DataError(f"{self.path}, {place}: column {name!r} {problem}")
        self.content.append(kept)
        self.places.append(place)

    def finish(self) -> Rows:
        return Rows(str(self.path), tuple(self.columns), self.content, self.places)


def _parquet_rows(path: Path, wanted: Collection[str]) -> Rows:
    import pyarrow.parquet

    content: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:  # by its handle: a name is taken as it is
            table = pyarrow.parquet.ParquetFile(file)
            columns = tuple(table.schema_arrow.names)
            kept = [name for name in columns if name in wanted]
            if not kept:
                content = [{} for _ in range(table.metadata.num_rows)]
            for batch in table.iter_batches(columns=kept) if kept else ():
                content += _batch_rows(batch, str(path), len(content))
    except DataError:
        raise
    except Exception as error:  # arrow raises many kinds for a damaged file
        raise DataError(f"{path}: cannot be read ({_root_cause(error)})") from error
    return Rows(str(path), columns, content, [f"row {number}" for number in range(1, len(content) + 1)])


def _batch_rows(batch: Any, label: str, before: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(f"{label}, row {before + index + 1}: {not_utf8(error)}") from None
        raise


# ------------------------------------------------------------------------------------------------- CSV, TSV

_Line = tuple[str, list[str]]
"""Where a row stands, and its fields."""


def _table(path: Path, lines: Iterator[_Line], wanted: Collection[str]) -> Rows:
    """Rows under a header. Raises DataError for a header with a name twice and for a row of another length."""
    _, header = next(lines, ("", []))
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the header names the column {twice[0]!r} twice; rename one")
    rows = _Collector(path, wanted)
    rows.columns = dict.fromkeys(header)
    for line, fields in lines:
        place = f"row {len(rows.content) + 1} ({line})"
        if len(fields) != len(header):
            raise DataError(f"{path}, {place}: has {len(fields)} fields, the header {len(header)}")
        rows.add(dict(zip(header, fields, strict=True)), place)
    return rows.finish()


def _csv(path: Path) -> Iterator[_Line]:
    """Comma-separated: a field in double quotes may hold commas, line ends and doubled quotes."""
    limit = csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(_text_lines(path), strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield f"line {start}", fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: cannot be read ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _tsv(path: Path) -> Iterator[_Line]:
    """Tab-separated as GLUE has it: a row is a line, a field ends at a tab, and quotes are text."""
    for number, line in enumerate(_text_lines(path), start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        if line:
            yield f"line {number}", line.split("\t")


def _text_lines(path: Path) -> Iterator[str]:
    """Lines with their ends. Raises DataError for one that is not UTF-8."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.removeprefix(BYTE_ORDER_MARK if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: {not_utf8(error, 'of the line')}") from None
            if path.name.lower().endswith((".csv", ".csv.gz")) and "\r" in text[:-2]:  # inside quotes, or no \n at all
                yield from io.StringIO(text, newline="")
            else:
                yield text


def looks_like_number(value: Any) -> bool:
    """Whether a value is a text that spells a number."""
    return isinstance(value, str) and _DECIMAL.fullmatch(value) is not None


def _as_numbers(rows: Rows, columns: Iterable[str]) -> Rows:
    """Columns of text as whole or decimal numbers, where all of their values are written as such."""
    for name in columns:
        values = rows.column(name)
        kind: type | None = None
        if name in rows.columns and values:
            kind = (
                int if all(map(_WHOLE.fullmatch, values)) else float if all(map(_DECIMAL.fullmatch, values)) else None
            )
            if kind is float and any(_has_leading_zero(value) for value in values):
                kind = None  # 007 is a name
        if kind is not None:
            for row in rows.content:
                row[name] = kind(row[name])
    return rows


def _has_leading_zero(value: str) -> bool:
    return re.match(r"[-+]?0[0-9]", value) is not None


# ------------------------------------------------------------------------------------------------------ hub


def _hub_rows(source: str, split: str, wanted: Collection[str], cache_dir: Path | None) -> Rows:
    import datasets

    name, configuration = parse_hub(source)
    label = f"{source} (split {split!r})"
    try:
        with quiet():
            table = datasets.load_dataset(
                name, configuration, split=split, cache_dir=None if cache_dir is None else str(cache_dir)
            )
            columns = tuple(table.column_names)
            names = {key: getattr(table.features[key], "names", None) for key in columns}
            kept = [key for key in columns if key in wanted]
            content = table.select_columns(kept).to_list() if kept else [{} for _ in range(len(table))]
    except Exception as error:  # the hub, its client, arrow and dataset builders raise dozens of kinds
        raise DataError(f"{label}: cannot be read ({_root_cause(error)})") from error
    places = [f"row {number}" for number in range(1, len(content) + 1)]
    return Rows(label, columns, content, places, {key: tuple(value) for key, value in names.items() if value})


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
