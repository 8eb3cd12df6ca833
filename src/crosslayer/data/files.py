"""Local files: which ones count, what they hold, what is wrong with them.

One text file is one document; each row of a JSON-lines or parquet file is one document. A long text file
given on its own is cut into documents (`cut_long_text`). Documents without any text (empty, or white space
only) are left out later, by the split.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from ..errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

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

LONG_TEXT_BYTES = 64 * 1024
"""A text file given on its own and longer than this is cut into documents."""

CUT_BYTES = 16 * 1024
"""Length after which the next blank line ends a document of a long text."""

_SKIP_HINT = "repair it, or set skip_bad to leave such {} out"
_GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)


@dataclass(frozen=True)
class ScannedFile:
    """A file, its content hash, and what makes it unreadable (None = nothing found so far)."""

    path: Path
    name: str  # relative posix path, or the file name of a lone file
    kind: Kind
    size: int
    sha256: str
    problem: str | None = None

    @property
    def identity(self) -> list[Any]:
        """What a cache key needs to know: where the file lies in the source, and its content."""
        return [self.name, self.kind, self.size, self.sha256]


@dataclass(frozen=True)
class ReadingOptions:
    """How to read files: see DataConfig for `text_column` and `skip_bad`."""

    text_column: str
    skip_bad: bool
    cache_dir: str
    """Folder for the Arrow copies that `datasets` makes; belongs to this content alone."""
    cut_long_text: bool = False


# ------------------------------------------------------------------------------------- finding and checking


def file_kind(path: Path) -> Kind | None:
    """What a file name says the file holds; None when it is none of ours."""
    name = path.name.lower()
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), None)


def find_files(folder: Path) -> list[Path]:
    """Every readable kind of file below a folder, by relative posix path; hidden files and folders are
    ignored."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    wanted = [path for path in found if file_kind(path) and path.is_file()]
    return sorted(wanted, key=lambda path: path.relative_to(folder).as_posix())


def scan_file(path: Path, name: str) -> ScannedFile:
    """Hash a file; check a text file for UTF-8. Raises DataError when it cannot be opened."""
    kind = file_kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; allowed are {', '.join(KINDS)}")
    try:
        size = path.stat().st_size
        if kind != "text":
            with path.open("rb") as file:
                return ScannedFile(path, name, kind, size, hashlib.file_digest(file, "sha256").hexdigest())
        try:
            content = read_bytes(path)
        except _GZIP_ERRORS as error:
            return ScannedFile(path, name, kind, size, "", f"{path}: damaged gzip file ({error})")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights") from error
    return ScannedFile(path, name, kind, size, hashlib.sha256(content).hexdigest(), _utf8_problem(path, content))


def read_bytes(path: Path) -> bytes:
    """The whole file, decompressed if it ends in .gz."""
    with open_bytes(path) as file:
        return file.read()


def open_bytes(path: Path) -> IO[bytes]:
    """Open for reading bytes, decompressing if the name ends in .gz."""
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _utf8_problem(path: Path, content: bytes) -> str | None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"{path}: not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start})"
    return None


# -------------------------------------------------------------------------------------------------- reading


def read_files(files: list[ScannedFile], options: ReadingOptions) -> tuple[Dataset, int]:
    """All documents of the files, in order: (dataset with columns text and name, number of things skipped).

    Raises DataError naming the file, and the line where there is one, for the first thing that cannot be
    read, unless `skip_bad`.
    """
    from datasets import concatenate_datasets

    skipped = 0
    good = []
    for file in files:
        if file.problem is None:
            good.append(file)
        elif options.skip_bad:
            skipped += 1
        else:
            raise DataError(f"{file.problem}; {_SKIP_HINT.format('files')}")
    parts: list[Dataset] = []
    for kind, group in groupby(good, key=lambda file: file.kind):
        if kind == "text":
            parts.append(_read_text_files(list(group), options))
            continue
        read = _read_json_file if kind == "json" else _read_parquet_file
        for file in group:
            part, bad_rows = read(file, options)
            parts.append(part)
            skipped += bad_rows
    parts = [part for part in parts if len(part)]
    return (concatenate_datasets(parts) if parts else documents_from_pairs([])), skipped


def documents_from_pairs(pairs: list[tuple[str, str]]) -> Dataset:
    """An in-memory dataset of (name, text) pairs."""
    from datasets import Dataset

    columns = {"text": [text for _, text in pairs], "name": [name for name, _ in pairs]}
    return Dataset.from_dict(columns, features=document_features())


