"""Documents on their way from a source to a dataset: written to a file without a name, and mapped into memory.

The file lies in the cache folder, where there is room for it, and is gone when the process ends, however it ends; so
there is no copy of a source that could be stale, damaged or left behind.
"""

from __future__ import annotations

import mmap
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 256  # documents in one record batch
_BATCH_CHARACTERS = 16 * 2**20  # or so many characters, where documents are long


def spool(documents: Iterable[tuple[str, str]], folder: Path) -> Dataset:
    """A dataset of (name, text) pairs, columns text and name, that takes no memory of its own.

    Raises DataError when the disk refuses (full, read-only, a file in the way); what `documents` raises passes through.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    schema = pa.schema({"text": pa.string(), "name": pa.string()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            with pa.ipc.new_stream(file, schema) as stream:
                for batch in _batches(documents):
                    names, texts = zip(*batch, strict=True)
                    stream.write_batch(pa.record_batch([pa.array(texts, pa.string()), pa.array(names)], schema=schema))
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot keep the documents there ({error.strerror or error}); free some space or choose "
            "another cache_dir"
        ) from error
    table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
    # A fingerprint of our own: datasets would hash a copy of the whole text.
    return Dataset(InMemoryTable(table), fingerprint=secrets.token_hex(8))


def documents_from_pairs(pairs: list[tuple[str, str]]) -> Dataset:
    """An in-memory dataset of (name, text) pairs."""
    from datasets import Dataset

    columns = {"text": [text for _, text in pairs], "name": [name for name, _ in pairs]}
    return Dataset.from_dict(columns, features=document_features())


def document_features() -> Any:
    """The two columns of every dataset of documents."""
    from datasets import Features, Value

    return Features({"text": Value("string"), "name": Value("string")})


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    characters = 0
    for name, text in documents:
        batch.append((name, text))
        characters += len(text)
        if len(batch) >= _BATCH or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
