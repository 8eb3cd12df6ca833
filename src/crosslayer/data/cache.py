"""Folders of prepared data: written whole or not at all, checked before they are used.

The layout, where the key is a hash over everything the blocks depend on:

    <cache_dir>/<key>/train/  validation/    datasets written by `save_to_disk`
                      tokenizer/             `save_pretrained`
                      statistics.json        sizes of the splits
                      manifest.json          name and SHA-256 of every other file; written last
    <cache_dir>/.<key>.<random>/             one being written, by the process that holds .<key>.<random>.lock
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import DataError

FORMAT = 2
"""Part of every key: raise it whenever the same configuration would give different blocks."""

_MANIFEST = "manifest.json"
_LOCK = ".lock"
_TEMPORARY = re.compile(r"\.[0-9a-f]{24}\.[^.]+")
_log = logging.getLogger(__name__)


def cache_key(content: dict[str, Any]) -> str:
    """A folder name for this (JSON-able) content: 24 hex digits."""
    text = json.dumps({"format": FORMAT, **content}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:24]


def is_complete(folder: Path) -> bool:
    """True when the folder holds every file of its manifest, byte for byte; an existing folder that does not is
    discarded."""
    if not folder.exists():
        return False
    problem = problem_of(folder)
    if problem is not None:
        discard(folder, problem)
    return problem is None


def problem_of(folder: Path) -> str | None:
    """What is wrong with the files of a folder; None where they are those of its manifest, byte for byte."""
    try:
        expected = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        found = _hashes(folder)
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read: {error}"
    if found == expected:
        return None
    names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    return f"its files are not those that were written ({', '.join(names[:3])})"


def discard(folder: Path, reason: object) -> None:
    """Remove a damaged cache, with a warning that it will be made anew.

    It is moved away first, so that another process never meets half of it. A cache that cannot be removed
    is left to `building`, which says so.
    """
    _log.warning("the data cache %s is damaged (%s); building it again", folder, reason)
    with suppress(OSError), _temporary(folder) as damaged:
        os.rename(folder, damaged)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; rename it to `folder` when the block ends well, else remove
    it.

    Two processes may build the same folder: the first to finish wins. A complete folder is never replaced.
    Raises DataError when the disk refuses (full, read-only) or a source breaks off.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        with _temporary(folder) as temporary:
            yield temporary
            (temporary / _MANIFEST).write_text(json.dumps(_hashes(temporary), indent=1), encoding="utf-8")
            _move_into_place(temporary, folder)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: building the data cache failed ({error.strerror or error}); "
            "check the source and the free space, or choose another cache_dir"
        ) from error


def remove_leftovers(root: Path) -> None:
    """Remove what killed runs were writing: temporary folders whose lock nobody holds any more."""
    for path in root.glob(f".*{_LOCK}"):
        lock = FileLock(path)
        with suppress(OSError, Timeout), lock.acquire(blocking=False):
            shutil.rmtree(path.with_name(path.name.removesuffix(_LOCK)), ignore_errors=True)
            path.unlink(missing_ok=True)
    for path in root.glob(".*"):  # older versions took no lock
        if _TEMPORARY.fullmatch(path.name) and not path.with_name(path.name + _LOCK).exists():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` and a lock that the system lets go of when this process ends, however it ends."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    lock_file = temporary.with_name(temporary.name + _LOCK)
    with FileLock(lock_file):  # before the folder is there: a folder without a holder is a leftover
        try:
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock_file.unlink(missing_ok=True)


def _move_into_place(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not is_complete(folder):  # complete: another process was faster, which is fine
            raise


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below the folder but the manifest."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