def document_features() -> Any:
    """The two columns of every dataset of documents."""
    from datasets import Features, Value

    return Features({"text": Value("string"), "name": Value("string")})


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


def _generate(function: Any, arguments: dict[str, Any], options: ReadingOptions) -> Dataset:
    """Write what a generator of documents yields to disk and map it into memory.

    A damaged copy of an earlier run is removed and written again. Raises DataError when the disk refuses.
    """
    from datasets import Dataset

    def generate() -> Dataset:
        generated = Dataset.from_generator(
            function, features=document_features(), cache_dir=options.cache_dir, gen_kwargs=arguments
        )
        return cast("Dataset", generated)

    with quiet():
        try:
            return generate()
        except Exception:  # an unreadable copy shows as one of many errors of datasets and arrow
            shutil.rmtree(options.cache_dir, ignore_errors=True)
        try:
            return generate()
        except Exception as error:
            cause = error.__cause__ or error
            raise DataError(
                f"{options.cache_dir}: cannot keep the documents there ({cause}); free some space or choose "
                "another cache_dir"
            ) from error


def _read_text_files(files: list[ScannedFile], options: ReadingOptions) -> Dataset:
    pairs = [(str(file.path), file.name) for file in files]
    return _generate(_text_documents, {"files": pairs, "cut": options.cut_long_text}, options)


def _text_documents(files: list[tuple[str, str]], cut: bool) -> Iterator[dict[str, str]]:
    for path, name in files:
        text = read_bytes(Path(path)).decode("utf-8")
        if cut and len(text.encode("utf-8")) > LONG_TEXT_BYTES:
            for number, piece in enumerate(cut_long_text(text), start=1):
                yield {"text": piece, "name": f"{name}#{number}"}
        else:
            yield {"text": text, "name": name}


def cut_long_text(text: str) -> list[str]:
    """Cut a long text into documents of about 16 KiB; joined again they are the text, character for
    character.

    A document ends after the first run of blank lines that follows 16 KiB of text; where none comes within
    another 16 KiB it ends at the next line end. Lines are never cut.
    """
    documents: list[str] = []
    lines: list[str] = []
    size, after_blank = 0, False
    for line in text.splitlines(keepends=True):
        blank = not line.strip()
        if not blank and ((after_blank and size >= CUT_BYTES) or size >= 2 * CUT_BYTES):
            documents.append("".join(lines))
            lines, size = [], 0
        lines.append(line)
        size += len(line.encode("utf-8"))
        after_blank = blank
    documents.append("".join(lines))
    return documents


# ----------------------------------------------------------------------------------------------- JSON lines


def _read_json_file(file: ScannedFile, options: ReadingOptions) -> tuple[Dataset, int]:
    """Rows of a JSON-lines file by `datasets`; whatever that stumbles over is read again line by line.

    The second reading finds the line to complain about (or to skip). When every line is fine by itself, as
    when another column changes its type half way, its result is used.
    """
    import datasets

    if file.size == 0:
        return documents_from_pairs([]), 0
    try:
        with quiet():
            rows = datasets.load_dataset("json", data_files=str(file.path), split="train", cache_dir=options.cache_dir)
        if _is_clean_text(rows, options.text_column):
            return name_rows(rows, options.text_column, file.name), 0
    except Exception:  # arrow, pandas, gzip and datasets errors: the second reading explains them
        pass
    return _read_json_lines(file, options)


def _read_json_lines(file: ScannedFile, options: ReadingOptions) -> tuple[Dataset, int]:
    bad, good, first_problem = 0, 0, None
    for _, _, problem in _json_lines(file.path, options.text_column):
        good += problem is None
        bad += problem is not None
        first_problem = first_problem or problem
        if problem and not options.skip_bad:
            raise DataError(f"{problem}; {_SKIP_HINT.format('lines')}")
    if not good:
        if first_problem:
            raise DataError(f"{first_problem}; none of the {bad} lines can be used")
        return documents_from_pairs([]), 0
    arguments = {"path": str(file.path), "name": file.name, "column": options.text_column}
    return _generate(_json_documents, arguments, options), bad


def _json_documents(path: str, name: str, column: str) -> Iterator[dict[str, str]]:
    for number, text, problem in _json_lines(Path(path), column):
        if problem is None:
            yield {"text": text, "name": f"{name}:{number}"}


