"""Sources of documents: the embedded Python library, files and folders, hub datasets.

`open_source` looks at a source just closely enough to know its identity (what a cache key needs); `read`
delivers its documents, a dataset with the columns `text` and `name`.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import DataError
from ..private import dataset_fingerprint
from .config import PYTHON_LIBRARY, DataConfig, cache_root, is_hub, local_path, parse_hub
from .cutting import LONG_FILE_BYTES, LONG_TEXT_BYTES
from .files import (
    KINDS,
    ReadingOptions,
    ScannedFile,
    Tally,
    clean_rows,
    file_kind,
    find_files,
    missing_column,
    pieces,
    read_files,
    scan_file,
    stream_files,
)
from .prepared import is_prepared
from .spool import document_features, documents_from_pairs

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_HELP_TOPICS = "pydoc_data/topics.py"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """Documents in source order, how many files, lines or rows were left out as unreadable, how many were cut."""

    dataset: Dataset | IterableDataset  # columns text, name
    skipped: int
    cut: int = 0


class Source(Protocol):
    """A place documents come from."""

    label: str
    """How messages call it."""

    identity: dict[str, Any]
    """JSON-able; changes whenever the documents do."""

    def read(self) -> Documents:
        """All documents. Raises DataError for the first thing that cannot be read."""
        ...


def open_source(config: DataConfig, *, validation: bool = False) -> Source:
    """The source named by `config.data`, or by `config.validation_data` when `validation`.

    Raises DataError when it does not exist, holds no text, or cannot be reached.
    """
    spec = (config.validation_data or "") if validation else config.data
    if validation and not is_hub(spec):
        config = replace(config, streaming=False)
    if spec == PYTHON_LIBRARY:
        return python_library(config)
    if is_hub(spec):
        return HubSource(spec, config.validation_split if validation else config.split, config)
    return local_files(spec, config)


# ---------------------------------------------------------------------------------------------- local files


class FileSource:
    """Files, and documents that come with them without being files."""

    def __init__(
        self,
        label: str,
        files: list[ScannedFile],
        config: DataConfig,
        *,
        skip_bad: bool | None = None,
        longest_text: int = LONG_FILE_BYTES,
        extra: list[tuple[str, str]] | None = None,
        extra_identity: dict[str, Any] | None = None,
    ) -> None:
        self.label = label
        self._files = files
        self._streaming = config.streaming
        self._extra = extra or []
        skip_bad = config.skip_bad if skip_bad is None else skip_bad
        self.identity: dict[str, Any] = {
            "files": [file.identity for file in files],
            "text_column": config.text_column,
            "skip_bad": skip_bad,
            "longest_text": longest_text,
            **({"streaming": True} if config.streaming else {}),
            **(extra_identity or {}),
        }
        self._options = ReadingOptions(
            text_column=config.text_column,
            skip_bad=skip_bad,
            cache_dir=cache_root(config.cache_dir),
            longest_text=longest_text,
        )

    def read(self) -> Documents:
        """All documents of the files in order, then the extra ones; streamed, they are read when they are asked for."""
        from datasets import concatenate_datasets

        if self._streaming:
            return Documents(stream_files(self._files, self._options), 0)
        dataset, tally = read_files(self._files, self._options)
        if self._extra:
            dataset = concatenate_datasets([dataset, documents_from_pairs(self._extra)])
        return _documents(self.label, dataset, tally)


def local_files(spec: str, config: DataConfig) -> FileSource:
    """A file or a folder. Raises DataError when it is missing, empty, or of an unknown kind."""
    path = local_path(spec)
    if os.path.isdir(path):  # False, not an error, for a name that no folder can have
        if is_prepared(path):
            raise DataError(f"{spec} holds prepared blocks, not text; pretrain and compare take it as their data")
        files = [scan_file(found, found.relative_to(path).as_posix()) for found in find_files(path)]
        files = [file for file in files if file.size > 0 or file.problem]
        if not files:
            raise DataError(f"{spec}: the folder holds no text; it needs files ending in {', '.join(KINDS)}")
        return FileSource(spec, files, config)
    if not os.path.exists(path):
        raise DataError(f"{spec}: no such file or folder; give an existing one, {PYTHON_LIBRARY} or hf:owner/name")
    if file_kind(path) is None:
        raise DataError(f"{spec}: unknown kind of file; allowed are {', '.join(KINDS)}")
    file = scan_file(path, path.name)
    if file.problem and not file.size:  # it cannot be opened
        raise DataError(file.problem)
    if file.size == 0:
        raise DataError(f"{spec}: the file is empty; give one that holds text")
    return FileSource(spec, [file], config, longest_text=LONG_TEXT_BYTES)


def python_library(config: DataConfig) -> FileSource:
    """The `.py` files of the running Python's standard library, then its help topics, one document each.

    Left out: installed packages, tests, and files that describe one machine's build (`_sysconfigdata*`,
    `config-*`). Library files that are not UTF-8 are skipped and counted.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in find_files(root) if _in_library(path.relative_to(root))]
    files = [scan_file(path, path.relative_to(root).as_posix()) for path in paths]
    topics = _help_topics()
    if not files and not topics:
        raise DataError(f"{PYTHON_LIBRARY}: no .py files below {root}; give a file, a folder or hf:owner/name")
    identity = {"python": platform.python_version(), "topics": topics}
    return FileSource(PYTHON_LIBRARY, files, config, skip_bad=True, extra=topics, extra_identity=identity)


