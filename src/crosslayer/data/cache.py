"""Folders of prepared data: written whole or not at all, checked before they are used.

The layout, where the key is a hash over everything the blocks depend on:

    <cache_dir>/<key>/train/  validation/    datasets written by `save_to_disk`
                      tokenizer/             `save_pretrained`
                      statistics.json        sizes of the splits
                      manifest.json          name and size of every other file; written last
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import DataError

FORMAT = 1
"""Part of every key: raise it whenever the same configuration would give different blocks."""

_MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)


def cache_key(content: dict[str, Any]) -> str:
    """A folder name for this (JSON-able) content: 24 hex digits."""
    text = json.dumps({"format": FORMAT, **content}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:24]


def is_complete(folder: Path) -> bool:
    """True when the folder holds every file of its manifest in full; an existing folder that does not is
    discarded."""
    if not folder.exists():
        return False
    try:
        expected = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if _sizes(folder) == expected:
            return True
        reason = "its files are not those that were written"
    except (OSError, ValueError) as error:
        reason = f"its manifest cannot be read: {error}"
    discard(folder, reason)
    return False


def discard(folder: Path, reason: object) -> None:
    """Remove a damaged cache, with a warning that it will be made anew.

    It is moved away first, so that another process never meets half of it. A cache that cannot be removed
    is left to `building`, which says so.
    """
    _log.warning("the data cache %s is damaged (%s); building it again", folder, reason)
    with suppress(OSError):
        damaged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        os.rename(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; rename it to `folder` when the block ends well, else remove
    it.

    Two processes may build the same folder: the first to finish wins. A complete folder is never replaced.
    Raises DataError when the disk refuses (full, read-only) or a source breaks off.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        (temporary / _MANIFEST).write_text(json.dumps(_sizes(temporary), indent=1), encoding="utf-8")
        _move_into_place(temporary, folder)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: building the data cache failed ({error.strerror or error}); "
            "check the source and the free space, or choose another cache_dir"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not is_complete(folder):  # complete: another process was faster, which is fine
            raise


def _sizes(folder: Path) -> dict[str, int]:
    """Size of every file below the folder but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