def _json_lines(path: Path, column: str) -> Iterator[tuple[int, str, str | None]]:
    """(line number, text, what is wrong or None) of every line that is not blank."""
    number = 0
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    text, problem = _parse_json_line(line, column)
                    yield number, text, f"{path}, line {number}: {problem}" if problem else None
    except _GZIP_ERRORS as error:
        yield number + 1, "", f"{path}, line {number + 1}: damaged gzip file ({error})"


def _parse_json_line(line: bytes, column: str) -> tuple[str, str | None]:
    """(text, None), or ("", what is wrong with the line)."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte 0x{line[error.start]:02x} at offset {error.start} of the line)"
    except json.JSONDecodeError as error:
        return (
            "",
            f"not valid JSON ({error.msg} at column {error.colno}); each line must hold one JSON object",
        )
    if not isinstance(row, dict):
        return "", f"holds {_json_type(row)}; each line must hold one JSON object"
    if column not in row:
        return "", f"no text column {column!r}; the columns are {_names(row)}; choose one with text_column"
    text = row[column]
    if not isinstance(text, str):
        return "", f"text column {column!r} holds {_json_type(text)}, not a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "", f"text column {column!r} holds half a surrogate pair, which is no character"
    return text, None


def _json_type(value: object) -> str:
    names = {
        "NoneType": "null",
        "bool": "a boolean",
        "int": "a number",
        "float": "a number",
        "list": "a list",
    }
    return names.get(type(value).__name__, "a string" if isinstance(value, str) else "an object")


# --------------------------------------------------------------------------------------------------- tables


def _read_parquet_file(file: ScannedFile, options: ReadingOptions) -> tuple[Dataset, int]:
    import datasets
    import pyarrow.parquet

    column = options.text_column
    try:
        columns = pyarrow.parquet.read_schema(file.path).names
        if column not in columns:
            raise missing_column(str(file.path), column, columns)
        with quiet():
            rows = datasets.load_dataset(
                "parquet",
                data_files=str(file.path),
                columns=[column],
                split="train",
                cache_dir=options.cache_dir,
            )
    except DataError:
        raise
    except Exception as error:  # arrow and datasets errors
        if options.skip_bad:
            return documents_from_pairs([]), 1
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{file.path}: not a readable parquet file ({reason}); {_SKIP_HINT.format('files')}") from error
    rows, skipped = clean_rows(rows, column, str(file.path), options.skip_bad)
    return name_rows(rows, column, file.name), skipped


def clean_rows(rows: Dataset, column: str, label: str, skip_bad: bool) -> tuple[Dataset, int]:
    """Rows whose text column holds text, and how many do not.

    Raises DataError when the column is missing or holds no strings, and, unless `skip_bad`, for the first
    null.
    """
    if column not in rows.column_names:
        raise missing_column(label, column, rows.column_names)
    kind = getattr(rows.features[column], "dtype", type(rows.features[column]).__name__)
    if kind not in ("string", "large_string"):
        raise DataError(f"{label}: text column {column!r} holds {kind}, not strings; choose another with text_column")
    if rows.data.column(column).null_count == 0:
        return rows, 0
    keep = [index for index, text in enumerate(rows[column]) if text is not None]
    if not skip_bad:
        row = next((i for i, k in enumerate(keep) if i != k), len(keep)) + 1
        raise DataError(f"{label}, row {row}: text column {column!r} is null; {_SKIP_HINT.format('rows')}")
    return rows.select(keep), len(rows) - len(keep)


def _is_clean_text(rows: Dataset, column: str) -> bool:
    """True when a column exists, holds strings, has no null, and all of it is UTF-8."""
    if column not in rows.column_names or getattr(rows.features[column], "dtype", None) != "string":
        return False
    values = rows.data.column(column)
    values.validate(full=True)  # raises ArrowInvalid for bytes that are not UTF-8
    return bool(values.null_count == 0)


def name_rows(rows: Dataset, column: str, name: str) -> Dataset:
    """Keep the text column only, call it text, and name each row `name:1`, `name:2`, ..."""
    rows = rows.select_columns([column])
    if column != "text":
        rows = rows.rename_column(column, "text")
    named = rows.add_column("name", [f"{name}:{number}" for number in range(1, len(rows) + 1)])
    return named if named.features == document_features() else named.cast(document_features())


def missing_column(label: str, column: str, columns: list[str]) -> DataError:
    """The error for a text column that is not there."""
    return DataError(
        f"{label}: no text column {column!r}; the columns are {_names(columns)}; choose one with text_column"
    )


def _names(columns: Any) -> str:
    return ", ".join(repr(str(column)) for column in list(columns)[:20]) or "none"