def _in_library(path: Path) -> bool:
    if path.suffix != ".py" or path.as_posix() == _HELP_TOPICS or _NOT_LIBRARY.intersection(path.parts):
        return False
    return not path.parts[0].startswith("config-") and not path.name.startswith("_sysconfigdata")


def _help_topics() -> list[tuple[str, str]]:
    """(name, text) of the texts behind `help("topic")`; some distributions leave them out."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [(f"{_HELP_TOPICS}#{topic}", topics[topic]) for topic in sorted(topics)]


def _documents(label: str, dataset: Dataset, tally: Tally) -> Documents:
    if tally.cut:
        _log.info("%s: %d long texts were cut into documents", label, tally.cut)
    return Documents(dataset, tally.skipped, tally.cut)


# --------------------------------------------------------------------------------------------- hub datasets


class HubSource:
    """A dataset of the hub, downloaded (and cached by `datasets`), or streamed when the configuration says
    so."""

    def __init__(self, spec: str, split: str, config: DataConfig) -> None:
        self.label = spec
        self._config = config
        name, configuration = parse_hub(spec)
        self._rows = _load_hub(spec, name, configuration, split, config.streaming)
        version = hub_revision(name) if config.streaming else dataset_fingerprint(self._rows)
        self.identity: dict[str, Any] = {
            "hub": [name, configuration, split, version],
            "text_column": config.text_column,
            "skip_bad": config.skip_bad,
            "streaming": config.streaming,
        }

    def read(self) -> Documents:
        """The rows as documents; of a streaming dataset a lazy iterable, checked row by row while it is
        read."""
        if self._config.streaming:
            return Documents(_stream_documents(self._rows, self._config, self.label), 0)
        config = self._config
        options = ReadingOptions(config.text_column, config.skip_bad, cache_root(config.cache_dir))
        return _documents(self.label, *clean_rows(self._rows, config.text_column, self.label, options))


def _load_hub(spec: str, name: str, configuration: str | None, split: str, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, configuration, split=split, streaming=streaming)
    except Exception as error:  # the hub, its client and dataset builders raise dozens of kinds
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise DataError(
            f"{spec} (split {split!r}) cannot be loaded ({type(error).__name__}: {reason}); check the "
            "connection, the name hf:owner/name[:config] and the split, or give a file, a folder or "
            f"{PYTHON_LIBRARY}"
        ) from error


def hub_revision(name: str) -> str | None:
    """Commit of a hub dataset; None when the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name).sha
    except Exception:  # only makes the cache key less precise
        return None


def _stream_documents(rows: IterableDataset, config: DataConfig, label: str) -> IterableDataset:
    """Map the rows of a streaming dataset to documents; raises DataError from within the iteration."""
    columns = rows.column_names or list(next(iter(rows), {}))
    if config.text_column not in columns:
        raise missing_column(label, config.text_column, columns)
    return rows.map(
        _rows_to_documents,
        batched=True,
        with_indices=True,
        remove_columns=columns,
        features=document_features(),
        fn_kwargs={"column": config.text_column, "label": label, "skip_bad": config.skip_bad},
    )


def _rows_to_documents(
    batch: dict[str, list[Any]], indices: list[int], *, column: str, label: str, skip_bad: bool
) -> dict[str, list[str]]:
    documents: list[tuple[str, str]] = []
    for text, index in zip(batch[column], indices, strict=True):
        if isinstance(text, str):
            documents += pieces(f"{label}:{index + 1}", text, Tally())
        elif not skip_bad:
            raise DataError(
                f"{label}, row {index + 1}: text column {column!r} holds no string; "
                "choose another with text_column, or set skip_bad to leave such rows out"
            )
    return {"text": [text for _, text in documents], "name": [name for name, _ in documents]}
