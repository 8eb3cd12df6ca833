"""Local files: which ones count, what they hold, what is wrong with them.

One text file is one document; each row of a JSON-lines or parquet file is one document. Long rows, long text
files given on their own and very long ones in folders are cut into documents (`cutting.py`). Byte order marks are no
text. Documents without any text (empty, or white space only) are left out later, by the split.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import DataError
from .cutting import LONG_FILE_BYTES, cut_long_text, cut_text_file, is_long
from .json_lines import GZIP_ERRORS, json_lines, json_type, lone_surrogate, names_of, not_utf8, open_bytes
from .spool import document_features, spool

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Kind = Literal["text", "json", "parquet"]

KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".txt.gz": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
}

_SKIP_HINT = "repair it, or set skip_bad to leave such {} out"
_CHUNK = 2**20  # bytes read at a time
_ROWS = 1024  # of a parquet file read at a time


@dataclass(frozen=True)
class ScannedFile:
    """A file, its content hash, and what makes it unreadable (None = nothing found so far)."""

    path: Path
    name: str  # relative posix path, or the file name of a lone file; bytes that are no UTF-8 spelled out
    kind: Kind
    size: int
    sha256: str
    problem: str | None = None
    text_bytes: int = 0  # of a text file, decompressed

    @property
    def identity(self) -> list[Any]:
        """What a cache key needs to know: where the file lies in the source, and its content."""
        return [self.name, self.kind, self.size, self.sha256]


@dataclass(frozen=True)
class ReadingOptions:
    """How to read files: see DataConfig for `text_column` and `skip_bad`."""

    text_column: str
    skip_bad: bool
    cache_dir: Path
    """Where there is room for the documents while they are used."""
    longest_text: int = LONG_FILE_BYTES
    """Bytes of the longest text file that is one document; longer ones are cut, as long rows are."""


@dataclass
class Tally:
    """What was left out and what was cut while reading."""

    skipped: int = 0
    """Files, lines and rows that cannot be read."""
    cut: int = 0
    """Long files and rows that became several documents."""


# ------------------------------------------------------------------------------------- finding and checking


def file_kind(path: Path) -> Kind | None:
    """What a file name says the file holds; None when it is none of ours."""
    name = path.name.lower()
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), None)


def find_files(folder: Path) -> list[Path]:
    """Every readable kind of file below a folder, by relative posix path; hidden files and folders are ignored.

    Links are followed, each folder once, so that a link to a folder above ends the walk there. Links that lead nowhere
    are among the files: reading them says so. Raises DataError for a folder that cannot be listed.
    """
    found: list[Path] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check its rights") from error

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    wanted = [path for path in found if file_kind(path) and (path.is_file() or _leads_nowhere(path))]
    return sorted(wanted, key=lambda path: path.relative_to(folder).as_posix())


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def printable(name: str) -> str:
    """A file name as text: bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def scan_file(path: Path, name: str) -> ScannedFile:
    """Hash a file; check a text file for UTF-8. What is wrong with it, a file that cannot be opened included, is its
    `problem`. Raises DataError for a kind of file that is not read."""
    kind = file_kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; allowed are {', '.join(KINDS)}")
    name = printable(name)
    try:
        size = path.stat().st_size
        if kind == "text":
            return _scan_text(path, name, size)
        with path.open("rb") as file:
            return ScannedFile(path, name, kind, size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        return ScannedFile(path, name, kind, 0, "", _cannot_be_read(path, error))


def _scan_text(path: Path, name: str, size: int) -> ScannedFile:
    """Hash a text and check it, a chunk at a time."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    count, problem = 0, None
    try:
        with open_bytes(path) as file:
            chunk = b"begin"
            while chunk:
                chunk = file.read(_CHUNK)
                digest.update(chunk)
                if problem is None:
                    pending = len(decoder.getstate()[0])
                    try:
                        decoder.decode(chunk, final=not chunk)
                    except UnicodeDecodeError as error:
                        problem = f"{path}: {not_utf8(error, before=count - pending)}"
                count += len(chunk)
    except GZIP_ERRORS as error:
        return ScannedFile(path, name, "text", size, "", f"{path}: damaged gzip file ({error})")
    return ScannedFile(path, name, "text", size, digest.hexdigest(), problem, count)


def _cannot_be_read(path: Path, error: OSError | UnicodeDecodeError) -> str:
    if _leads_nowhere(path):
        return f"{path}: a link that leads nowhere"
    return f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); check the path and its rights"


# -------------------------------------------------------------------------------------------------- reading


def read_files(files: list[ScannedFile], options: ReadingOptions) -> tuple[Dataset, Tally]:
    """All documents of the files, in order: a dataset with the columns text and name, and what became of the rest.

    Raises DataError naming the file, and the line where there is one, for the first thing that cannot be read, unless
    `skip_bad`; also then for a JSON-lines file without a single good line and for a text column that is not there.
    """
    tally = Tally(skipped=_broken(files, options))
    return spool(_documents(files, options, tally), options.cache_dir), tally


def stream_files(files: list[ScannedFile], options: ReadingOptions) -> IterableDataset:
    """The documents of `read_files`, read when they are asked for; every file is a shard, and what is left out or cut
    is not counted. Raises DataError as it does, for what is inside a file from within the iteration."""
    from datasets import IterableDataset

    _broken(files, options)
    whole = {"files": [file for file in files if file.problem is None], "options": options}
    return IterableDataset.from_generator(_stream, features=document_features(), gen_kwargs=whole)


def _stream(files: list[ScannedFile], options: ReadingOptions) -> Iterator[dict[str, str]]:
    for name, text in _documents(files, options, Tally()):
        yield {"text": text, "name": name}


def _broken(files: list[ScannedFile], options: ReadingOptions) -> int:
    """How many files cannot be read. Raises DataError for the first one, unless `skip_bad`."""
    broken = [file.problem for file in files if file.problem is not None]
    if broken and not options.skip_bad:
        raise DataError(f"{broken[0]}; {_SKIP_HINT.format('files')}")
    return len(broken)


def _documents(files: list[ScannedFile], options: ReadingOptions, tally: Tally) -> Iterator[tuple[str, str]]:
    readers = {"text": _text_documents, "json": _json_documents, "parquet": _parquet_documents}
    for file in files:
        if file.problem is not None:
            continue
        try:
            yield from readers[file.kind](file, options, tally)
        except (OSError, UnicodeDecodeError) as error:  # gone, damaged or changed since it was scanned
            raise DataError(_cannot_be_read(file.path, error)) from error


def pieces(name: str, text: str, tally: Tally) -> Iterator[tuple[str, str]]:
    """The (name, text) of a row: itself, or its documents `name#1`, `name#2`, ... where it is long."""
    parts = cut_long_text(text) if is_long(text) else [text]
    if len(parts) == 1:
        yield name, text
        return
    tally.cut += 1
    for number, part in enumerate(parts, start=1):
        yield f"{name}#{number}", part


def _text_documents(file: ScannedFile, options: ReadingOptions, tally: Tally) -> Iterator[tuple[str, str]]:
    with open_bytes(file.path) as content:
        if file.text_bytes <= options.longest_text:
            yield file.name, content.read().decode("utf-8-sig")
            return
        tally.cut += 1
        with io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
            for number, piece in enumerate(cut_text_file(text), start=1):
                yield f"{file.name}#{number}", piece


def _json_documents(file: ScannedFile, options: ReadingOptions, tally: Tally) -> Iterator[tuple[str, str]]:
    good, bad, first_problem = 0, 0, ""
    for number, row, problem in json_lines(file.path):
        problem = problem or _text_problem(row, options.text_column)
        if problem is None:
            good += 1
            yield from pieces(f"{file.name}:{number}", row[options.text_column], tally)
            continue
        problem = f"{file.path}, line {number}: {problem}"
        if not options.skip_bad:
            raise DataError(f"{problem}; {_SKIP_HINT.format('lines')}")
        bad += 1
        first_problem = first_problem or problem
    if bad and not good:
        raise DataError(f"{first_problem}; none of the {bad} lines can be used")
    tally.skipped += bad


def _text_problem(row: dict[str, Any], column: str) -> str | None:
    if column not in row:
        return f"no text column {column!r}; the columns are {names_of(row)}; choose one with text_column"
    text = row[column]
    if not isinstance(text, str):
        return f"text column {column!r} holds {json_type(text)}, not a string"
    problem = lone_surrogate(text)
    return problem and f"text column {column!r} {problem}"


# --------------------------------------------------------------------------------------------------- tables


def _parquet_documents(file: ScannedFile, options: ReadingOptions, tally: Tally) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet

    column, number = options.text_column, 0
    try:
        with file.path.open("rb") as content:  # by its handle: a name is taken as it is
            table = pyarrow.parquet.ParquetFile(content)
            _check_text_column(table.schema_arrow, column, str(file.path))
            for batch in table.iter_batches(_ROWS, columns=[column]):
                for text, problem in texts_of(batch.column(0)):
                    number += 1
                    if problem is None:
                        yield from pieces(f"{file.name}:{number}", text, tally)
                    elif options.skip_bad:
                        tally.skipped += 1
                    else:
                        where = f"{file.path}, row {number}: text column {column!r}"
                        raise DataError(f"{where} {problem}; {_SKIP_HINT.format('rows')}")
    except DataError:
        raise
    except Exception as error:  # arrow raises many kinds for a damaged file
        if not options.skip_bad:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{file.path}: not a readable parquet file ({reason}); {_SKIP_HINT.format('files')}"
            ) from error
        tally.skipped += 1


def texts_of(values: Any) -> Iterator[tuple[str, str | None]]:
    """(text, None) or ("", what is wrong) of every value of an Arrow array of strings."""
    try:
        texts = values.to_pylist()
    except UnicodeDecodeError:
        texts = [_text_or_error(value) for value in values]
    for text in texts:
        if isinstance(text, str):
            yield text, None
        else:
            yield "", "is null" if text is None else f"is {not_utf8(text)}"


def _text_or_error(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def _check_text_column(schema: Any, column: str, label: str) -> None:
    """Raises DataError unless an Arrow schema has the column, and it holds strings."""
    import pyarrow.types as types

    if column not in schema.names:
        raise missing_column(label, column, schema.names)
    kind = schema.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(f"{label}: text column {column!r} holds {kind}, not strings; choose another with text_column")


def clean_rows(rows: Dataset, column: str, label: str, options: ReadingOptions) -> tuple[Dataset, Tally]:
    """The documents of a dataset's rows, named `label:1`, `label:2`, ..., and what became of the rest.

    Raises DataError when the column is missing or holds no strings, and, unless `skip_bad`, for the first row without
    text.
    """
    _check_text_column(rows.features.arrow_schema, column, label)
    tally = Tally()
    return spool(_row_documents(rows, column, label, options.skip_bad, tally), options.cache_dir), tally


def _row_documents(rows: Dataset, column: str, label: str, skip_bad: bool, tally: Tally) -> Iterator[tuple[str, str]]:
    number = 0
    for table in rows.select_columns([column]).with_format("arrow").iter(_ROWS):
        for text, problem in texts_of(table.column(0)):
            number += 1
            if problem is None:
                yield from pieces(f"{label}:{number}", text, tally)
            elif skip_bad:
                tally.skipped += 1
            else:
                raise DataError(f"{label}, row {number}: text column {column!r} {problem}; {_SKIP_HINT.format('rows')}")


def missing_column(label: str, column: str, columns: list[str]) -> DataError:
    """The error for a text column that is not there."""
    return DataError(
        f"{label}: no text column {column!r}; the columns are {names_of(columns)}; choose one with text_column"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and complaints of `datasets`, whose errors are replaced by clearer ones."""
    import datasets
    from datasets.utils import logging

    verbosity, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
