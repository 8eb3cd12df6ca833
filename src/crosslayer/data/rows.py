"""Rows of a data set, whole: files, folders with one file a split, hub datasets.

`files.py` reads documents to pre-train on, of which only the text matters; a task needs every column as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from .config import is_hub, parse_hub
from .files import quiet

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {"jsonl": "json", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}
ENDINGS = tuple(f".{kind}{gz}" for kind in READERS for gz in ("", ".gz") if not (gz and kind == "parquet"))


def load_rows(source: str, split: str, *, configuration: str | None = None, cache_dir: Path | None = None) -> Dataset:
    """The rows of one split of `source`: a file (any split), a folder of SPLIT.ENDING, or hf:owner/name[:config].

    Raises DataError when it does not exist, cannot be read, or is empty.
    """
    import datasets

    if is_hub(source):
        name, named = parse_hub(source)
        what = f"{source} (split {split!r})"
        arguments = {"path": name, "name": named or configuration, "split": split}
    else:
        path = find_split(Path(source).expanduser(), split)
        what = str(path)
        kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
        arguments = {"path": READERS[kind], "data_files": str(path), "split": "train"}
        if kind == "tsv":
            arguments["sep"] = "\t"
        if path.stat().st_size == 0:
            raise DataError(f"{what}: the file is empty")
    try:
        with quiet():
            rows = datasets.load_dataset(**arguments, cache_dir=None if cache_dir is None else str(cache_dir))
    except Exception as error:  # the hub, its client, arrow, pandas and dataset builders raise dozens of kinds
        raise DataError(f"{what}: cannot be read ({_root_cause(error)})") from error
    if len(rows) == 0:
        raise DataError(f"{what}: the split is empty; give one with rows")
    return rows


def find_split(path: Path, split: str) -> Path:
    """The file of a split: `path` itself, or SPLIT.ENDING in a folder. Raises DataError."""
    if path.is_file():
        if not path.name.lower().endswith(ENDINGS):
            raise DataError(f"{path}: unknown kind of file; allowed are {', '.join(ENDINGS)}")
        return path
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    found = [path / f"{split}{ending}" for ending in ENDINGS if (path / f"{split}{ending}").is_file()]
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
    path = Path(source).expanduser()
    return path.is_dir() and any((path / f"{split}{ending}").is_file() for ending in ENDINGS)


def require_columns(rows: Dataset, columns: tuple[str, ...], label: str, option: str) -> None:
    """Raises DataError, naming the columns there are, when one of `columns` is missing."""
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{label}: no column {missing[0]!r}; the columns are {', '.join(map(repr, rows.column_names))}; choose "
            f"with {option}"
        )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
